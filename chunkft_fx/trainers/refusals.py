"""Decides which trainers ``attach`` refuses, each by name, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from chunkft_fx.errors import OptionError
from chunkft_fx.module.module import CompiledModule


def refuse_trainer(trainer: Any) -> None:
    """Raise `OptionError` for what is no trainer of transformers, or one that a compiled model cannot train in."""
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise OptionError(
            f"attach was given a {type(trainer).__module__}.{type(trainer).__qualname__}, which is no transformers "
            "Trainer (TRL's are); compile the model with chunkft_fx.compile, and make a chunkft_fx.AdamW for it"
        )
    reason = next(_reasons(trainer), None)
    if reason is not None:
        raise OptionError(f"attach cannot follow this {type(trainer).__name__}: {reason}")


def refuse_factory(optimizer: Any) -> None:
    """Raise `OptionError` for what is neither options of AdamW nor a function that makes an optimizer."""
    if isinstance(optimizer, type):
        raise OptionError(
            f"optimizer={optimizer.__name__} is a class, which would go by its own defaults, not by the trainer's "
            f"learning_rate; give options of AdamW in a dictionary, or lambda m: {optimizer.__name__}(m, lr=...)"
        )
    if optimizer is not None and not callable(optimizer) and not isinstance(optimizer, Mapping):
        raise OptionError(
            f"optimizer={optimizer!r} is neither a dictionary of options of AdamW nor a function of the model; "
            'give {"update": "late"} or lambda model: chunkft_fx.SGD(model, lr=...)'
        )


def refuse_optimizer(trainer: Any, own: Mapping[str, Any]) -> None:
    """Raise `OptionError` where the trainer's arguments do not lead to AdamW, or do not go with its options."""
    from transformers import Trainer

    args, name = trainer.args, type(trainer).__name__
    if type(trainer).create_optimizer is not Trainer.create_optimizer:
        raise OptionError(
            f"{name} makes an optimizer in a way of its own (create_optimizer), which would be left out; give attach "
            "one to use, optimizer=lambda model: chunkft_fx.AdamW(model, ...)"
        )
    kind, _ = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    if kind is not torch.optim.AdamW:
        asked = getattr(args.optim, "value", args.optim)
        raise OptionError(
            f'optim="{asked}" asks for another optimizer than AdamW; leave it out, or give attach one of this library, '
            "optimizer=lambda model: chunkft_fx.SGD(model, ...)"
        )
    if own.get("update") == "backward" and args.max_grad_norm:
        raise OptionError(
            f'update="backward" keeps no gradients to clip, but max_grad_norm={args.max_grad_norm} (1.0 is the default '
            f'of {type(args).__name__}); set max_grad_norm=0, or use update="step" or "late"'
        )
    if own.get("update") == "backward" and args.gradient_accumulation_steps > 1:
        raise OptionError(
            f'update="backward" would update weights behind each of gradient_accumulation_steps='
            f'{args.gradient_accumulation_steps} backward passes; use update="step" or "late", or larger batches, '
            "which are split where they do not fit"
        )


def _reasons(trainer: Any) -> Iterator[str]:
    """What stands against a trainer, with what to change; nothing for most."""
    args, model = trainer.args, trainer.model
    if issubclass(type(model), CompiledModule):
        yield "its model was compiled before; give the trainer the plain model, and attach compiles it"
    adapter = next((m for m in model.modules() if type(m).__module__.startswith("peft.")), None)
    if adapter is not None:
        yield (
            f"its model has PEFT adapters ({type(adapter).__name__}), and this library trains all parameters of a "
            "model; leave peft_config out, or train the adapters without attach"
        )
    if trainer.optimizer is not None or trainer.lr_scheduler is not None or trainer.optimizer_cls_and_kwargs:
        yield (
            "it has an optimizer or a scheduler of its own; leave optimizers and optimizer_cls_and_kwargs out, and "
            "call attach before train()"
        )
    if trainer.model_init is not None:
        yield "it makes its model anew for each run (model_init); give it the model itself"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or args.n_gpu > 1:
        yield "a compiled model runs on one device; leave DeepSpeed and FSDP out, and let the process see one GPU"
    if args.torch_compile:
        yield "torch_compile=True would compile the model a second time; leave it out"
    if args.bf16_full_eval or args.fp16_full_eval:
        yield (
            "bf16_full_eval and fp16_full_eval convert the weights for an evaluation outside of training, and those in "
            "training keep their dtype; leave them out, or use bf16=True"
        )
    if getattr(args, "activation_offloading", False):
        yield "activation_offloading=True is left to the plan, which offloads what pays; leave it out"
