"""The cost model against closed forms, bytes counted by hand, and properties that any roofline has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import given, settings
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

import chunkft_fx
from chunkft_fx.graph import ops
from chunkft_fx.machine.rates import Rates
from chunkft_fx.plan.policy import RegionPolicy
from chunkft_fx.predict.region.time import Cost, Work, graph_cost, transfer_us
from tests.support.equivalence import loss_of

RATES = Rates({"float32": 1e12, "bfloat16": 4e12}, 1e11, 2e10, 1e10, 5e9, 2.0)
SQUARE = torch.zeros(10, 10)
# Bytes of one float32[10, 10].
ONE = 400


def traced(function: Callable[..., Any], *inputs: Tensor, symbolic: bool = False) -> fx.Graph:
    if symbolic:
        return make_fx(function, tracing_mode="symbolic")(*inputs).graph
    apart = [i.clone() for i in inputs]  # a tensor that is given twice would become one fake tensor
    with FakeTensorMode() as mode:
        return make_fx(function)(*(mode.from_tensor(i) for i in apart)).graph


def cost(function: Callable[..., Any], *inputs: Tensor, fused: bool = True) -> Cost:
    return graph_cost(traced(function, *inputs), fused)


def test_a_fused_chain_reads_its_input_and_writes_its_result() -> None:
    def chain(x: Tensor) -> Tensor:
        return (x + 1).exp() * 2

    assert cost(chain, SQUARE) == Cost((Work(0, "float32", 2 * ONE),))
    alone = cost(chain, SQUARE, fused=False)
    assert (alone.launches, alone.nbytes, alone.flops) == (3, 3 * 2 * ONE, {})


def test_a_product_reads_both_operands_and_counts_two_for_a_multiply_add() -> None:
    found = cost(torch.mm, torch.zeros(10, 20), torch.zeros(20, 5))
    assert found == Cost((Work(2 * 10 * 20 * 5, "float32", 4 * (200 + 100 + 50)),))


def test_operands_of_products_are_written_and_read_again() -> None:
    found = cost(lambda x, w: (x + 1) @ w, SQUARE, SQUARE)
    assert [k.nbytes for k in found.kernels] == [2 * ONE, 3 * ONE]
    assert found.flops == {"float32": 2000}


def test_flops_are_counted_for_each_dtype() -> None:
    def two(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x @ x, y @ y

    found = cost(two, SQUARE, torch.zeros(20, 20, dtype=torch.bfloat16))
    assert found.flops == {"float32": 2000, "bfloat16": 16000}


def test_a_slice_or_a_gather_reads_what_it_takes_and_not_the_table() -> None:
    table, index = torch.zeros(1000, 8), torch.zeros(4, dtype=torch.int64)
    assert cost(lambda w, i: torch.nn.functional.embedding(i, w), table, index).nbytes == 4 * 8 + 2 * (4 * 8 * 4)
    assert cost(lambda w: w[:4] + 1, table).nbytes == 2 * (4 * 8 * 4)


def test_an_own_operator_costs_its_bytes() -> None:
    start = torch.tensor(2)
    found = cost(lambda x, s: ops.narrow(x, 0, s, 5), SQUARE, start)
    assert found == Cost((Work(0, "float32", ONE + 8 + ONE // 2),))


@pytest.mark.parametrize("fused", [True, False])
def test_grouped_attention_does_the_work_of_all_query_heads(fused: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0]

    query, key = torch.zeros(2, 4, 32, 16), torch.zeros(2, 2, 32, 16)
    assert cost(attention, query, query, query, fused=fused).flops == {"float32": 4 * 2 * 4 * 32 * 32 * 16}
    with FakeTensorMode() as mode:
        one, other = (mode.from_tensor(t) for t in (query, key))
    graph = fx.Graph()
    nodes = [graph.placeholder(n) for n in "qkv"]
    for node, value in zip(nodes, (one, other, other), strict=True):
        node.meta["val"] = value
    call = graph.call_function(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, tuple(nodes))
    with mode:
        call.meta["val"] = (torch.empty_like(one), one.new_empty(2, 4, 32))
    graph.output((call,))
    assert graph_cost(graph, fused).flops == {"float32": 4 * 2 * 4 * 32 * 32 * 16}


def test_symbolic_sizes_count_with_their_traced_value() -> None:
    graph = traced(lambda x, w: (x + 1) @ w, torch.zeros(12, 10), SQUARE, symbolic=True)
    assert graph_cost(graph) == cost(lambda x, w: (x + 1) @ w, torch.zeros(12, 10), SQUARE)


@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, False), (torch.bfloat16, True)])
def test_flops_of_a_llama_block_are_the_closed_form(dtype: torch.dtype, recompute: bool) -> None:
    width, inner, heads, size, length = 64, 160, 4, 2, 24
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).train()
    compiled = chunkft_fx.compile(model, "8GB", chunks=1, backend="eager")
    ids = torch.randint(0, 128, (size, length))
    loss_of(compiled(input_ids=ids, labels=ids)).backward()
    block = next(v for v in compiled.variants if _is_block(v))
    if recompute:
        block = compiled._training.sessions[-1].programs.specializer.variant(
            block.template, replace(block.demand, policy=RegionPolicy(recompute=True))
        )
    products = 2 * size * length * (4 * width * width + 3 * width * inner)
    attention = 4 * size * length * length * width
    name = str(dtype).removeprefix("torch.")

    def flops(module: fx.GraphModule | None) -> int:
        assert module is not None
        return graph_cost(module.graph).flops[name]

    assert flops(block.forward) == products + attention
    # Backward: two products for each of forward's, and five for the two of attention, which computes scores again.
    # Recomputing does forward's work but for the last product, whose result only the next block reads.
    last = 2 * size * length * width * inner
    again = products - last + attention if recompute else 0
    assert flops(block.backward) == 2 * products + attention * 5 // 2 + again


def _is_block(variant: Any) -> bool:
    """Whether a region is a block: four projections of attention and three of the layers behind it."""
    return sum(n.target is torch.ops.aten.mm.default for n in variant.forward.graph.nodes) == 7


def test_a_kernel_takes_the_slower_of_arithmetic_and_memory_and_a_launch() -> None:
    assert Work(10**9, "float32", 10**6).us(RATES) == pytest.approx(1000 + 2)
    assert Work(10**6, "float32", 10**9).us(RATES) == pytest.approx(10_000 + 2)
    assert Work(4 * 10**9, "bfloat16", 0).us(RATES) == pytest.approx(1000 + 2)
    assert Work(10**9, "float8_e4m3fn", 0).us(RATES) == pytest.approx(1000 + 2)  # not measured: the slowest
    assert Cost((Work(0, "float32", 0),) * 3).us(RATES) == pytest.approx(6)
    assert Cost(()).us(RATES) == 0


def test_transfers_go_at_the_rate_of_their_direction() -> None:
    assert transfer_us(10**9, RATES, "host_to_device") == pytest.approx(50_000)
    assert transfer_us(10**9, RATES, "device_to_host") == pytest.approx(100_000)
    assert transfer_us(10**9, RATES, "both_ways") == pytest.approx(200_000)
    with pytest.raises(KeyError):
        transfer_us(1, RATES, "sideways")  # type: ignore[arg-type]


@settings(max_examples=30)
@given(
    sizes=st.tuples(*[st.integers(1, 64)] * 3), which=st.integers(0, 2), more=st.integers(1, 32), fused=st.booleans()
)
def test_larger_sizes_never_cost_less(sizes: tuple[int, int, int], which: int, more: int, fused: bool) -> None:
    def layer(x: Tensor, w: Tensor) -> Tensor:
        return torch.relu((x * 2) @ w).sum(0)

    def of(rows: int, inner: int, columns: int) -> Cost:
        return cost(layer, torch.zeros(rows, inner), torch.zeros(inner, columns), fused=fused)

    larger = list(sizes)
    larger[which] += more
    small, large = of(*sizes), of(*larger)
    assert of(*sizes) == small
    assert large.nbytes > small.nbytes
    assert sum(large.flops.values()) > sum(small.flops.values())
    assert large.us(RATES) >= small.us(RATES)
    assert large.launches == small.launches


def test_a_compiled_graph_never_costs_more_than_one_run_node_by_node() -> None:
    def attention(q: Tensor, k: Tensor) -> Tensor:
        return torch.relu(scaled_dot_product_attention(q, k, k) * 2) + q

    q = torch.zeros(2, 4, 16, 8)
    fused, alone = cost(attention, q, q), cost(attention, q, q, fused=False)
    assert fused.nbytes < alone.nbytes
    assert fused.launches < alone.launches
    assert fused.flops == alone.flops
