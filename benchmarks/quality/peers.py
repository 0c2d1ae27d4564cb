"""Makes learners of other packages' methods, as each documents its own.

BAdam keeps float32 masters of the block that it trains, LOMO and AdaLomo change bf16 weights where they are; GaLore,
APOLLO and the adapters of LoRA and DoRA have float32 masters here, like dense AdamW: what they learn is compared, not
how they round, so that their bytes are not the fewest that they could have.
Models whose trained parameters or hooks change on the way are not compiled.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.learner import Batch, Learner, on_masters, set_rate


def badam(model: Any, options: dict[str, Any]) -> Learner:
    """A layer at a time with moments from zero: ``interval`` (100) steps each, ``order`` (random); all parameters."""
    from badam import BlockOptimizer

    inner = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    optimizer = BlockOptimizer(
        base_optimizer=inner,
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=options.get("interval", 100),
        switch_mode=options.get("order", "random"),
        include_embedding=True,
        include_lm_head=True,
        verbose=0,
    )

    def step(batch: Batch, lr: float) -> Tensor:
        set_rate(optimizer, lr)
        loss: Tensor = model(**batch).loss
        loss.backward()
        if options["max_grad_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Learner(step, model)


def lomo(model: Any, options: dict[str, Any]) -> Learner:
    """Gradient descent in the backward; clipping by the norm takes a backward before it."""
    from lomo_optim import Lomo

    optimizer = Lomo(model, 0.0, clip_grad_norm=options["max_grad_norm"])

    def step(batch: Batch, lr: float) -> Tensor:
        loss: Tensor = model(**batch).loss
        if options["max_grad_norm"] is not None:
            optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr)
        return loss.detach()

    return Learner(step, model)


def adalomo(model: Any, options: dict[str, Any]) -> Learner:
    """LOMO with factored second moments and updates of a bounded size, which stand for clipping."""
    from lomo_optim import AdaLomo

    optimizer = AdaLomo(model, 0.0)

    def step(batch: Batch, lr: float) -> Tensor:
        loss: Tensor = model(**batch).loss
        optimizer.fused_backward(loss, lr)
        return loss.detach()

    return Learner(step, model)


def galore(model: Any, options: dict[str, Any]) -> Learner:
    """AdamW on gradients of linear layers in ``rank`` (128) dimensions, those renewed every ``gap`` (200) steps."""
    projection = {"rank": 128, "update_proj_gap": options.get("gap", 200), "scale": options.get("scale", 0.25)}
    return _projected(model, "galore_torch", "adamw", projection | {"proj_type": "std"}, options)


def apollo(model: Any, options: dict[str, Any]) -> Learner:
    """Gradients scaled for each channel by AdamW's scaling in ``rank`` (128) random dimensions."""
    projection = {"rank": 128, "update_proj_gap": options.get("gap", 200), "scale": options.get("scale", 1.0)}
    projection |= {"proj": "random", "proj_type": "std", "scale_type": "channel"}
    return _projected(model, "apollo_torch", "apollo", projection, options)


def _projected(model: Any, package: str, file: str, projection: dict[str, Any], options: dict[str, Any]) -> Learner:
    kind = _without_init(package, file).AdamW
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    projection["rank"] = options.get("rank", projection["rank"])

    def make(masters: dict[str, Tensor]) -> torch.optim.Optimizer:
        projected = [m for name, m in masters.items() if name in linear]
        others = [m for name, m in masters.items() if name not in linear]
        return kind([{"params": projected, **projection}, {"params": others}], no_deprecation_warning=True)

    return on_masters(model, make, options["max_grad_norm"], is_compiled=True)


def _without_init(package: str, file: str) -> Any:
    """A file of a package whose ``__init__`` imports bitsandbytes, for 8-bit optimizers that are not needed here."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[package] = bare
    return importlib.import_module(f"{package}.{file}")


def lora(model: Any, options: dict[str, Any]) -> Learner:
    """Adapters of ``rank`` (16) beside all linear layers but the head, with a scale of 2; ``dora=true``: DoRA.

    ``rank=full`` is the width of the model.
    """
    from peft import LoraConfig, get_peft_model

    asked = options.get("rank", 16)
    rank = model.config.hidden_size if asked == "full" else asked
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=options.get("dora", False))
    adapted = get_peft_model(model, config).train()
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = p.data.float()

    def make(masters: dict[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(masters.values(), weight_decay=0.0, fused=True)

    return on_masters(adapted, make, options["max_grad_norm"], is_compiled=True)
