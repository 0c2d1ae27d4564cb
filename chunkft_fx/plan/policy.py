"""Holds the policy: the frozen record of all that a plan decided for programs and passes.

The planner makes it, and it is carried whole to the program, to each region's demand and to the passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from chunkft_fx.bytes import format_bytes
from chunkft_fx.plan.pieces import Pieces
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec

# Copies of states are planned to take at most this share of a step, so that jitter of the link stays hidden too.
HIDDEN_SHARE = 0.8
# Buffers of the ring: one is read while the next is filled.
DEPTH = 2
NO_PIECES = Pieces()


@dataclass(frozen=True)
class StepTimes:
    """Predicted microseconds of each region of a step, in the order of the model.

    ``forward_us`` and ``backward_us`` (input gradients only) are a region's two calls, ``recompute_us`` is what
    recomputing its activations adds to its backward, ``gradients_us`` what the gradients of all its weights add.
    ``fetch_us`` brings all its weights from host memory, ``offload_us`` moves what it keeps between forward and
    backward one way. ``state_us_per_byte`` is the time of a chunk's states, both ways at once,
    ``update_us_per_element`` that of its update. ``split_us`` gives for each split of the head what a step takes more.
    ``leave_us`` is the way of all gradients to host memory, ``return_us`` their way back. A region's call takes
    ``slowed_by_copies`` times as long while copies go both ways. For each byte of a trained weight ranks take
    ``ranks_us_per_byte`` to average its gradient, and to give the new weight to all.
    """

    forward_us: tuple[float, ...]
    backward_us: tuple[float, ...]
    recompute_us: tuple[float, ...]
    gradients_us: tuple[float, ...]
    fetch_us: tuple[float, ...]
    offload_us: tuple[float, ...]
    state_us_per_byte: float
    update_us_per_element: float
    split_us: tuple[tuple[int, float], ...] = ((1, 0.0),)
    leave_us: float = 0.0
    return_us: float = 0.0
    slowed_by_copies: float = 1.0
    ranks_us_per_byte: float = 0.0

    def times(self, factor: float) -> StepTimes:
        """The same with this multiple of what is done for each micro-batch; weights and states move as before."""

        def scaled(each: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(us * factor for us in each)

        return replace(
            self,
            forward_us=scaled(self.forward_us),
            backward_us=scaled(self.backward_us),
            recompute_us=scaled(self.recompute_us),
            gradients_us=scaled(self.gradients_us),
            offload_us=scaled(self.offload_us),
            split_us=tuple((split, us * factor) for split, us in self.split_us),
        )


@dataclass(frozen=True)
class LinkUse:
    """Predicted microseconds of a step that covers all parameters: all of it, and what moves each way, with its bytes.

    ``still_us`` is what the step would take if what moves took no time. ``hides_from`` is the multiple of the batch's
    tokens from which compute is long enough to hide all that moves beside it, 0 where updates wait for the optimizer's
    step, which hides nothing.
    """

    step_us: float
    still_us: float
    incoming_us: float
    outgoing_us: float
    incoming_nbytes: int
    outgoing_nbytes: int
    hides_from: float

    @property
    def hidden(self) -> float:
        """The share of what moves, on the busier way, that adds nothing to a step."""
        busier = max(self.incoming_us, self.outgoing_us)
        return 1.0 if not busier else min(1.0, max(0.0, 1 - (self.step_us - self.still_us) / busier))

    def sentences(self) -> list[str]:
        """For people."""
        inwards, outwards = (us / self.step_us for us in (self.incoming_us, self.outgoing_us))
        more = f", all from {self.hides_from:.1f} times these tokens on" if self.hides_from > 1 else ""
        busy = f"the link is busy {inwards:.0%} of a step inwards and {outwards:.0%} outwards"
        come, go = format_bytes(self.incoming_nbytes), format_bytes(self.outgoing_nbytes)
        return [
            f"a step brings {come} to the device and takes {go} to the host, weights and saved values included",
            f"{busy}; {self.hidden:.0%} of that hides behind compute{more}",
        ]


@dataclass(frozen=True)
class RegionPolicy:
    """The part of a policy that concerns one region: whether it recomputes and offloads, and the split of its head."""

    recompute: bool = False
    offload: bool = False
    head_split: int = 1

    @property
    def of_variant(self) -> RegionPolicy:
        """What the region's own graphs depend on: offloading is done between them, by the program."""
        return RegionPolicy(self.recompute, head_split=self.head_split)

    @property
    def of_joint_graph(self) -> RegionPolicy:
        """What the region's joint graph depends on, before it is split into forward and backward."""
        return RegionPolicy(head_split=self.head_split)


