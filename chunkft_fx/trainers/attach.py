"""Runs ``attach``, which puts a compiled model and its optimizer into a trainer that was made already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from glob import escape
from typing import Any

from torch.optim import Optimizer

import chunkft_fx
from chunkft_fx.errors import OptimizerMismatch, OutsideGradient
from chunkft_fx.module.module import CompiledModule, training_of
from chunkft_fx.module.training import Training
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from chunkft_fx.trainers.fused_head import traceable_head
from chunkft_fx.trainers.reference import budget_beside, hold_reference
from chunkft_fx.trainers.refusals import refuse_factory, refuse_optimizer, refuse_trainer
from chunkft_fx.trainers.versions import warn_of_version

Factory = Callable[[CompiledModule], Optimizer]


def attach(
    trainer: Any, budget: str | int, *, optimizer: Mapping[str, Any] | Factory | None = None, **options: Any
) -> CompiledModule:
    """Have a trainer of transformers or TRL train a compiled model; returns that model.

    Call it once, between making the trainer and ``trainer.train()``. It compiles ``trainer.model`` with `compile`
    (``options`` are those of `compile`), gives the trainer `AdamW` with the learning rate, betas, eps and weight decay
    of its arguments, without decay where Trainer's own rule has none, and adds a callback that logs what is trained,
    how fast, and the memory (`trainers.log.TrainerLog`). ``optimizer`` has options of `AdamW` beside those
    (``{"update": "late", "master": "remainder"}``), or is a function of the compiled model that makes another
    optimizer of this library. Batches are copied to a GPU without a wait (accelerate's ``non_blocking``), and NaN
    is kept out of logged losses without one. Everything else stays the trainer's: schedulers, accumulation, clipping,
    evaluation, checkpoints.

    TRL's fused head becomes one that can be compiled, with the same outputs. A reference model (``trainer.ref_model``)
    stays as it is and is not trained; its weights count against ``budget``.

    Raises `OptionError`, before anything changes, for a trainer that cannot be followed: with an optimizer already,
    with PEFT adapters, with arguments that do not go with a compiled model; what `compile` and `AdamW` raise; and
    `OptimizerMismatch` for a function that makes no optimizer of the compiled model. An optimizer step to which no
    backward of the compiled model led raises `OutsideGradient`. A version of TRL that was not tested is warned of,
    once.
    """
    refuse_trainer(trainer)
    from chunkft_fx.trainers.log import TrainerLog  # these need transformers, which a trainer brings
    from chunkft_fx.trainers.loss_filter import LossFilter
    from chunkft_fx.trainers.noise import TraceableNoise

    refuse_factory(optimizer)
    if not callable(optimizer):
        refuse_optimizer(trainer, optimizer or {})
    warn_of_version(trainer)
    model, device, rest = trainer.model, options.pop("device", trainer.args.device), budget_beside(trainer, budget)
    with traceable_head(model):
        compiled = chunkft_fx.compile(model, rest, device=device, **options)
        made = optimizer(compiled) if callable(optimizer) else _adamw(trainer, compiled, optimizer or {})
        training = training_of(compiled, "attach")
        own: object = training.optimizer
        if own is None or made is not own:
            raise OptimizerMismatch(
                f"the optimizer function gave {made!r:.80}, which is not an optimizer of chunkft_fx for the compiled "
                "model that it was called with, and would not train it; write lambda model: chunkft_fx.SGD(model, ...)"
            )
        made.register_step_pre_hook(_refuse_bypass(training))
    hold_reference(trainer, compiled)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = compiled
    trainer.optimizer = made
    if trainer.args.dataloader_pin_memory:  # from pinned memory a batch comes behind the step before, nobody waits
        trainer.accelerator.dataloader_config.non_blocking = True
    if isinstance(made, ChunkedOptimizer) and made.spec.in_backward:
        trainer._get_grad_norm = _no_norm
    trainer.callback_handler.callbacks[:0] = [TrainerLog(), TraceableNoise(), LossFilter(trainer)]
    return compiled


def _adamw(trainer: Any, compiled: CompiledModule, own: Mapping[str, Any]) -> Optimizer:
    """AdamW by the trainer's arguments, in Trainer's two parameter groups."""
    _, given = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    asked = {name: value for name, value in given.items() if name != "fused"} | {
        "weight_decay": trainer.args.weight_decay,
        "no_decay": [escape(n) for n, p in compiled.named_parameters() if p.requires_grad and n not in decayed],
    }
    return chunkft_fx.AdamW(compiled, **{**asked, **own})


def _no_norm(model: Any, grad_norm: Any = None) -> Any:
    """What a Trainer logs as the norm of gradients that the backward has used: nothing. By itself it asks for it."""
    return grad_norm


def _refuse_bypass(training: Training) -> Callable[..., None]:
    """A hook before each step that refuses one to which no backward of the compiled model led."""

    def refuse(*_: Any) -> None:
        arrivals = training.arrivals
        if arrivals.through or arrivals.outside:  # the step itself refuses gradients that came from outside alone
            return
        raise OutsideGradient(
            "the trainer asks for an optimizer step, but no backward came through the compiled model since the last "
            "one: its loss does not depend on what trainer.model returns, so nothing would be trained; have "
            "compute_loss call the model that it is given, and return a loss of its outputs"
        )

    return refuse
