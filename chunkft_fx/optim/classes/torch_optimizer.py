"""Any torch optimizer class: decides its state spec by trying the class, and runs its update by the class itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from chunkft_fx.errors import OptimizerNotSupported, OptionError
from chunkft_fx.module.module import training_of
from chunkft_fx.optim.classes.derived import Derived, Form, derive, forms_of
from chunkft_fx.optim.classes.parked import OptimizerClass, options_of
from chunkft_fx.optim.classes.probe import placed_numbers
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from chunkft_fx.optim.parts import PartsOptimizer
from chunkft_fx.optim.states.numbers import Number, numbers_in
from chunkft_fx.optim.update import Part
from chunkft_fx.plan.state_spec import StateSpec

# What schedulers set in groups, which decides no states.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# What was derived, by class, since trying one takes a tenth of a second and more: for options that decide the same.
_KNOWN: WeakKeyDictionary[type[Optimizer], list[tuple[dict[str, Any], Derived]]] = WeakKeyDictionary()


def optimizer(
    model: nn.Module,
    kind: type[Optimizer],
    *,
    max_grad_norm: float | None = None,
    no_decay: Sequence[str] = (),
    states: str = "keep",
    host_budget: int | str | None = None,
    update: str = "step",
    schedule_by: str = "sweep",
    **options: Any,
) -> ChunkedOptimizer:
    """An optimizer of any torch class, such as `torch.optim.NAdam` or your own, over the slices of a compiled module.

    ``options`` are those of the class; the others are those that `ChunkedOptimizer` describes. States wait in host
    memory between a chunk's turns, in float32 for low-precision parameters, which have a master weight; checkpoints
    have the form of the class.

    What the class keeps, and whether it updates elements each by itself, is found out by running it on small parameters
    of its own. If it does, chunks are cut anywhere; a class that needs whole parameters, such as `torch.optim.Muon` or
    `torch.optim.Adafactor`, has chunks cut between them. Raises `OptimizerNotSupported` for a class that can be run
    neither way (`torch.optim.LBFGS`, states in 8 bits), `OptionError` for options that the class refuses, and what
    `ChunkedOptimizer` raises. `chunkft_fx.AdamW` has kernels of its own for CUDA and is faster there.
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or issubclass(kind, ChunkedOptimizer):
        raise OptionError(
            f"{kind!r} is not a class of torch optimizers; pass a class such as torch.optim.NAdam and its options as "
            "keywords, or make an optimizer of chunkft_fx by itself"
        )
    return TorchOptimizer(
        model,
        OptimizerClass(kind, options),
        max_grad_norm=max_grad_norm,
        no_decay=no_decay,
        states=states,
        host_budget=host_budget,
        update=update,
        schedule_by=schedule_by,
    )


