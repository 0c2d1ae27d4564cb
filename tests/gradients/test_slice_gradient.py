"""Slice gradients: what they can do is what the dense gradient does in the slice; what they cannot do, they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.errors import SliceGradientError
from chunkft_fx.gradients.slice_gradient import SliceGradient, cut_from, part_of
from chunkft_fx.plan.chunk import Slice

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Case = tuple[Slice, tuple[int, ...], torch.dtype, int]

# f(gradient, other, number), where other has the parameter's shape. Zero stays zero in these.
ELEMENTWISE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "abs": lambda g, o, x: g.abs(),
    "neg": lambda g, o, x: -g,
    "sign": lambda g, o, x: g.sign(),
    "square": lambda g, o, x: g.square(),
    "sqrt": lambda g, o, x: g.abs().sqrt(),
    "power": lambda g, o, x: g**3,
    "clamp": lambda g, o, x: g.clamp(-0.5, 0.25),
    "clamp_from_below": lambda g, o, x: torch.clamp(g, min=0),
    "times_number": lambda g, o, x: x * g,
    "times_scalar": lambda g, o, x: g * torch.tensor(x),
    "over_number": lambda g, o, x: g / x,
    "over_scalar": lambda g, o, x: torch.div(g, torch.tensor(x)),
    "nan_to_num": lambda g, o, x: g.nan_to_num(0.0),
    "zeros_like": lambda g, o, x: torch.zeros_like(g),
    "empty_like": lambda g, o, x: torch.empty_like(g).zero_(),
    "clone": lambda g, o, x: g.clone(),
    "detach": lambda g, o, x: g.detach(),
    "double": lambda g, o, x: g.double(),
    "half": lambda g, o, x: g.half(),
    "times_whole": lambda g, o, x: g * o,
    "whole_times": lambda g, o, x: o * g,
    "over_whole": lambda g, o, x: g / (o.abs() + 1),
    "sum_of_two": lambda g, o, x: torch.add(g, g.clone(), alpha=3),
    "difference_of_two": lambda g, o, x: g - g.clone() / 2,
}
# Of these the slice alone has a meaning.
WITH_WHOLE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "plus_whole": lambda g, o, x: g + o,
    "whole_plus": lambda g, o, x: o + g,
    "minus_whole": lambda g, o, x: torch.sub(g, o, alpha=2),
    "is_equal": lambda g, o, x: g == 0,
    "is_unequal": lambda g, o, x: g != o,
    "is_less": lambda g, o, x: g < o,
    "is_at_most": lambda g, o, x: g <= x,
    "is_more": lambda g, o, x: g > 0.5,
    "is_at_least": lambda g, o, x: g >= o,
    "is_finite": lambda g, o, x: g.isfinite(),
    "is_nan": lambda g, o, x: g.isnan(),
    "is_infinite": lambda g, o, x: g.isinf(),
}
IN_PLACE: dict[str, Callable[[Tensor, Tensor, float], Any]] = {
    "abs_": lambda g, o, x: g.abs_(),
    "neg_": lambda g, o, x: g.neg_(),
    "sqrt_": lambda g, o, x: g.abs_().sqrt_(),
    "pow_": lambda g, o, x: g.pow_(2),
    "clamp_": lambda g, o, x: g.clamp_(-0.5, 0.25),
    "mul_": lambda g, o, x: g.mul_(x),
    "mul_whole": lambda g, o, x: g.mul_(o),
    "mul_scalar": lambda g, o, x: g.mul_(torch.tensor(x)),
    "div_": lambda g, o, x: g.div_(x),
    "add_": lambda g, o, x: g.add_(o, alpha=3),
    "sub_": lambda g, o, x: g.sub_(o),
    "nan_to_num_": lambda g, o, x: g.nan_to_num_(),
    "zero_": lambda g, o, x: g.zero_(),
    "copy_": lambda g, o, x: g.copy_(o),
    "operator": lambda g, o, x: g.__imul__(x),
}
REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda g: g.norm(),
    "norm_1": lambda g: g.norm(1),
    "norm_inf": lambda g: torch.linalg.vector_norm(g, float("inf")),
    "norm_wide": lambda g: torch.linalg.vector_norm(g, 2, dtype=torch.float64),
    "sum": lambda g: g.sum(),
    "sum_wide": lambda g: g.sum(dtype=torch.float64),
    "count_nonzero": lambda g: g.count_nonzero(),
    "any": lambda g: (g > 0.5).any(),
    "not_all": lambda g: g.isfinite().all(),
    "largest": lambda g: g.abs().max(),
    "equal": lambda g: torch.equal(g, g.clone()),
}
REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "plus_number": lambda g, o: g + 1,
    "number_minus": lambda g, o: 1 - g,
    "plus_scalar": lambda g, o: g + torch.tensor(1.0),
    "add_number": lambda g, o: g.add_(1),
    "sub_number": lambda g, o: g.sub_(1),
    "fill": lambda g, o: g.fill_(1),
    "copy_number": lambda g, o: g.copy_(torch.tensor(1.0)),
    "noise": lambda g, o: g.normal_(),
    "exp": lambda g, o: g.exp(),
    "round": lambda g, o: g.round(),
    "rsqrt": lambda g, o: g.rsqrt(),
    "reciprocal": lambda g, o: 1 / g,
    "power_0": lambda g, o: g**0,
    "power_below_0": lambda g, o: g**-1,
    "power_of": lambda g, o: 2**g,
    "clamp_above_0": lambda g, o: g.clamp(min=0.1),
    "clamp_below_0": lambda g, o: g.clamp_(max=-0.1),
    "clamp_by_tensor": lambda g, o: g.clamp(max=o),
    "broadcast": lambda g, o: g * torch.ones(3),
    "whole_over": lambda g, o: o / g,
    "whole_minus": lambda g, o: o - g,
    "mul_into_whole": lambda g, o: o.mul_(g),
    "copy_into_whole": lambda g, o: o.copy_(g),
    "maximum": lambda g, o: torch.maximum(g, o),
    "where": lambda g, o: torch.where(g > 0, g, o),
    "masked_fill": lambda g, o: g.masked_fill_(g > 0, 0),
    "lerp": lambda g, o: g.lerp_(o, 0.5),
    "addcmul": lambda g, o: g.addcmul_(o, o),
    "sum_along": lambda g, o: g.sum(0),
    "norm_along": lambda g, o: g.norm(dim=0),
    "vector_norm_along": lambda g, o: torch.linalg.vector_norm(g, dim=1),
    "max_along": lambda g, o: g.max(0),
    "max_along_named": lambda g, o: g.max(dim=0),
    "min_along": lambda g, o: g.min(1),
    "all_along": lambda g, o: g.isfinite().all(0),
    "any_along": lambda g, o: g.isnan().any(dim=0),
    "count_along": lambda g, o: g.count_nonzero(0),
    "mean": lambda g, o: g.mean(),
    "std": lambda g, o: g.std(),
    "argmax": lambda g, o: g.argmax(),
    "product": lambda g, o: g.prod(),
    "view": lambda g, o: g.reshape(-1),
    "transpose": lambda g, o: g.t(),
    "index": lambda g, o: g[0],
    "set_index": lambda g, o: g.__setitem__(0, 1.0),
    "iterate": lambda g, o: list(g),
    "cat": lambda g, o: torch.cat([g, g]),
    "stack": lambda g, o: torch.stack([g, g]),
    "product_left": lambda g, o: g @ o.t(),
    "product_right": lambda g, o: o.t() @ g,
    "sort": lambda g, o: g.sort(),
    "ones_like": lambda g, o: torch.ones_like(g),
    "new_zeros": lambda g, o: g.new_zeros(3),
    "list_plus": lambda g, o: torch._foreach_add_([g], 1.0),
    "list_by_list": lambda g, o: torch._foreach_mul_([g], [o]),
    "list_by_gradients": lambda g, o: torch._foreach_mul_([o], [g]),
    "list_clamp_above_0": lambda g, o: torch._foreach_clamp_min_([g], 0.5),
    "list_clamp_below_0": lambda g, o: torch._foreach_clamp_max_([g], [-0.5]),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A slice that is not the whole of a parameter of one to three dimensions, a dtype and a seed."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    shape = (*shape[:dim], draw(st.integers(2, 6)), *shape[dim + 1 :])
    start = draw(st.integers(0, shape[dim] - 1))
    length = draw(st.integers(1, shape[dim] - start - (start == 0)))
    return Slice("w", dim, start, length, shape[dim]), shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))


def pair(case: Case) -> tuple[SliceGradient, Tensor, Tensor]:
    """A slice gradient, the same as a dense tensor with zeros outside of the slice, and another dense tensor."""
    part, shape, dtype, seed = case
    generator = torch.Generator().manual_seed(seed)
    dense, other = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    values = cut_from(dense, part).clone()
    dense.zero_()
    cut_from(dense, part).copy_(values)
    return SliceGradient(values, part, shape), dense, other


def example() -> tuple[SliceGradient, Tensor, Tensor]:
    return pair((Slice("w", 0, 1, 2, 5), (5, 3), torch.float32, 0))


def assert_is_slice_of(result: Any, dense: Tensor, part: Slice) -> None:
    assert isinstance(result, SliceGradient)
    assert (result.slice, result.shape, result.dtype, result.device) == (part, dense.shape, dense.dtype, dense.device)
    torch.testing.assert_close(result.part, cut_from(dense, part), equal_nan=True)


@settings(max_examples=25)
@given(cases(), st.floats(0.125, 8, width=16))
def test_what_is_done_element_by_element_is_done_in_the_slice(case: Case, x: float) -> None:
    gradient, dense, other = pair(case)
    for name, f in ELEMENTWISE.items():
        expected = f(dense.clone(), other, x)
        assert_is_slice_of(f(gradient, other, x), expected, case[0])
        cut_from(expected, case[0]).zero_()
        assert not expected.any(), f"{name} makes a gradient of none"
    for f in WITH_WHOLE.values():
        assert_is_slice_of(f(gradient, other, x), f(dense, other, x), case[0])


@settings(max_examples=25)
@given(cases(), st.floats(0.125, 8, width=16))
def test_what_is_done_in_place_changes_the_memory_of_the_slice(case: Case, x: float) -> None:
    for f in IN_PLACE.values():
        gradient, dense, other = pair(case)
        part, before = gradient.part, other.clone()
        assert f(gradient, other, x) is gradient
        f(dense, other, x)
        assert gradient.part is part
        assert_is_slice_of(gradient, dense, case[0])
        assert torch.equal(other, before)


@settings(max_examples=25)
@given(cases())
def test_what_makes_one_number_makes_that_of_the_dense_gradient(case: Case) -> None:
    gradient, dense, _ = pair(case)
    for f in REDUCTIONS.values():
        result, expected = f(gradient), f(dense)
        assert not isinstance(result, SliceGradient)
        torch.testing.assert_close(result, expected)


@settings(max_examples=25)
@given(cases())
def test_a_whole_tensor_takes_its_slice(case: Case) -> None:
    gradient, dense, other = pair(case)
    into: list[Callable[[Tensor, Tensor], Tensor]] = [lambda t, g: t.add_(g, alpha=2), lambda t, g: t.sub_(g)]
    for f in into:
        sums = [f(other.clone(), g) for g in (gradient, dense)]
        torch.testing.assert_close(*sums)
        assert type(sums[0]) is Tensor


@settings(max_examples=25)
@given(cases(), cases())
def test_lists_hold_gradients_of_any_slices(first: Case, second: Case) -> None:
    second = (second[0], second[1], first[2], second[3])
    ours, dense = ([pair(c)[i] for c in (first, second)] for i in (0, 1))
    torch.testing.assert_close(torch._foreach_norm(ours), torch._foreach_norm(dense))
    for gradients in (ours, dense):
        torch._foreach_mul_(gradients, torch.tensor(0.5))
        torch._foreach_mul_(gradients, [3.0, -1.0])
        torch._foreach_clamp_min_(gradients, -1.5)
        torch._foreach_clamp_max_(gradients, [0.25, 0.0])
    for g, d, c in zip(ours, dense, (first, second), strict=True):
        assert_is_slice_of(g, d, c[0])
    if first[2] in (torch.float32, torch.float64):
        found = torch.zeros(())
        torch._amp_foreach_non_finite_check_and_unscale_(ours, found, torch.tensor(4.0))
        assert not found
        for g, d, c in zip(ours, dense, (first, second), strict=True):
            assert_is_slice_of(g, d * 4, c[0])
        last = ours[1]
        assert isinstance(last, SliceGradient)
        last.part.flatten()[0] = float("inf")
        torch._amp_foreach_non_finite_check_and_unscale_(ours, found, torch.tensor(1.0))
        assert found
    torch._foreach_zero_(ours)
    assert not any(g.part.any() for g in ours if isinstance(g, SliceGradient))


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_and_changes_nothing(name: str) -> None:
    gradient, _, other = example()
    before, whole = gradient.part.clone(), other.clone()
    with pytest.raises(SliceGradientError, match=r"'w' \(1 to 3 of 5 along dimension 0\).*active_slices"):
        REFUSED[name](gradient, other)
    assert torch.equal(gradient.part, before)
    assert torch.equal(other, whole)


def test_gradients_of_different_slices_do_not_mix() -> None:
    gradient, _, _ = example()
    for other in (
        SliceGradient(torch.ones(2, 3), Slice("w", 0, 2, 2, 5), (5, 3)),
        SliceGradient(torch.ones(2, 3), Slice("v", 0, 1, 2, 5), (5, 3)),
    ):
        with pytest.raises(SliceGradientError, match="different slices"):
            gradient.add_(other)


def test_part_of_finds_what_belongs_to_a_slice() -> None:
    gradient, dense, _ = example()
    assert part_of(None, gradient.slice) is None
    assert part_of(gradient, gradient.slice) is gradient.part
    assert part_of(gradient, Slice("w", 0, 2, 2, 5)) is None
    part = part_of(dense, gradient.slice)
    assert part is not None
    assert part.data_ptr() == dense[1].data_ptr()


@settings(max_examples=20)
@given(cases())
def test_copies_and_pickles_keep_slice_and_values_and_share_nothing(case: Case) -> None:
    gradient, dense, _ = pair(case)
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(gradient),
        gradient.clone(),
        pickle.loads(pickle.dumps(gradient)),
        torch.load(file, weights_only=False),
    ):
        assert_is_slice_of(copied, dense, case[0])
        copied.zero_()
        assert_is_slice_of(gradient, dense, case[0])
    assert copy.copy(gradient).part.data_ptr() == gradient.part.data_ptr()


def test_its_text_tells_slice_and_values() -> None:
    text = repr(example()[0])
    assert text.startswith("SliceGradient('w' (1 to 3 of 5 along dimension 0), tensor([[")
    assert f"{example()[0]}" == str(example()[0]) == text


@pytest.mark.parametrize("wide", DTYPES)
def test_a_new_gradient_is_widened_and_copied_once_it_is_kept(wide: torch.dtype) -> None:
    values = torch.randn(2, 3).to(torch.bfloat16)
    part = Slice("w", 0, 1, 2, 5)
    new = SliceGradient(values, part, (5, 3), wide, is_new=True)
    kept = new.detach()
    assert isinstance(kept, SliceGradient)
    assert (kept.dtype, kept.is_new) == (wide, False)
    assert torch.equal(kept.part, values.to(wide))
    assert kept.part.data_ptr() != values.data_ptr()
    assert kept.detach().part.data_ptr() == kept.part.data_ptr()  # type: ignore[attr-defined]
    kept.add_(new)
    assert torch.equal(kept.part, values.to(wide) + values)
    whole = SliceGradient(values, Slice("w", 0, 0, 2, 2), (2, 3), wide, is_new=True).detach()
    assert type(whole) is Tensor
    assert torch.equal(whole, values.to(wide))


def test_a_new_gradient_changed_in_place_stays_changed() -> None:
    """A hook gets it before its parameter does, and `torch.autograd.grad` returns it."""
    new = SliceGradient(torch.ones(2, 3, dtype=torch.bfloat16), Slice("w", 0, 1, 2, 5), (5, 3), torch.float32, True)
    new.mul_(0.5)
    torch._foreach_mul_([new], 0.5)
    kept = new.detach()
    assert isinstance(kept, SliceGradient)
    assert kept.part.tolist() == new.part.tolist() == [[0.25] * 3] * 2


@pytest.mark.parametrize("name", ["mean", "sum_along", "view", "index", "exp", "plus_number", "product_left", "where"])
def test_of_a_whole_parameter_everything_can_be_computed(name: str) -> None:
    _, dense, other = example()
    new = SliceGradient(dense.bfloat16(), Slice("w", 0, 0, 5, 5), (5, 3), torch.float32, is_new=True)
    result = REFUSED[name](new, other)
    assert type(result) is Tensor
    torch.testing.assert_close(result, REFUSED[name](dense.bfloat16().float(), other))
    assert new.fill_(2.0) is new
    assert torch.equal(new.detach(), torch.full((5, 3), 2.0))
