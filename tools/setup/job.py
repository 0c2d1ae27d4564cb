"""Runs what a user asked ``chunkft train`` for: data, then a model, training with its reports, and what is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chunkft_fx.bytes import format_bytes
from chunkft_fx.machine.rates import Rates
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.changes.frozen import freeze
from chunkft_fx.tools.changes.shapes import require_same_shapes
from chunkft_fx.tools.changes.vocabulary import add_tokens
from chunkft_fx.tools.console import progress
from chunkft_fx.tools.data.templates import set_template
from chunkft_fx.tools.load import check_config, empty_model, load_config, load_model, load_tokenizer
from chunkft_fx.tools.models.apart import needs_masks
from chunkft_fx.tools.models.evaluate import Score
from chunkft_fx.tools.models.tasks import class_config
from chunkft_fx.tools.report import dry_run, log
from chunkft_fx.tools.report.best import Best
from chunkft_fx.tools.report.sample import describe
from chunkft_fx.tools.setup.prepare import DataOptions, Prepared, prepare
from chunkft_fx.tools.training import signals
from chunkft_fx.tools.training.data import Batches
from chunkft_fx.tools.training.folder import save_model
from chunkft_fx.tools.training.loop import StepInfo, scoring_interval, train
from chunkft_fx.tools.training.options import TrainOptions


@dataclass(frozen=True)
class Job:
    """A run whose options are checked: the model's name, its data, and how it is compiled."""

    model: str
    data: DataOptions
    options: TrainOptions
    length: tuple[int | None, float | None]
    dtype: torch.dtype
    device: torch.device
    template: str
    compiling: Callable[[nn.Module], CompiledModule]

    def prepared(self) -> tuple[Any, Prepared, TrainOptions, dict[str, Any]]:
        """The tokenizer, data, options with the number of steps, and changes to the config; no weights are read."""
        asked = self.options.changes
        config = load_config(self.model, asked.model_config)
        length = self.data.reading.length
        if config is not None:
            check_config(self.model, config, length)
        tokenizer = load_tokenizer(self.model)
        added = add_tokens(tokenizer, asked.add_tokens, asked.add_special_tokens)
        set_template(tokenizer, self.template)
        if config is not None and (asked.freeze or asked.train_only or asked.model_config):
            self._try_changes()
        data = prepare(tokenizer, config, self.data, self.options.task, self.options.seed)
        options = replace(self.options, steps=_steps(*self.length, data, self.options))
        data = replace(data, lines=(*added, *data.lines))
        if config is not None:
            check_config(self.model, config, length, data.largest, tokenizer, self._tokens(tokenizer))
        changes = dict(asked.model_config) | (class_config(data.classes, config) if data.classes is not None else {})
        if self.options.task == "classification" and getattr(config, "pad_token_id", None) is None:
            # a classifier made of a decoder looks for the last token that is none
            changes["pad_token_id"] = (
                tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            )
        return tokenizer, data, options, changes

    def show(self, rates: Rates | None) -> None:
        """Print the data's first row, the plan and what the run would take."""
        tokenizer, data, options, changes = self.prepared()
        first = Batches(data.rows, options.batch_size, options.seed, options.shuffle)
        _print(*data.lines, "the first row (+ is learned, - is not):", *describe(next(first), tokenizer))
        plain = self.built(tokenizer, data, changes, has_weights=rates is None)
        plan = dry_run.plan_of(self.compiling, plain, next(first), options, rates)
        every = scoring_interval(options, data.rows) if data.held_out is not None else None
        _print(str(plan), *dry_run.times(plan, options, data.rows.length, every))

    def built(self, tokenizer: Any, data: Prepared, changes: dict[str, Any], has_weights: bool = True) -> nn.Module:
        """The model as it is compiled: with what the run changes of it, and, if it is to train, with weights."""
        task, tokens = self.options.task, self._tokens(tokenizer)
        plain: Any
        if has_weights:
            plain = load_model(self.model, self.dtype, self.device, task, changes, tokens)
            check_config(self.model, plain.config, self.data.reading.length, data.largest, tokenizer, tokens)
            self.keep_apart(plain, data)
        else:
            plain = empty_model(self.model, self.dtype, task, changes, tokens).to_empty(device="cpu")
        _print(*self.options.changes.make(plain, task, has_weights))
        model: nn.Module = plain
        return model

    def _try_changes(self) -> None:
        """Find patterns that fit nothing, and a config that does not fit the weights, before these are read."""
        asked, task = self.options.changes, self.options.task
        plain = empty_model(self.model, self.dtype, task, {})
        if asked.model_config:
            require_same_shapes(plain, empty_model(self.model, self.dtype, task, asked.model_config), self.model)
        freeze(plain, asked.freeze, asked.train_only)

    def _tokens(self, tokenizer: Any) -> int:
        """For how many tokens there must be embeddings; 0 leaves them as they are."""
        return len(tokenizer) if self.options.changes.adds_tokens else 0

    def keep_apart(self, plain: Any, data: Prepared) -> None:
        """Give the model what keeps documents apart that share a row, or refuse to pack."""
        task = self.options.task
        if self.data.packing and data.classes is None and needs_masks(plain, data.largest + 1, self.model, task):
            data.give_masks(causal=task == "causal")

    def run(self, out: Path, resume: Path | None, keep: int, track: list[str], settings: dict[str, Any]) -> None:
        """Train, and save the model; the last ``keep`` checkpoints stay."""
        tokenizer, data, options, changes = self.prepared()
        torch.manual_seed(options.seed)  # of a classifier's head
        plain = self.built(tokenizer, data, changes)
        compiled = self.compiling(plain)
        best = Best(out, compiled, tokenizer)
        _print(*data.lines, f"{options.steps:,} steps; training on {self.device}")
        with log.tracking(track, out, settings) as written, signals.between_steps() as stop:
            every = scoring_interval(options, data.rows)
            if resume is None:
                written.begin(0)
            with progress("training", options.steps) as on_step:

                def step(info: StepInfo) -> None:
                    written.step(info)
                    on_step(info)

                def score(step: int, found: Score) -> None:
                    written.score(step, found)
                    mark = ", the best so far" if best.offer(step, found) else ""
                    right = "" if found.accuracy is None else f", {found.accuracy:.1%} right"
                    _print(f"after step {step}: held-out loss {found.loss:.4f}{right}{mark}")

                def resumed(step: int) -> None:
                    written.begin(step)
                    best.resume(step)
                    _print(f"going on after step {step}")

                report = train(
                    compiled, data.rows, options, on_step=step, held_out=data.held_out, on_score=score,
                    on_resume=resumed, out=out, resume=resume, tokenizer=tokenizer, keep=keep, stop=stop,
                    enough=lambda step: best.is_enough(step, every, options.patience),
                )  # fmt: skip
            if report.losses:
                print(compiled.plan)
            if report.ended < options.steps:
                print(f"ended after step {report.ended}: no score was better than that of step {best.step} since")
            elif not report.losses:
                print(f"all {options.steps:,} steps were done before: nothing was trained")
            save_model(out, compiled, tokenizer)
        if data.held_out is not None and math.isfinite(best.loss):
            print(f"the best model, of step {best.step} with held-out loss {best.loss:.4f}, is in {best.folder}")
        peak = format_bytes(report.peak_nbytes)
        print(f"{report.tokens:,} tokens in {report.seconds:.0f} s, peak {peak}; saved in {out}")


def _steps(steps: int | None, epochs: float | None, data: Prepared, options: TrainOptions) -> int:
    """How many optimizer steps a run has; also finds a batch that is larger than the data."""
    batches = Batches(data.rows, options.batch_size, options.seed)
    if steps is not None:
        return steps
    passes = 1.0 if epochs is None else epochs
    return max(1, math.ceil(passes * batches.in_epoch / options.accumulate))


def _print(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)
