"""Sliced weight gradients become one operator where it is chosen, and stay as they are everywhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chunkft_fx import passes
from chunkft_fx.errors import OptionError, VerificationError
from chunkft_fx.graph.ops import narrow
from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.kernels.weight_gradient import LIBRARY, TILINGS, Problem, compute, weight_gradient, workspace
from chunkft_fx.passes.region.eliminate import Eliminate
from chunkft_fx.passes.region.lower_triton import problems
from chunkft_fx.predict.region.memory import allocated_peak
from chunkft_fx.predict.region.time import graph_cost
from chunkft_fx.program.run_passes import over_region
from tests.passes.joint import Asked, Joint, count, joint, rewritten

aten = torch.ops.aten

# Two layers of a batch of 2 x 7 tokens; no size appears twice.
BATCH, HIDDEN, INNER, OUT = (2, 7), 10, 12, 9


def layers(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The gradient of ``x`` makes both products with the weights read their tangent whole."""
    return functional.linear(torch.tanh(functional.linear(x.sin(), first)), second)


def case(dtype: torch.dtype = torch.float64, inductor: bool = True, function: Callable[..., Tensor] = layers) -> Joint:
    sizes = ((*BATCH, HIDDEN), (INNER, HIDDEN), (OUT, INNER))
    return joint(function, [torch.randn(s).to(dtype) for s in sizes], inductor=inductor)


def lowered(region: RegionGraph, by: str = LIBRARY) -> int:
    """Choose the operator for all problems; returns how many products were replaced."""
    choices = frozenset((p, by) for p in problems(region))
    return over_region(region, passes.lowering_pipeline(choices))["lower_triton"]


def assert_gradients(made: Joint, region: RegionGraph, asked: Sequence[Asked], tolerance: float = 1e-9) -> None:
    """Against autograd, in the wide dtype if a slice is asked for."""
    found = made.run(region, [a[1] for a in asked if isinstance(a, tuple)])[1:]
    for dense, value, cut in zip(made.dense(), found, asked, strict=True):
        if cut is None:
            assert value is None
            continue
        expected = dense.narrow(*cut) if isinstance(cut, tuple) else dense
        wide = torch.promote_types(expected.dtype, torch.float32) if isinstance(cut, tuple) else expected.dtype
        assert value.dtype == wide and value.shape == expected.shape
        torch.testing.assert_close(value, expected.to(wide), rtol=0, atol=tolerance * float(dense.abs().max()))


def cuts(sizes: tuple[int, int]) -> st.SearchStrategy[Asked]:
    inside = [
        (dim, start, length) for dim in (0, 1) for length in (1, 3, 5) for start in range(sizes[dim] - length + 1)
    ]
    return st.sampled_from(inside)


@settings(max_examples=25)
@given(
    first=st.one_of(st.none(), cuts((INNER, HIDDEN))),
    second=st.one_of(st.none(), cuts((OUT, INNER))),
    by=st.sampled_from([LIBRARY, *TILINGS]),
    inductor=st.booleans(),
)
def test_any_slices_equal_autograd(first: Asked, second: Asked, by: str, inductor: bool) -> None:
    made = case(inductor=inductor)
    asked = ["whole", first, second]
    region = rewritten(made, *asked)
    number = sum(a is not None for a in (first, second))
    assert lowered(region, by) == number
    assert count(region, weight_gradient) == number
    assert count(region, narrow) == 0
    assert_gradients(made, region, asked)


def test_a_problem_is_the_product_and_its_cut() -> None:
    region = rewritten(case(), "whole", (0, 2, 4), (1, 1, 3))
    # autograd transposes the product of a weight that comes first
    assert {(p.tokens, *sorted((p.rows, p.columns)), p.dtype) for p in problems(region)} == {
        (14, 4, HIDDEN, torch.float64),
        (14, 3, OUT, torch.float64),
    }
    assert all((p.rows, p.columns)[p.dim] in (3, 4) for p in problems(region))


def test_only_chosen_problems_are_replaced() -> None:
    made = case()
    asked: list[Asked] = ["whole", (0, 2, 4), (1, 1, 3)]
    region = rewritten(made, *asked)
    assert over_region(region, passes.lowering_pipeline(frozenset()))["lower_triton"] == 0
    chosen = frozenset((p, "128x256") for p in problems(region) if 4 in (p.rows, p.columns))
    assert over_region(region, passes.lowering_pipeline(chosen))["lower_triton"] == 1
    (node,) = region.graph.find_nodes(op="call_function", target=weight_gradient)
    assert node.args[-2:] == (4, "128x256")
    assert count(region, narrow) == 1
    assert_gradients(made, region, asked)


