"""The memory model against hand counts, a tracker of live storages, and the CPU allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import chunkft_fx
from chunkft_fx.plan.policy import RegionPolicy
from chunkft_fx.predict.region import memory as memory_model
from chunkft_fx.predict.region.memory import allocated_peak, workspace
from chunkft_fx.program.lower import lower
from chunkft_fx.program.variants import Variant
from chunkft_fx.runtime import step as runtime
from chunkft_fx.torch_sizes import hint
from tests.support.equivalence import loss_of
from tests.support.live_storages import LiveStorages, allocator_peak

# Bytes of one float32[10, 10], the operand of the graphs counted by hand.
ONE = 400
SQUARE = torch.zeros(10, 10)


def traced(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    apart = [i.clone() for i in inputs]  # a tensor that is given twice would become one fake tensor
    with FakeTensorMode() as mode:
        return make_fx(function)(*(mode.from_tensor(i) for i in apart))


def peak(function: Callable[..., Any], *inputs: Tensor, fused: bool = True, dying: Sequence[int] = ()) -> int:
    return allocated_peak(traced(function, *inputs).graph, fused, dying)


def test_a_fused_chain_stores_its_end_only() -> None:
    def chain(x: Tensor) -> Tensor:
        return ((x + 1).exp() * x).t().reshape(100) - 3

    assert peak(chain, SQUARE) == ONE
    assert peak(chain, SQUARE, fused=False) == 2 * ONE


def test_operands_of_products_are_stored() -> None:
    def product(x: Tensor, w: Tensor) -> Tensor:
        return (x + 1) @ (w * 2)

    assert peak(product, SQUARE, SQUARE) == 3 * ONE


def test_a_result_is_written_over_an_operand_that_dies_with_it() -> None:
    assert peak(lambda x, w: (x @ w).relu() + 1, SQUARE, SQUARE) == ONE
    assert peak(lambda x, w: (x @ w).relu() + 1, SQUARE, SQUARE, fused=False) == 2 * ONE


def test_kernels_are_timed_beside_a_buffer_and_copies_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu(function: Callable[..., Any], fused: bool = True) -> int:
        with FakeTensorMode():
            x, w = (torch.empty(10, 10, device="cuda") for _ in range(2))
            return allocated_peak(make_fx(function)(x, w).graph, fused)

    def scattered(x: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_add(0, w.long(), x)

    assert on_gpu(lambda x, w: (x @ w).relu()) == ONE
    scatter = on_gpu(scattered)
    monkeypatch.setattr(memory_model, "timing_nbytes", lambda device: 1000 if device.type == "cuda" else 0)
    assert on_gpu(lambda x, w: (x @ w).relu()) == ONE + 1000 + ONE  # a copy of what is written over
    assert on_gpu(lambda x, w: x.relu()) == ONE + 1000
    assert on_gpu(scattered) == scatter + 1000 + ONE
    assert on_gpu(lambda x, w: (x @ w).relu(), fused=False) == 2 * ONE
    assert on_gpu(lambda x, w: x @ w) == ONE
    assert peak(lambda x, w: (x @ w).relu(), SQUARE, SQUARE) == ONE


def test_nothing_is_written_over_an_operand_that_two_unrelated_results_read() -> None:
    def two(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return y + 1, y * 2

    assert peak(two, SQUARE, SQUARE) == 3 * ONE


def test_nothing_is_written_over_a_scatter() -> None:
    index = torch.zeros(10, 10, dtype=torch.int64)
    assert peak(lambda x, i: torch.zeros_like(x).scatter_add(0, i, x).relu(), SQUARE, index) == 2 * ONE


def test_inputs_are_freed_only_by_compiled_code_that_alone_holds_them() -> None:
    def twice(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w) @ w) @ w

    assert peak(twice, SQUARE, SQUARE) == 2 * ONE
    assert peak(twice, SQUARE, SQUARE, dying=[0]) == ONE
    assert peak(twice, SQUARE, SQUARE, dying=[1]) == 2 * ONE


def test_an_input_that_is_returned_or_seen_through_another_input_stays() -> None:
    assert peak(lambda x, w: (x @ w + 1, x), SQUARE, SQUARE, dying=[0]) == ONE
    graph = traced(lambda x, v, w: (x @ w) @ v, SQUARE, SQUARE, SQUARE).graph
    first, second, _ = graph.find_nodes(op="placeholder")
    second.meta["val"] = first.meta["val"].view(10, 10)
    assert allocated_peak(graph, True, [0]) == 2 * ONE
    assert allocated_peak(graph, True, [0, 1]) == 2 * ONE


def test_running_uses_no_memory_that_dying_inputs_gave_back() -> None:
    big = torch.zeros(1000, 1000)
    assert peak(lambda x: x.sum(), big, dying=[0]) == 4
    # the product is freed when the function that holds the sum and what follows it is left
    assert peak(lambda x, w: (x[:10, :10] @ w).sum() * 2, big, SQUARE, dying=[0]) == ONE + 4


def test_a_gpu_frees_between_kernels_and_overwrites_what_an_earlier_reduction_read() -> None:
    """Kernels of their own there, on the CPU one function: only a CPU device takes the second rule."""

    def normalised(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return y * y.sum(1, keepdim=True)

    def chain(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).sum() * 2

    elsewhere = SQUARE.to("meta")
    assert peak(normalised, elsewhere, elsewhere) == ONE  # the sum is in registers
    assert peak(normalised, SQUARE, SQUARE) == 2 * ONE
    assert peak(chain, elsewhere, elsewhere) == ONE + 4
    assert peak(chain, elsewhere, elsewhere, dying=[0]) == ONE
    assert peak(chain, SQUARE, SQUARE, dying=[0]) == ONE + 4


def test_stale_views_of_a_rewritten_value_still_share_its_storage() -> None:
    """A pass that computes a new fake value for a node does not touch what was sliced from the old one."""

    def parts(x: Tensor) -> Tensor:
        values, indices = torch.ops.aten.sort.default(x)
        return values[:5] + indices[:5]

    graph = traced(parts, SQUARE).graph
    before = allocated_peak(graph)
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sort.default)
    node.meta["val"] = tuple(v.clone() for v in node.meta["val"])
    assert before == allocated_peak(graph) == ONE + 2 * ONE + ONE // 2


def _flash_backward(heads: int, grouped: int, length: int, width: int) -> fx.Graph:
    """The graph of flash attention's backward; only its metadata matter here."""

    def meta(heads: int) -> Tensor:
        return torch.empty(2, heads, length, width, dtype=torch.bfloat16, device="meta")

    graph = fx.Graph()
    nodes = []
    for i, n in enumerate((heads, heads, grouped, grouped)):
        nodes.append(graph.placeholder(f"x{i}"))
        nodes[-1].meta["val"] = meta(n)
    call = graph.call_function(memory_model._FLASH_BACKWARD, tuple(nodes))
    call.meta["val"] = (meta(heads), meta(grouped), meta(grouped))
    graph.output((call,))
    return graph