class TorchOptimizer(PartsOptimizer):
    """What `optimizer` returns."""

    switches = ("differentiable", "capturable", "fused")

    def __init__(
        self,
        model: nn.Module,
        kind: OptimizerClass,
        *,
        states: str,
        no_decay: Sequence[str],
        **options: Any,
    ) -> None:
        training = training_of(model, f"chunkft_fx.optimizer(model, {kind.name})")
        self._kind = kind
        self._checked: list[dict[str, Any]] = []
        self._placed: dict[torch.device, frozenset[str]] = {}
        self._forms = forms_of((n, p) for n, p in training.named_parameters() if p.requires_grad)
        defaults = self._defaults()
        if no_decay and "weight_decay" not in defaults:
            raise OptionError(f"no_decay={tuple(no_decay)!r} was given, but {kind.name} has no weight_decay")
        derived = self._first = self._derived(defaults, self._forms)
        spec = StateSpec(
            f"optimizer(model, {kind.name})",
            derived.tensors,
            states,
            derived.moved_nbytes,
            derived.is_whole,
            saves_steps=any(n.name == "step" for numbers in derived.numbers.values() for n in numbers),
        )
        super().__init__(model, spec, defaults, no_decay=no_decay, **options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        given = options_of(options)
        if any(_is_alike(given, known) for known in self._checked):
            return
        self._made(given)
        self._require_same(self._derived(given, self._forms))
        self._checked = [*self._checked[-7:], given]

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        forms = forms_of((n, p) for n, p in parameters.items() if p.requires_grad)
        if forms.keys() - self._forms.keys():
            found = self._derived(self.defaults, forms)
            self._require_same(found)
            self._first, self._forms = found, forms
        super().follow(parameters)

    def numbers_of(self, parameter: Tensor) -> tuple[Number, ...]:
        known = self._first.numbers
        return known.get(parameter.ndim) or known.get(0, ())  # updates see a scalar as a vector

    def _require_same(self, found: Derived) -> None:
        """Raise `OptionError` for what does not go with the states that there are."""
        first = self._first
        differ = any(found.numbers[d] != numbers for d, numbers in first.numbers.items() if d in found.numbers)
        if found.tensors != first.tensors or differ or found.is_whole > first.is_whole:
            raise OptionError(
                f"options of a parameter group, or new parameters, decide which states {self._kind.name} keeps; they "
                f"are not those that it was made with ({[t.name for t in first.tensors]}, now "
                f"{[t.name for t in found.tensors]}); make a new optimizer"
            )

    def update(self, parts: Sequence[Part], options: Mapping[str, Any]) -> None:
        spoils = self._derived(options, self._forms).spoils_gradients
        placed = self._placed_on(parts[0].weight.device, options)
        before = [None if part.step == 1 else self._state(part, placed) for part in parts]
        gradients = [part.gradient.clone() if spoils else part.gradient for part in parts]
        after = self._kind.step(options, [part.weight for part in parts], gradients, before)
        for part, state in zip(parts, after, strict=True):
            numbers = self.numbers_of(part.weight)
            expected = {*part.states, *(n.name for n in numbers)}
            if state.keys() != expected:
                raise OptimizerNotSupported(
                    f"{self._kind.name} keeps {sorted(state)} of a part of shape {list(part.weight.shape)}, and kept "
                    f"{sorted(expected)} of small parameters with as many dimensions; it may depend on nothing else"
                )
            for name, kept in part.states.items():
                if state[name] is not kept:
                    kept.copy_(state[name])
            part.after.update(numbers_in(state, numbers))

    def _state(self, part: Part, placed: frozenset[str]) -> dict[str, Any]:
        """What the class kept of a part; numbers that are ``placed`` lie where the part does."""
        device, known = part.weight.device, self.numbers_of(part.weight)
        numbers = {n.name: n.made(part.numbers[n.name], device if n.name in placed else None) for n in known}
        return dict(part.states) | numbers

    def _placed_on(self, device: torch.device, options: Mapping[str, Any]) -> frozenset[str]:
        """The numbers that the class keeps on a device, if it is a GPU."""
        if device.type == "cpu":
            return frozenset()
        if device not in self._placed:
            each = (placed_numbers(self._kind, options, *form, device) for form in self._forms)
            self._placed[device] = frozenset().union(*each)
        return self._placed[device]

    def _defaults(self) -> dict[str, Any]:
        """The class's options with their defaults, once it has taken those that were given."""
        made = self._made({})
        defaults = made.defaults | options_of(made.param_groups[0])
        if "lr" not in defaults:
            raise OptimizerNotSupported(f'{self._kind.name} has no option "lr", by which schedulers set its rate')
        return defaults

    def _made(self, options: Mapping[str, Any]) -> Optimizer:
        """An optimizer of the class by itself, which checks its options, over the first kind of parameter it takes."""
        for key in self.switches:
            if {**self._kind.given, **options}.get(key):
                raise OptionError(
                    f"{key}=True was set for {self._kind.name}, whose update is run over slices; leave it out"
                )
        errors = []
        for dimensions, dtype in [*self._forms] or [(1, torch.float32)]:
            try:
                return self._kind.checked(torch.zeros((1,) * dimensions, dtype=dtype), options)
            except (TypeError, ValueError, RuntimeError) as error:
                errors.append(error)
        raise OptionError(f"{self._kind.name} refuses its options: {errors[0]}") from errors[0]

    def _derived(self, options: Mapping[str, Any], forms: Mapping[Form, tuple[str, Tensor]]) -> Derived:
        """What is known of the class with options that decide the same."""
        decisive = {**self._kind.given, **options_of(options)}
        key = {k: _decides(v) for k, v in decisive.items() if k not in _RATES} | {"forms": [*forms]}
        known = _KNOWN.setdefault(self._kind.kind, [])
        for decided, derived in known:
            if decided == key:
                return derived
        derived = derive(self._kind, options, forms)
        known.append((key, derived))
        return derived


def _decides(value: Any) -> Any:
    """What of an option can decide states, as plain data: of a number whether it is 0, and its sign."""
    if isinstance(value, Tensor):
        return [_decides(v) for v in value.flatten().tolist()] if value.numel() < 8 else tuple(value.shape)
    if isinstance(value, float):
        return (value > 0) - (value < 0)
    if isinstance(value, tuple | list):
        return [_decides(v) for v in value]
    return value


def _is_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two groups have the same options, apart from tensors, which are asked for at the step."""
    return a.keys() == b.keys() and all(
        v is b[k] or (not isinstance(v, Tensor) and not isinstance(b[k], Tensor) and bool(v == b[k]))
        for k, v in a.items()
    )