def test_low_precision_is_not_rounded_on_the_way_out() -> None:
    """The slice is that of float32 operands; everything above is rounded as before."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight)

    made = joint(function, [torch.randn(*BATCH, HIDDEN).bfloat16(), torch.randn(INNER, HIDDEN).bfloat16()])
    region = rewritten(made, "whole", (0, 2, 4))
    assert lowered(region) == 1
    _, _, found = made.run(region, [2])
    x, dy = made.primals[0].flatten(0, 1), made.tangent.flatten(0, 1)
    torch.testing.assert_close(found, (dy.float().t() @ x.float())[2:6], rtol=1e-6, atol=1e-6)
    assert found.dtype == torch.float32


def test_other_passes_may_not_widen_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    region = rewritten(case(torch.float32), "whole", (0, 2, 4), None)
    monkeypatch.setattr(passes.LowerTriton, "widens_gradients", False)
    assert lowered(region) == 1  # float32 is wide already

    low = rewritten(case(torch.bfloat16), "whole", (0, 2, 4), None)
    choices = frozenset((p, LIBRARY) for p in problems(low))
    with pytest.raises(VerificationError, match="output 2 was"):
        over_region(low, (passes.LowerTriton(choices, widens_gradients=False), Eliminate()))


def stays(region: RegionGraph, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="chunkft_fx.passes"):
        assert problems(region) == frozenset()
    assert reason in caplog.text
    assert count(region, narrow) > 0


def test_refuses_symbolic_sizes(caplog: pytest.LogCaptureFixture) -> None:
    weights = [torch.randn(*BATCH, HIDDEN).double(), torch.randn(INNER, HIDDEN).double()]
    made = joint(lambda x, w: functional.linear(x.sin(), w), weights, dynamic={0: [1]}, inductor=True)
    stays(rewritten(made, "whole", (0, 2, 4)), "symbolic", caplog)


def test_refuses_a_slice_that_is_read_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    """It is an output too: its copy is made anyway."""
    made = case()
    region = rewritten(made, "whole", (0, 2, 4), None)
    (cut,) = region.graph.find_nodes(op="call_function", target=narrow)
    region.set_outputs((*region.outputs[:-1], cut))
    stays(region, "read by something else", caplog)


def test_refuses_a_gradient_that_is_added_to_another(caplog: pytest.LogCaptureFixture) -> None:
    """One weight in two layers."""
    made = joint(
        lambda x, w: functional.linear(torch.tanh(functional.linear(x.sin(), w)), w),
        [torch.randn(*BATCH, HIDDEN).double(), torch.randn(HIDDEN, HIDDEN).double()],
        inductor=True,
    )
    stays(rewritten(made, "whole", (0, 2, 4)), "not an output itself", caplog)


def test_the_tangent_is_cut_below_a_view() -> None:
    """Nothing else needs the tangent as a matrix: the slice has moved below the view, and the whole is viewed again."""
    made = joint(functional.linear, [torch.randn(*BATCH, HIDDEN).double(), torch.randn(INNER, HIDDEN).double()])
    region = rewritten(made, None, (0, 2, 4))
    (cut,) = region.graph.find_nodes(op="call_function", target=narrow)
    assert cut.meta["val"].shape == (*BATCH, 4)
    assert lowered(region) == 1
    assert_gradients(made, region, [None, (0, 2, 4)])


def test_refuses_a_view_of_what_is_not_contiguous(caplog: pytest.LogCaptureFixture) -> None:
    """The slice of a transposed tangent can be viewed as a matrix, the whole of it would be copied."""
    made = joint(functional.linear, [torch.randn(*BATCH, HIDDEN).double(), torch.randn(INNER, HIDDEN).double()])
    region = rewritten(made, None, (0, 2, 4))
    (tangent,) = region.placeholders("tangent")
    tangent.meta["val"] = tangent.meta["val"].transpose(0, 1).contiguous().transpose(0, 1)
    stays(region, "would copy it", caplog)


def test_ignores_whole_gradients_and_slices_of_other_operators() -> None:
    region = rewritten(case(), "whole", "whole", None)
    assert problems(region) == frozenset()
    made = joint(lambda x, w: x * w, [torch.randn(7, HIDDEN).double(), torch.randn(HIDDEN).double()])
    region = rewritten(made, None, (0, 2, 4))
    assert problems(region) == frozenset()


def test_memory_and_cost_count_the_operator() -> None:
    region = rewritten(case(torch.float32), "whole", (0, 2, 4), None)
    before = graph_cost(region.graph).flops
    assert lowered(region) == 1
    assert graph_cost(region.graph).flops == before
    (node,) = region.graph.find_nodes(op="call_function", target=weight_gradient)
    assert workspace(node) == 0
    assert allocated_peak(region.graph) > 0

    low = rewritten(case(torch.bfloat16), "whole", (0, 2, 4), None)
    lowered(low)
    (node,) = low.graph.find_nodes(op="call_function", target=weight_gradient)
    assert workspace(node) == 14 * (4 + HIDDEN) * 4  # the CPU widens both operands


@pytest.mark.parametrize(
    ("dy", "x", "dim", "by", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 5), 0, LIBRARY, "a row for each token"),
        (torch.zeros(3, 4), torch.zeros(3, 5).double(), 0, LIBRARY, "of one dtype"),
        (torch.zeros(3), torch.zeros(3, 5), 0, LIBRARY, "matrices"),
        (torch.zeros(3, 4), torch.zeros(3, 5), 2, LIBRARY, "dim is 2"),
        (torch.zeros(3, 4), torch.zeros(3, 5), 0, "64x64", "choose one of library"),
    ],
)
def test_operands_that_do_not_match_are_refused(dy: Tensor, x: Tensor, dim: int, by: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compute(dy, x, torch.tensor(0), dim, 2, by)


def test_splits_occupy_all_multiprocessors_and_leave_enough_tokens() -> None:
    tiling = TILINGS["128x256"]
    assert tiling.splits(8192, 256, 4096, 132) == 4
    assert tiling.splits(8192, 1024, 4096, 132) == 1
    assert tiling.splits(1024, 256, 4096, 132) == 2
    assert tiling.splits(100, 1, 1, 132) == 1
    assert Problem(1, 2, 3, 0, torch.bfloat16) != Problem(1, 2, 3, 1, torch.bfloat16)
