"""The offloading trainers that `bench_exact` measures beside this library, each as its package documents it.

- ``torchao``: `CPUOffloadOptimizer` over bf16 weights. It copies weights and gradients in the dtype of the parameter,
  so float32 states come from the optimizer class given to it. ``torchao-float32`` has float32 parameters under autocast
  instead, ``torchao-bf16`` the states that its default gives: bf16, without masters.
- ``deepspeed-zero2``, ``deepspeed-zero3``: float32 masters, gradients and moments in host memory, updated by its CPU
  Adam; ZeRO-3 has the bf16 weights in host memory, too. Where its kernel cannot be built, ``DS_TORCH_ADAM=1`` in the
  environment has torch's CPU AdamW update instead.
- ``megatrain``: bf16 weights without masters, moments in float32 (DeepSpeed's CPU Adam), all in host memory.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.exact_trainers import (
    LEARNING_RATE,
    Made,
    Maker,
    MasterAdamW,
    Setting,
    backward,
    checkpointed,
    flops_of,
    forward_backward,
)
from benchmarks.shapes import build


def torchao(states: str) -> Maker:
    """torchao's `CPUOffloadOptimizer`; ``states``: ``"master"``, ``"float32"`` or ``"bf16"``, as the module says."""

    def make(setting: Setting) -> Made:
        from torchao.optim import CPUOffloadOptimizer

        model = checkpointed(setting)
        flops = flops_of(model)
        options: dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": 0.0}
        kind: Any = MasterAdamW if states == "master" else torch.optim.AdamW
        if states != "master":
            options["fused"] = True
        if states == "float32":
            model.float()
        at_once = setting.parts == 1  # gradients can leave the device in backward where nothing accumulates
        optimizer = CPUOffloadOptimizer(model.parameters(), kind, offload_gradients=at_once, **options)

        def step(ids: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=states == "float32"):
                loss = backward(model, ids, setting.parts)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Made(step, flops)

    return make


def deepspeed_zero(stage: int) -> Maker:
    """DeepSpeed on one rank with its optimizer, and in stage 3 its weights, in pinned host memory."""

    def make(setting: Setting) -> Made:
        import deepspeed

        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
        model = checkpointed(setting)
        flops = flops_of(model)
        host = {"device": "cpu", "pin_memory": True}
        zero: dict[str, Any] = {"stage": stage, "offload_optimizer": host, "overlap_comm": True}
        zero["contiguous_gradients"] = True
        if stage == 3:
            zero["offload_param"] = host
        adam = {"lr": LEARNING_RATE, "weight_decay": 0.0, "torch_adam": "DS_TORCH_ADAM" in os.environ}
        config = {
            "train_micro_batch_size_per_gpu": setting.batch // setting.parts,
            "gradient_accumulation_steps": setting.parts,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": adam},
            "zero_optimization": zero,
            "steps_per_print": 10**9,
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)

        def step(ids: Tensor) -> Tensor:
            total = torch.zeros((), device=ids.device)
            for part in ids.chunk(setting.parts):
                with forward_backward():
                    loss = engine(input_ids=part, labels=part).loss
                    engine.backward(loss)  # it divides by the number of parts
                engine.step()
                total += loss.detach() / setting.parts
            return total

        return Made(step, flops)

    return make


class _NoMask:
    """An attention mask that is none once it is on the device: full sequences under torch's causal attention."""

    def to(self, device: Any) -> None:
        return None


def megatrain(setting: Setting) -> Made:
    """MegaTrain's loop (its ``examples/sft/train.py``) without its clipping, which runs on the CPU."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from infinity import CPUMasterConfig, CPUMasterModel

    model: Any = build(setting.shape, "cpu", setting.layers)
    flops = flops_of(model)
    sizes = {"batch_size": setting.batch // setting.parts, "max_seq_len": setting.sequence}
    config = CPUMasterConfig(model_name="", dataset_path="none", attn_implementation="sdpa", **sizes)
    master = CPUMasterModel(model, config)
    optimizer = DeepSpeedCPUAdam(master.get_parameters(), lr=LEARNING_RATE, weight_decay=0.0, adamw_mode=True)

    def step(ids: Tensor) -> float:
        with forward_backward():
            losses = [master.forward_and_backward(part, _NoMask(), part)[0] for part in ids.chunk(setting.parts)]
        optimizer.step()
        master._sync_params_to_gpu()
        master.zero_grad()
        optimizer.zero_grad()
        return float(sum(losses) / setting.parts)

    return Made(step, flops)


PEERS: dict[str, Maker] = {
    "torchao": torchao("master"),
    "torchao-float32": torchao("float32"),
    "torchao-bf16": torchao("bf16"),
    "deepspeed-zero2": deepspeed_zero(2),
    "deepspeed-zero3": deepspeed_zero(3),
    "megatrain": megatrain,
}
