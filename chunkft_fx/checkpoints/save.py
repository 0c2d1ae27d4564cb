"""Takes all that a training needs to continue, as it is at one moment, and has it saved."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.bytes import format_bytes
from chunkft_fx.checkpoints.disk.folders import VERSION, Target, name_of, next_serial, write_record
from chunkft_fx.checkpoints.disk.places import os_failure
from chunkft_fx.checkpoints.disk.sums import Sum, file_sums
from chunkft_fx.checkpoints.disk.tensor_file import write_tensors
from chunkft_fx.checkpoints.plain import packed, unpacked
from chunkft_fx.checkpoints.random_states import random_states
from chunkft_fx.checkpoints.saving import Saving
from chunkft_fx.checkpoints.states import SHARD_NBYTES, SavedTensor, into_files, saved_tensors, weight_rows
from chunkft_fx.checkpoints.weights import Copies, as_it_is, refuse_unwritable, write_weights
from chunkft_fx.copies.host_memory import available_nbytes
from chunkft_fx.errors import ChunkFTWarning, OptimizerMismatch, OptionError, SaveFailed
from chunkft_fx.graph.layout import size_along
from chunkft_fx.module.module import training_of
from chunkft_fx.module.training import Training
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from chunkft_fx.optim.states.staging import StagedStates
from chunkft_fx.optim.states.step_counts import Counts, Run, uniform, within
from chunkft_fx.plan.cuts import cut_dim
from chunkft_fx.ranks.ranks import Ranks

# The tensors among plain data.
EXTRAS = "training.safetensors"
# Of optimizers within optimizers.
_LAYERS = 4


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    scheduler: Any = None,
    tokenizer: Any = None,
    extra: Any = None,
    keep: int | None = None,
    best: int | None = None,
    wait: bool = True,
) -> Path:
    """Save a training as ``checkpoint-STEP`` in ``folder``; returns the path of that.

    It has the model as ``save_pretrained`` writes it, with a ``tokenizer`` if one is given, and so is read by
    ``from_pretrained``; of a model without that method its ``state_dict``. Beside it are the optimizer's states in
    files of up to 2 GiB, written from where they are kept, the place in the sweep, the plan, the ``scheduler``'s state,
    those of random number generators, and ``extra``: numbers, strings, tensors, and lists, tuples and dictionaries.
    The folder gets its name when all of it is on the disk. Of other checkpoints in ``folder`` those stay that are
    among the last ``keep`` (None: all), and that of step ``best``.

    Each of several ranks calls this and writes its share of the states, rank 0 the rest: ``folder`` has to be one that
    all of them see, and training waits.

    Without ``wait`` training goes on meanwhile. What is saved is what was there at the call, to the bit: weights are
    copied in host memory, states that a step is about to change are copied or written first. An error comes with the
    next step of the optimizer, the next save or `wait_for_saves`; the process ends when everything is written.

    Raises `SaveFailed` when it cannot be written, on a full disk or in a read-only folder: what was saved before is
    as it was, and nothing of this one is left. Raises `OptimizerMismatch` for another model or optimizer, `OptionError`
    for what a checkpoint cannot hold, `PartialStep` for a step that was left halfway.
    """
    training = training_of(model, "save")
    own: object = training.optimizer
    optimizer = unwrapped(optimizer, own)
    if not isinstance(optimizer, ChunkedOptimizer) or optimizer is not own:
        raise OptimizerMismatch("save was given another optimizer than the one that was made last for this model")
    _check_counts(step, keep, best)
    for what, given, method in (("scheduler", scheduler, "state_dict"), ("tokenizer", tokenizer, "save_pretrained")):
        if given is not None and not hasattr(given, method):
            raise OptionError(f"{what}={given!r} has no {method}(); give the {what} itself, or leave it out")
    ranks = training.ranks
    with training.lock, ranks.failing():
        ranks.require_same("a save", f"{folder} at step {step}", "save the same checkpoint on all ranks")
        groups, states = optimizer.snapshot()
        if states.watch is not None:
            states.watch.before_step()  # has ended: the error of a save that nobody has seen
        taken = {
            "optimizer": groups,
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "extra": extra,
            "random": random_states(),
            "random_of_others": _of_other_ranks(ranks),
        }
        weights = training.plain.state_dict()
        refuse_unwritable(training.plain, weights)
        copies = None if wait or not ranks.is_alone or not _has_room(weights.values()) else Copies()
        counts = _counts(optimizer, states)
        tensors = _state_tensors(optimizer, states, counts, copies)
        layouts, blocks = into_files(tensors, SHARD_NBYTES)
        taken["states"] = _described(counts, tensors)
        moment = _Moment(as_it_is(training.plain), _taken(weights, copies), *_record(step, training, taken))
        target = Target(Path(folder) / name_of(step), keep, best)
        if ranks.rank == 0:
            target.begin()
            _write_tokenizer(tokenizer, target)
        ranks.compare("a folder for a checkpoint", "")
        if not target.new.is_dir():
            raise SaveFailed(
                f"rank {ranks.rank} does not see {target.new}, which rank 0 has made: give a folder on a file system "
                "that all ranks share"
            )
        if states.share.is_all and ranks.rank:
            blocks = []  # all ranks have these
        names = [f"states-{i:05}-of-{len(layouts):05}.safetensors" for i in range(1, len(layouts) + 1)]
        saving = Saving(target, [*zip(names, layouts, strict=True)], blocks, moment.write, ranks)
        states.watch = saving
        if copies is None:
            saving.run()
        else:
            saving.start()
    return target.place


def unwrapped(optimizer: Any, own: object) -> Any:
    """A model's ``own`` optimizer where that is in what was given, as Accelerate, Trainer and Fabric wrap it."""
    inner = optimizer
    for _ in range(_LAYERS):
        if inner is own:
            return own
        inner = getattr(inner, "optimizer", None)
    return optimizer


