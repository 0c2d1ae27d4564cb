"""State stage: holds the optimizer states of the active slices where updates happen, and copies them there and back.

Host tensors keep the cut dimension in front, so that every slice of them is one contiguous run. A *stage* holds
the states of the active slices where the model runs. On the CPU host memory is that place: nothing is copied and
updates happen in place. On CUDA the states of one chunk go out over one link while those of the next come in
over another (`copies.link`; a copy stream each), both hidden behind the next forward and backward. There is device
memory for one chunk only: what comes in follows what goes out, 64 MiB behind it (`copies.states.batches`), and begins
as the ``admit`` nodes of programs let it (`passes.schedule_states`). A stage of its own memory serves states that no
host memory keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkft_fx.copies.link import Link, Mark, open_link
from chunkft_fx.copies.states.batches import Batch, batches_of, carved, last_conflict, stage_places
from chunkft_fx.copies.states.ring import PieceRing
from chunkft_fx.copies.tier import HostTier, Tier
from chunkft_fx.plan.state_spec import StateSpec


class Stage:
    """Where updates happen; this one is host memory itself, for weights on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: list[Tensor] = []

    def announce(self, host: Sequence[Tensor]) -> None:
        """Say that these contiguous host tensors are next, in place of those staged before, which are forgotten.

        Their copies begin as ``admit`` lets them, at the latest when ``tensors`` is called.
        """
        self._host = list(host)

    def admit(self, share: float, after: Sequence[Link] = ()) -> None:
        """Let copies begin until this share (0 to 1) of all that was announced is under way or there.

        They run behind the work of the current stream and the copies of the links in ``after`` so far.
        """

    def tensors(self) -> list[Tensor]:
        """The staged tensors, in the order of ``announce``, ready for work on the current stream."""
        return self._host

    def write_back(self) -> None:
        """Begin to copy what ``tensors`` gave to the host, after the work on the current stream.

        It must not change until ``synchronize``, or until others are announced.
        """

    def synchronize(self) -> None:
        """Wait until host memory is up to date with every copy begun."""

    def abandon(self) -> None:
        """Put work that follows on the current stream behind all copies under way: a program failed halfway.

        What was announced stays announced, and what was staged stays staged: the next program admits the rest.
        """


class Updates(Protocol):
    """What takes gradients within a backward, as far as the program asks for it: an optimizer, or host memory."""

    def begin(self) -> None:
        """Begin a step, checked before anything runs of it."""

    def fetch_states(self, piece: int) -> None: ...

    def update(self, piece: int, names: Sequence[str], gradients: Sequence[Tensor], group: int) -> None:
        """Update a piece by these contributions to the gradients of its parameters, by their names.

        Updates of one ``group`` stand behind the same backward call; gradients are held until the next group's.
        """

    def write_states(self, piece: int) -> None: ...

    def complete(self) -> None: ...

    def abandon(self) -> None: ...


class OptimizerUpdates(Updates, Protocol):
    """The updates of an optimizer, whose states pass through ``ring``."""

    @property
    def ring(self) -> PieceRing: ...


class StageOwner(Protocol):
    """An optimizer with a stage: what describes it, and its states by parameter, none before the first step."""

    @property
    def spec(self) -> StateSpec: ...

    @property
    def state(self) -> Mapping[Any, Any]: ...

    @property
    def stage(self) -> Stage: ...

    @property
    def untaken_nbytes(self) -> int:
        """Bytes of host memory that its states are still to take."""

    def take_stage(self) -> None:
        """Take the stage's memory, for the largest chunk of the model's plan, where the model runs."""

    def drop_stage(self) -> None:
        """Give the stage's memory back, before a plan with other chunks is settled."""

    @property
    def updates(self) -> OptimizerUpdates | None:
        """What updates weights within the backward; None where the plan has no pieces."""

    def begin_backward(self) -> None:
        """Check, before a backward that updates weights, all that a step checks."""

    def end_backward(self) -> None:
        """Count a backward that has updated weights."""


