"""Checks whether the model is still the one that was looked at, before every call and every step.

A model is a tree of registries, ``_parameters`` and ``_modules`` of each module. The watch remembers what they held and
compares by identity, which costs a few microseconds a layer; only a difference is looked at closely.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor, nn

# What a plan depends on: shape, dtype.
_Look = tuple[torch.Size, torch.dtype]
_FLAGS = attrgetter("requires_grad", "dtype", "shape")


@dataclass(frozen=True)
class ModelChanges:
    """How a model differs from what it was: names of parameters, each in one of the lists.

    ``replaced`` are other objects of the same shape and dtype; ``reshaped`` and ``retyped`` have another shape or
    dtype, replaced or not; ``added`` are there now and were not, ``removed`` the other way round. Of all that were
    there before, ``frozen`` and ``unfrozen`` have another ``requires_grad``. ``modules`` says that a module was added,
    removed or replaced.
    """

    replaced: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    retyped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    unfrozen: tuple[str, ...] = ()
    modules: bool = False

    @property
    def is_another_model(self) -> bool:
        """Whether states and plans of the old parameters cannot be those of the new ones."""
        return bool(self.reshaped or self.retyped or self.added or self.removed)

    def __str__(self) -> str:
        """What changed, for an error: ``embed.weight has another shape``."""
        kinds = (
            ("has another shape", self.reshaped),
            ("has another dtype", self.retyped),
            ("was added", self.added),
            ("was removed", self.removed),
            ("was replaced", self.replaced),
            ("was frozen", self.frozen),
            ("was unfrozen", self.unfrozen),
        )
        parts = [f"{', '.join(names[:3])}{' and others' * (len(names) > 3)} {what}" for what, names in kinds if names]
        return "; ".join(parts or ["a module was added, removed or replaced"])


class ModelWatch:
    """Remembers a model's modules and parameters, and which of them are trained."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.look()

    def look(self) -> None:
        """Remember the model as it is now."""
        modules = list(self._model.modules())
        self._modules, self._places = _Registries(modules, "_modules"), _Registries(modules, "_parameters")
        self.parameters = dict(self._model.named_parameters())
        self._held = list(self.parameters.values())
        self._looks = {name: _look(p) for name, p in self.parameters.items()}
        self._trained = {name: p.requires_grad for name, p in self.parameters.items()}
        self._flags = [*map(_FLAGS, self._held)]

    def changes(self) -> ModelChanges | None:
        """What is different from what was remembered; None if nothing is."""
        same = self._modules.hold()
        if same and self._places.hold() and [*map(_FLAGS, self._held)] == self._flags:
            return None
        now = dict(self._model.named_parameters())
        both = [n for n in now if n in self.parameters]
        looks = {n: _look(now[n]) for n in both}
        reshaped = tuple(n for n in both if looks[n][0] != self._looks[n][0])
        retyped = tuple(n for n in both if looks[n][1] != self._looks[n][1] and n not in reshaped)
        other = tuple(n for n in both if now[n] is not self.parameters[n])
        switched = [n for n in both if now[n].requires_grad != self._trained[n]]
        return ModelChanges(
            replaced=tuple(n for n in other if n not in reshaped and n not in retyped),
            reshaped=reshaped,
            retyped=retyped,
            added=tuple(n for n in now if n not in self.parameters),
            removed=tuple(n for n in self.parameters if n not in now),
            frozen=tuple(n for n in switched if not now[n].requires_grad),
            unfrozen=tuple(n for n in switched if now[n].requires_grad),
            modules=not same,
        )


class _Registries:
    """What dictionaries of modules held. They are compared whole, by identities, since it is done several times a step.

    A dictionary is asked for at its module each time: ``del`` of a list's module puts another one in its place.
    """

    def __init__(self, modules: list[nn.Module], name: str) -> None:
        self._modules, self._of = modules, attrgetter(name)
        # held, so that no id is given again
        self._values = [*chain.from_iterable(self._of(m).values() for m in modules)]
        self._seen = self._look()

    def hold(self) -> bool:
        """Whether they hold the same objects under the same names, in the same order."""
        return self._look() == self._seen

    def _look(self) -> tuple[list[int], list[str], list[int]]:
        registries = [*map(self._of, self._modules)]
        flat = chain.from_iterable(map(dict.values, registries))
        return [*map(len, registries)], [*chain.from_iterable(registries)], [*map(id, flat)]


def _look(parameter: Tensor) -> _Look:
    return parameter.shape, parameter.dtype
