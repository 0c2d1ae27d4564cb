"""What is compiled, what runs and what is saved: few templates, few variants, no work below the lowest slice."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.program.program import RegionCall


def deep_llama(layers: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=256, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def step(compiled: CompiledModule) -> None:
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    compiled(input_ids=ids, labels=ids).loss.backward()


def calls(compiled: CompiledModule) -> list[RegionCall]:
    """The region calls of the current program, in order."""
    program = compiled.program
    found = [program.module.get_submodule(str(n.target)) for n in program.graph.nodes if n.op == "call_module"]
    return [c for c in found if isinstance(c, RegionCall)]


def lowered(compiled: CompiledModule) -> int:
    return sum(v.run_forward is not None or v.run_backward is not None for v in compiled.variants)


def test_a_deep_llama_has_few_templates_few_variants_and_in_the_second_sweep_no_new_ones() -> None:
    compiled = chunkft_fx.compile(deep_llama(), "64GB", chunks=16, interval=1, backend="eager")
    for k in range(16):
        compiled.activate(k)
        step(compiled)
    assert len(compiled.templates) <= 4
    assert sum(len(t.regions) for t in compiled.templates) >= 33
    made, run = len(compiled.variants), lowered(compiled)
    assert run <= 16
    assert made <= 16
    for k in range(16):
        compiled.activate(k)
        step(compiled)
    assert (len(compiled.variants), lowered(compiled)) == (made, run)


def test_with_the_top_block_active_no_region_below_runs_backward_or_saves() -> None:
    model = deep_llama(8)
    compiled = chunkft_fx.compile(model, "64GB", chunks=8, interval=1, backend="eager")
    compiled.activate(7)
    assert all("embed" not in s.name for s in compiled.active_slices())
    step(compiled)
    lowest = compiled.program.lowest
    assert lowest >= 7
    for call in calls(compiled):
        below = call.region.index < lowest
        assert not (below and call.is_backward)
        if below:
            outputs = call.variant.forward.graph.output_node().args[0]
            assert isinstance(outputs, tuple)
            assert len(outputs) == len(call.region.forward)
            assert call.variant.saved_nbytes == 0


def test_regions_above_the_active_chunk_compute_no_weight_gradient() -> None:
    compiled = chunkft_fx.compile(deep_llama(8), "64GB", chunks=8, interval=1, backend="eager")
    compiled.activate(2)
    step(compiled)
    active = {s.name for s in compiled.active_slices()}
    layers = {n.split("layers.")[1].split(".")[0] for n in active if "layers." in n}
    above = [c for c in calls(compiled) if c.is_backward and c.region.label.rsplit(".", 1)[-1] not in layers]
    assert above
    for call in above:
        gradients = call.variant.demand.backward[: len(call.region.gradients)]
        names = [compiled._training.sessions[-1].capture.parameters[p] for _, p in call.region.gradients]
        assert all(d is None for d, n in zip(gradients, names, strict=True) if n not in active)


def test_models_without_blocks_get_regions_too() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    )
    compiled = chunkft_fx.compile(model, "1GB", chunks=3, interval=1, backend="eager")
    compiled(torch.randn(4, 8)).square().mean().backward()
    assert sum(len(t.regions) for t in compiled.templates) == 3


@pytest.mark.parametrize("order", ["descending", "random"])
def test_every_order_visits_every_chunk_in_a_sweep(order: str) -> None:
    compiled = chunkft_fx.compile(deep_llama(4), "64GB", chunks=5, order=order, interval=2, backend="eager")
    seen = []
    for _ in range(10):
        seen.append(compiled.chunk)
        compiled._training.advance()
    assert sorted(seen) == sorted([0, 1, 2, 3, 4] * 2)
    assert seen[::2] == seen[1::2]