def test_flash_attention_sums_the_query_gradient_in_float32() -> None:
    one = 2 * 4 * 200 * 64 * 2
    sums = 2 * 4 * 256 * (64 + 1) * 4
    assert allocated_peak(_flash_backward(4, 4, 200, 64)) == 3 * one + sums
    assert allocated_peak(_flash_backward(4, 2, 200, 64)) == 2 * one + sums + 2 * one


# Operators of random programs: the number of operands, and what to do with them.
OPERATIONS: tuple[tuple[int, Callable[..., Tensor]], ...] = (
    (1, torch.relu),
    (1, torch.Tensor.t),
    (1, lambda x: x[2:6]),
    (1, lambda x: x.reshape(-1)),
    (1, lambda x: x.sum(0, keepdim=True)),
    (2, lambda x, y: x.reshape(-1)[:4] + y.reshape(-1)[:4]),
    (2, lambda x, y: x.reshape(-1)[:4].view(2, 2) @ y.reshape(-1)[:4].view(2, 2)),
    (2, lambda x, y: torch.cat([x.reshape(-1), y.reshape(-1)])),
)


@st.composite
def programs(draw: st.DrawFn) -> Callable[[Tensor], list[Tensor]]:
    """A function of one matrix that applies random operators to earlier values and returns some of them."""
    steps: list[tuple[Callable[..., Tensor], list[int]]] = []
    for i in range(draw(st.integers(1, 8))):
        arity, operation = draw(st.sampled_from(OPERATIONS))
        steps.append((operation, [draw(st.integers(0, i)) for _ in range(arity)]))
    results = draw(st.lists(st.integers(1, len(steps)), min_size=1, max_size=3, unique=True))

    def run(x: Tensor) -> list[Tensor]:
        values = [x]
        for operation, operands in steps:
            source = [values[o] if values[o].ndim == 2 else values[o].view(1, -1) for o in operands]
            values.append(
                operation(*source) if source[0].shape[0] >= 6 or operation is not OPERATIONS[2][1] else source[0] * 2
            )
        return [values[r] for r in results]

    return run