class FreshStage(Stage):
    """Device memory for states that start at zero whenever they are announced, and go nowhere.

    Of what is announced only shapes and dtypes are read. ``capacity`` is as for `CopiedStage`.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        super().__init__(device)
        self._arena = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._staged: list[Tensor] = []

    def announce(self, host: Sequence[Tensor]) -> None:
        places, nbytes = stage_places(host)
        self._staged = []
        if self._arena.numel() < nbytes:
            self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)  # free before growing
            self._arena = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._arena[:nbytes].zero_()
        self._staged = carved(self._arena, host, places)

    def tensors(self) -> list[Tensor]:
        return self._staged


class CopiedStage(Stage):
    """Device memory for the states of one chunk, filled and emptied over a link each.

    ``capacity`` is the bytes of the largest chunk: memory is taken once, and again only if more is asked for.
    """

    def __init__(self, incoming: Link, outgoing: Link, tier: Tier, capacity: int) -> None:
        super().__init__(incoming.device)
        self._capacity = capacity
        self._incoming = incoming
        self._outgoing = outgoing
        self._tier = tier
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._staged: list[Tensor] = []
        self._batches: list[Batch] = []  # of what is staged
        self._admitted = 0  # batches
        self._written: list[Batch] = []  # of the latest write-back, with the mark behind each
        self._marks: list[Mark] = []
        self._grow()

    def announce(self, host: Sequence[Tensor]) -> None:
        places, nbytes = stage_places(host)
        self._capacity = max(self._capacity, nbytes)
        self._grow()
        self._host = list(host)
        self._staged = carved(self._arena, host, places)
        self._batches = batches_of(self._arena, host, places)
        self._admitted = 0

    def admit(self, share: float, after: Sequence[Link] = ()) -> None:
        batches = self._batches[self._admitted : int(share * len(self._batches))]
        if not batches:
            return
        self._incoming.follow(*after)  # the current stream may still use what was staged
        awaited = -1
        for batch in batches:
            last = last_conflict(self._written, batch)
            if last > awaited:
                self._incoming.follow_mark(self._marks[last])
                awaited = last
            self._tier.copy_in(self._incoming, batch.host, batch.staged)
            self._admitted += 1  # not before: a batch whose copies an exception cut short is admitted again

    def tensors(self) -> list[Tensor]:
        self.admit(1.0)
        self._incoming.wait(self._incoming.mark())
        self._incoming.reserve(self._arena)
        return self._staged

    def write_back(self) -> None:
        if not self._batches:
            return  # what comes in must still wait for the write-back before
        # Only the latest write-back is remembered: it and what comes in both begin at the start of the stage, so that
        # the one waits for the other's first batch, and with that, in the order of the link, for all before.
        self._outgoing.follow()
        self._written, self._marks = self._batches, []
        for batch in self._written:
            self._tier.copy_out(self._outgoing, batch.staged, batch.host)
            self._marks.append(self._outgoing.mark())

    def synchronize(self) -> None:
        self._incoming.synchronize()
        self._outgoing.synchronize()

    def abandon(self) -> None:
        self._incoming.abandon()
        self._outgoing.abandon()

    def _grow(self) -> None:
        if self._arena.numel() >= self._capacity:
            return
        self.synchronize()
        self._staged, self._batches, self._written, self._marks = [], [], [], []
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)  # free before growing
        self._arena = torch.empty(self._capacity, dtype=torch.uint8, device=self.device)
        for link in (self._incoming, self._outgoing):
            link.reserve(self._arena)


def make_stage(device: torch.device, capacity: int) -> Stage:
    """The stage for states that host memory keeps, with device memory for ``capacity`` bytes where it needs any."""
    if device.type != "cuda":
        return Stage(device)
    return CopiedStage(open_link(device), open_link(device), HostTier(device), capacity)
