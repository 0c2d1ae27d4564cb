"""Decides which of a sweep's steps have to be looked at, so that none of them needs more than is known.

Chunks that demand the same of equal regions are of one *kind*, and of a kind the one that lies lowest needs most: its
backward is the deepest, and all that the others keep for it is kept by it too. A sweep has up to hundreds of kinds, and
each has variants of its own, which take a tenth of a second to make. So kinds that lie in equal regions are first
*joined*: a chunk that demands all that any of them does needs no less than each. Only where that is more than
what is known to be needed anyway are they looked at in smaller groups, down to single ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chunkft_fx.capture.outline import Region
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.policy import Policy, RegionPolicy
from chunkft_fx.predict.step_memory import Moment


@dataclass(frozen=True, order=True)
class Part:
    """A slice in a region, so many regions above the chunk's lowest, of the parameter at one place of its inputs."""

    above: int
    place: int
    dim: int
    length: int
    size: int


@dataclass(frozen=True)
class Where:
    """A region that slices lie in: how far above the chunk's lowest, its template, and what is decided for it."""

    above: int
    template: int
    policy: RegionPolicy


@dataclass(frozen=True)
class Kind:
    """What a chunk demands, and where, seen from its lowest region."""

    regions: tuple[Where, ...]
    parts: tuple[Part, ...]

    @property
    def order(self) -> tuple[tuple[tuple[int, int], ...], tuple[Part, ...]]:
        """Puts kinds side by side that have slices of the same parameters."""
        return tuple((p.above, p.place) for p in self.parts), self.parts


@dataclass(frozen=True)
class Example:
    """The chunk of a kind that lies lowest."""

    kind: Kind
    lowest: int
    chunk: Chunk


class _Partial(Slice):
    """A slice that is cut out of the gradient even if it is as long as that."""

    @property
    def is_whole(self) -> bool:
        return False


class Kinds:
    """The kinds of chunks of a model of these regions; ``parameters`` are the names of those primals that are some."""

    def __init__(self, regions: Sequence[Region], parameters: Mapping[str, str]) -> None:
        self._templates = [r.template.index for r in regions]
        self._names = [{k: parameters[p] for k, p in enumerate(r.primals) if p in parameters} for r in regions]
        self._places: dict[str, list[tuple[int, int]]] = {}
        for i, names in enumerate(self._names):
            for place, name in names.items():
                self._places.setdefault(name, []).append((i, place))

    def examples(self, chunks: Sequence[Chunk], policy: Policy) -> list[Example]:
        """For each kind the chunk that lies lowest, in the order of the chunks."""
        found: dict[Kind, Example] = {}
        for chunk in chunks:
            example = self._example(chunk, policy)
            other = found.get(example.kind)
            if other is None or example.lowest < other.lowest:
                found[example.kind] = example
        return list(found.values())

    def _example(self, chunk: Chunk, policy: Policy) -> Example:
        used = [(i, place, s) for s in chunk.slices for i, place in self._places.get(s.name, ())]
        lowest = min((i for i, _, _ in used), default=len(self._names))
        regions = (
            Where(i - lowest, self._templates[i], policy.of_region(i, has_head=False))
            for i in sorted({i for i, _, _ in used})
        )
        parts = sorted(Part(i - lowest, place, s.dim, s.length, s.size) for i, place, s in used)
        return Example(Kind(tuple(regions), tuple(parts)), lowest, chunk)

    def joined(self, examples: Sequence[Example]) -> Chunk:
        """A chunk, of no sweep, that demands of the lowest regions of these whatever any of them demands.

        Their kinds lie in equal regions. What some demand whole and others in part is demanded as a part of full
        length: that needs what the whole does, and to cut it.
        """
        lowest = min(e.lowest for e in examples)
        slices: dict[str, Slice] = {}
        for part in (p for e in examples for p in e.kind.parts):
            name = self._names[lowest + part.above][part.place]
            asked = Slice(name, part.dim, 0, part.length, part.size)
            other = slices.get(name, asked)
            make = Slice if asked.is_whole and other.is_whole else _Partial
            slices[name] = make(name, part.dim, 0, max(asked.length, other.length), part.size)
        return Chunk(tuple(slices.values()), 0, 0)


def sweep_peak(
    kinds: Kinds,
    chunks: Sequence[Chunk],
    policy: Policy,
    peak: Callable[[Chunk], Moment],
    enough: int = 0,
    can_join: bool = True,
) -> tuple[Chunk, Moment]:
    """The chunk of a sweep whose step has the largest moment, and this; the first unless another needs more.

    Where it has up to ``enough`` bytes it can be a joined chunk's, which none of the sweep exceeds. ``can_join`` says
    that a longer slice of a gradient never needs less than a shorter one.
    """
    groups: dict[tuple[Where, ...], list[Example]] = {}
    for example in sorted(kinds.examples(chunks, policy), key=lambda e: e.kind.order):
        groups.setdefault(example.kind.regions, []).append(example)
    largest, most = peak(chunks[0]), chunks[0]
    waiting = list(groups.values())
    while waiting:
        group = waiting.pop()
        if len(group) > 1 and not can_join:
            waiting += [[e] for e in group]
            continue
        chunk = kinds.joined(group) if len(group) > 1 else group[0].chunk
        found = peak(chunk)
        if len(group) > 1 and found.nbytes > max(enough, largest.nbytes):
            # neighbours demand much the same
            middle = len(group) // 2
            waiting += [group[:middle], group[middle:]]
        elif found.nbytes > largest.nbytes:
            largest, most = found, chunk
    return most, largest
