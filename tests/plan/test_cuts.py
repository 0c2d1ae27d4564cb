"""Cutting parameters into chunks: partition, order, balance, alignment, and where boundaries snap."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from math import prod
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chunkft_fx.errors import ChunkCountError, OptimizerMismatch
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.cuts import ParameterSpec, alignment, cut, cut_dim, max_chunks
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec, require_whole

sizes = st.one_of(st.integers(1, 9), st.sampled_from([16, 63, 64, 100, 255, 256, 300, 512, 1000, 1024, 4096]))
shapes = st.lists(sizes, max_size=4).map(tuple).filter(lambda shape: prod(shape) <= 10**7)


@st.composite
def models(draw: st.DrawFn) -> list[ParameterSpec]:
    """Up to 12 parameters of mixed dtypes, regions in rising order."""
    drawn = draw(st.lists(st.tuples(shapes, st.sampled_from([12, 14, 24]), st.integers(0, 1)), min_size=1, max_size=12))
    specs, region = [], 0
    for i, (shape, nbytes, step) in enumerate(drawn):
        region += step
        specs.append(ParameterSpec(f"p{i}", shape, nbytes, region))
    return specs


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[ParameterSpec], tuple[Chunk, ...]]:
    """A model and a cut of it into any allowed number of chunks up to 40."""
    specs = draw(models())
    return specs, cut(specs, draw(st.integers(1, min(40, max_chunks(specs)))))


def block(region: int, d: int = 1024) -> list[ParameterSpec]:
    """A transformer block: four square projections, two wide ones, and a norm."""
    names = [("q", (d, d)), ("k", (d, d)), ("v", (d, d)), ("o", (d, d)), ("up", (4 * d, d)), ("down", (d, 4 * d))]
    return [ParameterSpec(f"h{region}.{n}", s, 14, region) for n, s in [*names, ("norm", (d,))]]


def index_nbytes(spec: ParameterSpec) -> int:
    return prod(spec.shape) // (spec.shape[cut_dim(spec.shape)] if spec.shape else 1) * spec.nbytes_per_element


@given(cuts())
@settings(max_examples=200)
def test_slices_partition_every_parameter_in_stream_order(case: tuple[list[ParameterSpec], tuple[Chunk, ...]]) -> None:
    specs, chunks = case
    by_name: dict[str, list[Slice]] = defaultdict(list)
    for chunk in chunks:
        assert chunk.slices
        assert len({s.name for s in chunk.slices}) == len(chunk.slices)
        for s in chunk.slices:
            by_name[s.name].append(s)
    for spec in specs:
        size = spec.shape[cut_dim(spec.shape)] if spec.shape else 1
        end = 0
        for s in by_name[spec.name]:
            assert (s.dim, s.size, s.start) == (cut_dim(spec.shape), size, end)
            assert s.length >= 1
            end += s.length
        assert end == size
    order = [s.name for chunk in chunks for s in chunk.slices]
    assert order == sorted(order, key=lambda name: int(name[1:]))


@given(cuts())
@settings(max_examples=100)
def test_chunks_report_their_elements_and_bytes(case: tuple[list[ParameterSpec], tuple[Chunk, ...]]) -> None:
    specs, chunks = case
    known = {s.name: s for s in specs}
    for chunk in chunks:
        assert chunk.nbytes == sum(s.length * index_nbytes(known[s.name]) for s in chunk.slices)
        assert chunk.numel == sum(prod(known[s.name].shape) * s.length // s.size for s in chunk.slices)
    assert sum(c.numel for c in chunks) == sum(prod(s.shape) for s in specs)


@given(cuts())
@settings(max_examples=200)
def test_boundaries_stay_near_equal_shares_of_the_bytes(case: tuple[list[ParameterSpec], tuple[Chunk, ...]]) -> None:
    specs, chunks = case
    total = sum(c.nbytes for c in chunks)
    widest = max(index_nbytes(s) for s in specs)
    mean = total / len(chunks)
    assume(widest * 2 <= mean)  # equal shares do not exist where single indices are coarser than that
    end = 0
    for k, chunk in enumerate(chunks, start=1):
        end += chunk.nbytes
        assert abs(end - mean * k) <= mean / 2 + widest


@given(cuts())
@settings(max_examples=200)
def test_inner_boundaries_of_large_tensors_are_aligned(case: tuple[list[ParameterSpec], tuple[Chunk, ...]]) -> None:
    specs, chunks = case
    known = {s.name: s for s in specs}
    mean = sum(c.nbytes for c in chunks) / len(chunks)
    assume(max(index_nbytes(s) for s in specs) * 4 <= mean)  # else coarse indices may push boundaries along
    for chunk in chunks:
        first = chunk.slices[0]
        spec = known[first.name]
        if first.size >= 256 and 64 * index_nbytes(spec) <= mean / 2:
            assert first.start % 64 == 0


@given(models(), st.integers(1, 12))
@settings(max_examples=50)
def test_cutting_is_deterministic(specs: list[ParameterSpec], chunks: int) -> None:
    chunks = min(chunks, max_chunks(specs))
    assert cut(list(specs), chunks) == cut(tuple(specs), chunks)


@given(models())
@settings(max_examples=50)
def test_one_chunk_is_the_whole_model(specs: list[ParameterSpec]) -> None:
    (chunk,) = cut(specs, 1)
    assert [s.name for s in chunk.slices] == [s.name for s in specs]
    assert all(s.is_whole for s in chunk.slices)


@given(st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=5))
def test_the_finest_cut_has_one_index_per_chunk(tiny: list[tuple[int, ...]]) -> None:
    specs = [ParameterSpec(f"p{i}", shape, 12, 0) for i, shape in enumerate(tiny)]
    chunks = cut(specs, max_chunks(specs))
    assert all(len(c.slices) == 1 and c.slices[0].length == 1 for c in chunks)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((), 0),
        ((7,), 0),
        ((4096, 1024), 0),
        ((64, 4096), 0),
        ((63, 4096), 1),
        ((8, 3), 0),
        ((1, 197, 768), 2),
        ((1, 1, 64), 2),
        ((2, 9, 9), 1),
        ((8, 256, 3, 3), 0),
        ((1, 16, 3, 3), 1),
    ],
)
def test_cut_dim_depends_on_the_shape_alone(shape: tuple[int, ...], dim: int) -> None:
    assert cut_dim(shape) == dim


@pytest.mark.parametrize(
    ("shape", "dim", "expected"), [((), 0, 1), ((255, 9), 0, 1), ((256, 9), 0, 64), ((9, 300), 1, 64), ((9, 300), 0, 1)]
)
def test_alignment_is_asked_of_large_dimensions(shape: tuple[int, ...], dim: int, expected: int) -> None:
    assert alignment(shape, dim) == expected


def test_boundaries_snap_to_region_borders() -> None:
    specs = [s for r in range(8) for s in block(r)] + [ParameterSpec("head", (1024, 1024), 14, 8)]
    chunks = cut(specs, 8)
    assert [c.slices[0].name for c in chunks] == [f"h{r}.q" for r in range(8)]
    assert all(s.is_whole for c in chunks for s in c.slices)


def test_boundaries_snap_to_tensor_borders_inside_a_region() -> None:
    specs = [ParameterSpec(f"w{i}", (1000 + i, 64), 14, 0) for i in range(6)]
    assert [c.slices[0].name for c in cut(specs, 3)] == ["w0", "w2", "w4"]
    assert all(s.is_whole for c in cut(specs, 3) for s in c.slices)


def test_inner_boundaries_snap_to_common_fractions() -> None:
    # Halves of the stream fall 10 rows behind the middle of the second tensor: eighths are nearer than 1/16 chunk.
    specs = [ParameterSpec("a", (20,), 14 * 1024, 0), ParameterSpec("b", (4096, 1024), 14, 0)]
    first, second = cut(specs, 2)
    assert second.slices == (Slice("b", 0, 2048, 2048, 4096),)
    assert first.slices == (Slice("a", 0, 0, 20, 20), Slice("b", 0, 0, 2048, 4096))


def test_far_from_any_fraction_the_nearest_aligned_index_is_taken() -> None:
    starts = [c.slices[0].start for c in cut([ParameterSpec("w", (4096, 64), 14, 0)], 7)]
    assert starts == [round(4096 * k / 7 / 64) * 64 for k in range(7)]


def test_more_chunks_than_tiles_cut_at_any_index() -> None:
    starts = [c.slices[0].start for c in cut([ParameterSpec("w", (256, 8), 14, 0)], 64)]
    assert starts == [4 * k for k in range(64)]


def test_few_distinct_lengths_over_equal_blocks() -> None:
    specs = [s for r in range(16) for s in block(r)]
    for count in (16, 32, 64):
        demands = {tuple((s.name.split(".")[1], s.length) for s in c.slices) for c in cut(specs, count)}
        assert len(demands) <= 2 * count // 16


def test_parameters_without_elements_have_no_slice() -> None:
    specs = [ParameterSpec("empty", (0, 3), 14, 0), ParameterSpec("w", (4, 3), 14, 0)]
    assert max_chunks(specs) == 4
    assert [s.name for c in cut(specs, 2) for s in c.slices] == ["w", "w"]


@pytest.mark.parametrize("bad", [0, -3, 6, 10**9, True, 2.0, "3", None])
def test_other_numbers_of_chunks_are_refused_with_the_limit(bad: Any) -> None:
    with pytest.raises(ChunkCountError, match=rf"chunks={bad!r}.*\b5\b"):
        cut([ParameterSpec("w", (4, 3), 14, 0), ParameterSpec("b", (), 14, 0)], bad)


@given(models(), st.data())
def test_parameters_that_are_whole_are_never_cut(specs: list[ParameterSpec], data: st.DataObject) -> None:
    whole = [replace(s, is_whole=data.draw(st.booleans())) for s in specs]
    chunks = cut(whole, data.draw(st.integers(1, min(40, max_chunks(whole)))))
    slices = [s for c in chunks for s in c.slices]
    for spec in whole:
        mine = [s for s in slices if s.name == spec.name]
        assert sum(s.length for s in mine) == sum(s.size for s in mine[:1])
        if spec.is_whole and mine:
            (one,) = mine
            assert (one.start, one.length, one.size) == (0, one.size, spec.shape[one.dim] if spec.shape else 1)
    assert sum(c.numel for c in chunks) == sum(prod(s.shape) for s in whole)
    assert sum(c.nbytes for c in chunks) == sum(prod(s.shape) * s.nbytes_per_element for s in whole)


def test_a_slice_of_a_parameter_that_must_be_whole_is_refused() -> None:
    spec = StateSpec("Factored", (), is_whole=True)
    (first, _) = cut([ParameterSpec("w", (64, 3), 14, 0)], 2)
    with pytest.raises(OptimizerMismatch, match="holds 32 of the 64 indices of 'w'"):
        require_whole(first.slices, spec)
    require_whole(first.slices, ASSUMED)
    (whole,) = cut([ParameterSpec("w", (64, 3), 14, 0)], 1)
    require_whole(whole.slices, spec)