@settings(max_examples=150)
@given(programs())
def test_random_programs_run_in_exactly_the_predicted_memory(program: Callable[[Tensor], list[Tensor]]) -> None:
    module = traced(program, torch.zeros(8, 8))
    module.graph.eliminate_dead_code()
    module.recompile()
    x = torch.randn(8, 8)
    with LiveStorages() as tracker:
        module(x)
    assert tracker.peak_nbytes == allocated_peak(module.graph)
    assert allocated_peak(module.graph, fused=True) <= tracker.peak_nbytes


def _llama(width: int, heads: int, layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def _inputs(module: fx.GraphModule) -> list[Any]:
    """Real values for a graph's inputs, laid out as they were traced."""
    made: list[Any] = []
    for node in module.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        if not isinstance(like, Tensor):
            made.append(hint(like))
            continue
        shape, stride = ([hint(s) for s in sizes] for sizes in (like.shape, like.stride()))
        made.append(torch.empty_strided(shape, stride, dtype=like.dtype).fill_(1))
    return made


def _block_variants(width: int, heads: int, size: int, length: int) -> tuple[list[Variant], Any]:
    """The variants of a Llama block with all its weight gradients, saving and recomputing, and their fake mode."""
    compiled = chunkft_fx.compile(_llama(width, heads, 2), "64GB", chunks=1, backend="inductor")
    ids = torch.randint(0, 256, (size, length))
    with pytest.MonkeyPatch.context() as patched:  # the step itself need not be compiled
        patched.setattr(runtime, "lower", lambda v, backend, mode, is_backward: lower(v, "eager", mode, is_backward))
        loss_of(compiled(input_ids=ids, labels=ids)).backward()
    session = compiled._training.sessions[-1]
    saving = next(v for v in compiled.variants if v.template.index == 1)
    recomputing = session.programs.specializer.variant(
        saving.template, replace(saving.demand, policy=RegionPolicy(recompute=True))
    )
    saving.run_forward = saving.run_backward = None
    return [saving, recomputing], session.capture.fake_mode


def _compare_with_the_allocator(width: int, heads: int, size: int, length: int) -> None:
    variants, fake_mode = _block_variants(width, heads, size, length)
    for variant in variants:
        for is_backward in (False, True):
            found = _allocated(variant, is_backward, fake_mode)
            predicted = workspace(variant, is_backward, "inductor", _owned(variant, is_backward))
            assert predicted == pytest.approx(found, rel=0.01)


def _owned(variant: Variant, is_backward: bool) -> frozenset[int]:
    """The inputs that the run time holds for this call alone: what forward saved, and gradients from above."""
    if not is_backward:
        return frozenset()
    return frozenset(i for i, source in enumerate(variant.sources) if source.kind in ("saved", "tangent"))


def _allocated(variant: Variant, is_backward: bool, fake_mode: Any) -> int:
    module = variant.backward if is_backward else variant.forward
    assert module is not None
    run = lower(variant, "inductor", fake_mode, is_backward)
    run(_inputs(module))
    return allocator_peak(run, lambda: _inputs(module), _owned(variant, is_backward))


def test_compiled_llama_blocks_allocate_what_is_predicted() -> None:
    _compare_with_the_allocator(64, 4, 2, 64)


@pytest.mark.slow
def test_compiled_llama_blocks_of_middle_size_allocate_what_is_predicted() -> None:
    _compare_with_the_allocator(512, 8, 4, 512)