@dataclass(frozen=True)
class Policy:
    """Every decision of a plan that programs and passes act on.

    Regions from ``save_from`` on keep their activations; those below it (and above the lowest active slice) recompute
    them in backward. Regions below ``offload_below`` offload what they keep between forward and backward to host
    memory. A chunked head holds ``1 / head_split`` of the logits that it would by itself. ``streamed`` names the
    parameters whose weights stay in host memory, ``depth`` is the number of ring buffers that they pass through.
    ``pacing`` are the times by which optimizer states are let in during a step; without them states come all at once.
    ``states`` describes the optimizer that is planned for. ``pieces`` are the parts in which a step that covers all
    parameters updates them, empty where a step trains one chunk; with ``in_backward`` each is updated by the program,
    as soon as its gradients are complete; with ``host_gradients`` the program sends each to host memory then, where it
    waits for the optimizer's step, whose updates run on into the next forward if they are ``late``. A step runs
    ``micro_batches`` batches of the same sizes, each region over all of them before the next. Gradients are averaged
    over ``ranks``, each of which keeps its share of the states and updates it for all.
    """

    save_from: int = 0
    offload_below: int = 0
    head_split: int = 1
    streamed: frozenset[str] = frozenset()
    depth: int = DEPTH
    pacing: StepTimes | None = None
    states: StateSpec = ASSUMED
    pieces: Pieces = NO_PIECES
    in_backward: bool = False
    host_gradients: bool = False
    late: bool = False
    micro_batches: int = 1
    ranks: int = 1

    @property
    def updates_late(self) -> bool:
        """Whether a forward waits region by region for the updates of the step before it.

        Weights that stay in host memory would be fetched behind the states of all pieces, so there the step waits; so
        it does among several ranks, which update for each other.
        """
        return self.late and not self.streamed and self.ranks == 1

    @property
    def takes_gradients(self) -> bool:
        """Whether programs take the gradients of parameters themselves, piece by piece, and give autograd none."""
        return self.in_backward or self.host_gradients

    def of_region(self, index: int, has_head: bool) -> RegionPolicy:
        """What is decided for the region of that index, which holds the model's chunked head or not."""
        return RegionPolicy(index < self.save_from, index < self.offload_below, self.head_split if has_head else 1)

    @property
    def of_steps(self) -> Policy:
        """What the moments of a step depend on if all weights are resident and states come all at once."""
        steps = Policy(
            self.save_from, self.offload_below, self.head_split, micro_batches=self.micro_batches, ranks=self.ranks
        )
        if not self.takes_gradients:
            return steps
        return replace(steps, pieces=self.pieces, in_backward=self.in_backward, host_gradients=self.host_gradients)

    @property
    def complexity(self) -> tuple[int, ...]:
        """Tells choices of equal cost apart: the one with the smaller tuple is simpler."""
        return self.offload_below, self.head_split, self.depth

    def described(self) -> dict[str, str]:
        """The decisions as the columns of a table: titles and entries."""
        waits = {"gradients": "host" if self.host_gradients else "device"} if self.pieces else {}
        return {
            "buffers": str(self.depth),
            "recompute": str(self.save_from),
            "offload": str(self.offload_below),
            "split": str(self.head_split),
        } | waits

    def sentences(self) -> list[str]:
        """The decisions in words, those that change nothing left out."""
        at_step = "from the step on, as far as the next forward" if self.updates_late else "at the step"
        when = "each behind the backward call that completes its gradients" if self.in_backward else at_step
        away = f"{len(self.streamed)} weights stay in host memory and pass through {self.depth} buffers"
        pieces = f"{len(self.pieces)} pieces through {self.pieces.depth} buffers"
        told = {
            f"regions from {self.save_from} on keep their activations, those before recompute them": self.save_from > 0,
            f"regions before {self.offload_below} offload what they keep": self.offload_below > 0,
            away: bool(self.streamed),
            f"the head holds 1/{self.head_split} of its usual block of logits": self.head_split > 1,
            f"each region runs over {self.micro_batches} micro-batches before the next": self.micro_batches > 1,
            f"every step updates all parameters in {pieces}, {when}": bool(self.pieces),
            "gradients wait for the step in host memory": self.host_gradients,
            f"gradients are averaged over {self.ranks} ranks, each of which updates its share": self.ranks > 1,
        }
        return [sentence for sentence, is_told in told.items() if is_told]

    def same_places(self, other: Policy) -> bool:
        """Whether both leave every weight in the same place, and have rings of as many buffers."""
        rings = self.depth, self.pieces.depth
        return self.streamed == other.streamed and rings == (other.depth, other.pieces.depth)