@dataclass(frozen=True)
class _Moment:
    """All of a checkpoint but the states, as it was at one moment."""

    model: nn.Module
    weights: Mapping[str, Tensor]
    record: Mapping[str, Any]
    extras: Mapping[str, Tensor]

    def write(self, folder: Path, sums: Mapping[str, Sequence[Sum]]) -> None:
        """Write it beside the states, whose files have these ``sums``."""
        write_weights(self.model, self.weights, folder, SHARD_NBYTES)
        write_tensors(folder / EXTRAS, self.extras)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        all_sums = {name: sums[name] if name in sums else file_sums(path) for name, path in files.items()}
        write_record(folder, {**self.record, "files": all_sums, "serial": next_serial(folder.parent)})


def _write_tokenizer(tokenizer: Any, target: Target) -> None:
    """Write it at once, also beside training: it is small, and copying one means to write it, too."""
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(target.new)
    except BaseException as error:
        target.abandon()
        known = os_failure(target.place, error)
        if known is not None:
            raise known from error
        raise


def _record(step: int, training: Training, taken: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says of itself, and the tensors in it."""
    extras: dict[str, Tensor] = {}
    record = {name: packed(value, name, extras) for name, value in taken.items()}
    plan = None if training.known_plan is None else json.loads(training.known_plan.to_json())
    return {"version": VERSION, "step": step, "plan": plan, **record}, extras


def _check_counts(step: Any, keep: Any, best: Any) -> None:
    if not _is_count(step, 0):
        raise OptionError(f"step={step!r} must be the number of steps done, 0 or more")
    if keep is not None and not _is_count(keep, 1):
        raise OptionError(f"keep={keep!r} must be a number of checkpoints, 1 or more, or None to keep all")
    if best is not None and not _is_count(best, 0):
        raise OptionError(f"best={best!r} must be the step of the checkpoint that stays, 0 or more, or None")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _has_room(weights: Iterable[Tensor]) -> bool:
    """Whether host memory has room for copies of these; warns where it has none, so that a save does not go beside."""
    needed = sum({(t.data_ptr(), t.nbytes): t.nbytes for t in weights}.values())
    if needed <= available_nbytes():
        return True
    warnings.warn(
        f"host memory has no room for a copy of the weights ({format_bytes(needed)}), so training waits until the "
        "checkpoint is written",
        ChunkFTWarning,
        stacklevel=3,
    )
    return False


def _taken(weights: Mapping[str, Tensor], copies: Copies | None) -> Mapping[str, Tensor]:
    return weights if copies is None else {name: copies.of(t) for name, t in weights.items()}


def _parameters(optimizer: ChunkedOptimizer) -> list[tuple[str, Tensor]]:
    return [(n, p) for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]


def _counts(optimizer: ChunkedOptimizer, states: StagedStates) -> dict[str, Counts]:
    """The step counts of all parameters that were updated so far, by name; each rank knows those of its share."""
    known = {n: optimizer.state[p]["slice_steps"] for n, p in _parameters(optimizer) if p in optimizer.state}
    found = {name: counts for name, counts in known.items() if any(run.step for run in counts)}
    if states.share.is_all:
        return found
    words = [json.loads(w) for w in states.ranks.compare("step counts", json.dumps(found))]
    return {
        name: tuple(
            run
            for share, word in zip(states.share.each, words, strict=True)
            for run in within(_runs(word.get(name), p), *share.of(size_along(p, cut_dim(p.shape))))
        )
        for name, p in _parameters(optimizer)
        if any(name in word for word in words)
    }


def _runs(word: Any, parameter: Tensor) -> Counts:
    """Step counts as another rank wrote them."""
    if word is None:
        return uniform(size_along(parameter, cut_dim(parameter.shape)))
    return tuple(Run(start, n, step, tuple((k, v) for k, v in numbers)) for start, n, step, numbers in word)


def _state_tensors(
    optimizer: ChunkedOptimizer, states: StagedStates, counts: Mapping[str, Counts], copies: Copies | None
) -> list[SavedTensor]:
    """The states of the parameters with these counts, of which host memory keeps any."""
    if not optimizer.spec.is_kept:
        return []

    def weight_of(p: Tensor) -> Callable[[], Tensor]:
        return weight_rows(p if copies is None else copies.of(p), p.shape)

    updated = [(n, p) for n, p in _parameters(optimizer) if n in counts]
    states.begin([p for _, p in updated])
    return [*saved_tensors(updated, optimizer.state, optimizer.spec, weight_of, states.share)]


def _described(counts: Mapping[str, Counts], tensors: Sequence[SavedTensor]) -> dict[str, Any]:
    """By parameter: its step counts, and for each of its states whether the cut dimension is in front."""
    found: dict[str, Any] = {}
    for t in tensors:
        own = found.setdefault(t.name, {"slice_steps": [list(run) for run in counts[t.name]], "tensors": {}})
        own["tensors"][t.key.removeprefix(f"{t.name}.")] = t.is_turned
    return found


def _of_other_ranks(ranks: Ranks) -> list[Any]:
    """The states of the random number generators of all ranks but the first."""
    extras: dict[str, Tensor] = {}
    record = packed(random_states(), "random", extras)
    plain = {name: [str(t.dtype).removeprefix("torch."), t.tolist()] for name, t in extras.items()}
    found = []
    for word in ranks.compare("random numbers", json.dumps([record, plain]))[1:]:
        theirs, tensors = json.loads(word)
        made = {name: torch.tensor(values, dtype=getattr(torch, kind)) for name, (kind, values) in tensors.items()}
        found.append(unpacked(theirs, made))
    return found
