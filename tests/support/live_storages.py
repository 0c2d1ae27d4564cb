"""Two oracles for memory that share nothing with the model they check.

`LiveStorages` sees every operator that Python dispatches and holds weak references to the storages that they make:
exact for graphs that run operator by operator. `allocator_peak` reads the CPU allocator's own events, so that it
sees what compiled code allocates as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunkft_fx.gradients.slice_gradient import SliceGradient


class LiveStorages(TorchDispatchMode):
    """While active, counts the bytes of storages that operators made and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_nbytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors that were made elsewhere, as long as something holds them."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                continue  # of a graph that is looked at, not run
            storage = tensor.untyped_storage()
            self._live[_key(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor's storage no longer: it gave its memory back."""
        self._live.pop(_key(tensor), None)

    @property
    def live_nbytes(self) -> int:
        self._live = {key: (ref, nbytes) for key, (ref, nbytes) in self._live.items() if not ref.expired()}
        return sum(nbytes for _, nbytes in self._live.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, SliceGradient) for t in types):
            return NotImplemented  # it calls operators on the memory that it owns, and those are seen
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.watch(t for t in tree_leaves(result) if isinstance(t, Tensor) and _key(t) not in given)
        return result


def _key(tensor: Tensor) -> int:
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def allocator_peak(
    run: Callable[[list[Any]], Any], make_inputs: Callable[[], list[Any]], dying: frozenset[int] = frozenset()
) -> int:
    """The most bytes that one call of ``run`` adds on the CPU; inputs at other positions than ``dying`` stay alive.

    The inputs are made while the allocator is watched, because it knows the sizes of those blocks alone.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        inputs = make_inputs()
        kept = [value for i, value in enumerate(inputs) if i not in dying]
        with record_function("call begins"):
            pass
        results = run(inputs)
        with record_function("call ends"):
            pass
    del kept, results
    total = base = peak = 0
    is_inside = False
    events = watched.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "call begins":
            is_inside, base, peak = True, total, total
        elif event.name() == "call ends":
            is_inside = False
        elif event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total) if is_inside else peak
    return peak - base
