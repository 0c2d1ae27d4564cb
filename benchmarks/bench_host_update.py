"""Whether it would pay to let the host's cores update a share of the parameters, beside the updates on the GPU.

    python -m benchmarks.bench_host_update
    python -m benchmarks.bench_host_update --parameters 8.03e9 --tokens-s 9500 --piece 1 --piece 16

In a step that covers all parameters every state travels to the GPU and back: with remainders for masters `STATE_NBYTES`
an element each way. An element that the host updates sends its bfloat16 gradient down and its bfloat16 weight up, which
is `HOST_NBYTES` each way. It costs the host a conversion of the gradient to float32, torch's fused AdamW on a float32
master and moments, and the rounding of the master; piece by piece, so that what one of the three leaves in caches is
there for the next.

First the table has what the link copies, both ways at once, while the host rests. Then, for numbers of threads and
sizes of pieces: elements that the host updates in a second alone, elements and copies when both go on at once, the
share of elements with which host and link are done at the same time, and how long link and host then take for the
updates of a step. Where no share is better than none it is 0. That all gradients are there from the beginning on is
taken for granted, so these times are the least that can be had. "Hidden from" are the tokens a step whose computation
takes as long.

Needs one CUDA GPU, and a GiB of host memory for the updates and as much for the copies of each direction.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from chunkft_fx.copies.host_memory import pinned_zeros

GIB, MI = 2**30, 2**20
# Bytes an element each way: a remainder and two moments in float32; or a gradient one way, a weight the other.
STATE_NBYTES, HOST_NBYTES = 10, 2
# What the host holds of an element here: master, two moments, gradient and weight.
ELEMENT_NBYTES = 4 + 4 + 4 + 2 + 2
# Large, since a stream takes no more than about a thousand copies and events ahead.
COPY = 128 * MI
# Seconds that a rate is measured for, and how much longer copies go on than updates beside them would take alone.
LEAST_S, SPARE = 0.5, 2.0

Take = Callable[[int], Tensor]


class HostUpdate:
    """AdamW in host memory on so many elements, float32, with bfloat16 gradients and weights.

    ``take`` gives a uint8 tensor of zeros of so many bytes; gradients are random, weights begin as the masters rounded.
    """

    def __init__(self, numel: int, take: Take) -> None:
        self.masters, self.exp_avg, self.exp_avg_sq = (take(4 * numel).view(torch.float32) for _ in range(3))
        self.gradients, self.weights = (take(2 * numel).view(torch.bfloat16) for _ in range(2))
        self.masters.normal_()
        self.gradients.normal_()
        self.weights.copy_(self.masters)
        self.step = 0

    def run(self, piece: int) -> None:
        """One step over all elements, ``piece`` of them at a time."""
        wide = torch.empty(min(piece, self.masters.numel()))
        tensors = (self.masters, self.gradients, self.exp_avg, self.exp_avg_sq, self.weights)
        for master, gradient, exp_avg, exp_avg_sq, weight in zip(*(t.split(piece) for t in tensors), strict=True):
            converted = wide[: len(gradient)].copy_(gradient)
            steps = [torch.tensor(float(self.step))]
            adamw(
                [master], [converted], [exp_avg], [exp_avg_sq], [], steps, fused=True, amsgrad=False,
                beta1=0.9, beta2=0.999, lr=1e-5, weight_decay=0.01, eps=1e-8, maximize=False,
            )  # fmt: skip
            weight.copy_(master)
        self.step += 1


def elements_per_second(update: HostUpdate, piece: int, seconds: float = LEAST_S) -> float:
    """Elements that the host updates in a second, over as many steps as take ``seconds``."""
    update.run(piece)
    steps, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        update.run(piece)
        steps += 1
    return steps * update.masters.numel() / passed


class Link:
    """Copies in pieces of `COPY` bytes between pinned memory and the current GPU, in both directions at once."""

    def __init__(self, nbytes: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self._host = [pinned_zeros(nbytes, device).split(COPY) for _ in range(2)]
        self._device = [torch.empty(COPY, dtype=torch.uint8, device=device) for _ in range(2)]
        self._streams = [torch.cuda.Stream() for _ in range(2)]

    def begin(self, copies: int) -> list[list[torch.cuda.Event]]:
        """Begin so many copies each way; returns an event behind each, those to the device first."""
        events: list[list[torch.cuda.Event]] = [[], []]
        for i in range(copies):  # by turns, so that neither direction runs ahead while they are begun
            for is_back in (0, 1):
                host, device = self._host[is_back][i % len(self._host[is_back])], self._device[is_back]
                with torch.cuda.stream(self._streams[is_back]):
                    (host if is_back else device).copy_(device if is_back else host, non_blocking=True)
                    events[is_back].append(torch.cuda.Event(enable_timing=True))
                    events[is_back][-1].record()
        return events

    def alone(self, copies: int = 128) -> float:
        """Bytes a second each way of the slower direction, while the host rests."""
        self.begin(8)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.begin(copies)
        torch.cuda.synchronize()
        return copies * COPY / (time.perf_counter() - begin)


def beside(update: HostUpdate, piece: int, link: Link, alone: float, full: float) -> tuple[float, float]:
    """Elements a second of the update, and bytes a second each way of copies, while both go on.

    ``alone`` are the elements a second without copies, ``full`` the bytes a second without updates. The slower
    direction counts. Raises `RuntimeError` where the copies end before the updates.
    """
    steps = max(1, round(LEAST_S * alone / update.masters.numel()))
    copies = int(SPARE * steps * update.masters.numel() / alone * full / COPY) + 4
    # both slow each other down, by how much is not known: more copies until there are enough
    for _ in range(3):
        events = link.begin(copies)
        first, begin = _done(events), time.perf_counter()
        for _ in range(steps):
            update.run(piece)
        seconds, last = time.perf_counter() - begin, _done(events)
        torch.cuda.synchronize()
        if max(last) < copies:
            slower = min(_rate(each, a, b) for each, a, b in zip(events, first, last, strict=True))
            return steps * update.masters.numel() / seconds, slower
        copies *= 2
    raise RuntimeError("the copies were done before the updates: the rates beside each other cannot be told")


def _done(events: list[list[torch.cuda.Event]]) -> list[int]:
    return [sum(e.query() for e in each) for each in events]


def _rate(events: list[torch.cuda.Event], first: int, last: int) -> float:
    """Bytes a second from copy number ``first`` on up to the end of ``last``."""
    return (last - first) * COPY / events[first].elapsed_time(events[last]) * 1e3


@dataclass(frozen=True)
class Outlook:
    """The share of elements for the host, from 0 to 1, and seconds that updates take with it and without any."""

    share: float
    seconds: float
    without: float


def outlook(parameters: float, host: float, link: float, link_alone: float) -> Outlook:
    """The best share for a model of so many parameters.

    ``host`` are elements a second that the host updates while the link copies ``link`` bytes a second each way, and
    ``link_alone`` bytes while the host rests. Link and host are done together, unless the host could do it all sooner.
    """
    without = parameters * STATE_NBYTES / link_alone
    saved = STATE_NBYTES - HOST_NBYTES
    # share / host == (STATE_NBYTES - saved * share) / link
    share = min(1.0, STATE_NBYTES / (link / host + saved))
    seconds = parameters * max(share / host, (STATE_NBYTES - saved * share) / link)
    return Outlook(share, seconds, without) if seconds < without else Outlook(0.0, without, without)


@dataclass(frozen=True)
class Row:
    """What was measured with so many threads and elements a piece, per second: elements and bytes each way."""

    threads: int
    piece: int
    alone: float
    host: float
    link: float


def table(rows: Sequence[Row], parameters: float, link_alone: float, tokens_s: float) -> str:
    """The rows in Markdown, with the best share of each; the first one has the link alone."""
    titles = ["threads", "piece", "host alone", "host beside copies", "copies each way", "best share", "updates take"]
    titles += ["saved", "hidden from"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    without = parameters * STATE_NBYTES / link_alone
    cells = ["none", "", "", "", f"{link_alone / GIB:.1f} GiB/s", "0", f"{without:.3f} s", ""]
    lines.append("| " + " | ".join([*cells, f"{without * tokens_s:.0f} tokens"]) + " |")
    for r in rows:
        best = outlook(parameters, r.host, r.link, link_alone)
        cells = [str(r.threads), f"{r.piece / MI:g} Mi", f"{r.alone / 1e9:.2f}e9/s", f"{r.host / 1e9:.2f}e9/s"]
        cells += [f"{r.link / GIB:.1f} GiB/s", f"{best.share:.3f}", f"{best.seconds:.3f} s"]
        cells += [f"{1 - best.seconds / best.without:.1%}", f"{best.seconds * tokens_s:.0f} tokens"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def thread_counts(most: int) -> list[int]:
    """All, half and a quarter of so many threads."""
    return sorted({max(1, most // part) for part in (1, 2, 4)}, reverse=True)


def measured(update: HostUpdate, link: Link, pieces: Sequence[int], full: float) -> Iterator[Row]:
    """A row for each number of threads and size of pieces."""
    most = torch.get_num_threads()
    try:
        for threads in thread_counts(most):
            torch.set_num_threads(threads)
            for piece in pieces:
                alone = elements_per_second(update, piece)
                yield Row(threads, piece, alone, *beside(update, piece, link, alone, full))
    finally:
        torch.set_num_threads(most)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=6.74e9, help="of the model that the table is for")
    parser.add_argument("--tokens-s", type=float, default=9900, help="tokens a second that a step of it computes")
    parser.add_argument("--piece", type=int, action="append", help="Mi of elements in one go; may be given again")
    parser.add_argument("--gib", type=int, default=1, help="of host memory for the elements")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measurement needs a CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    update = HostUpdate(args.gib * GIB // ELEMENT_NBYTES, lambda nbytes: pinned_zeros(nbytes, device))
    link = Link(GIB)
    full = link.alone()
    rows = list(measured(update, link, [piece * MI for piece in args.piece or (1, 4)], full))
    print(table(rows, args.parameters, full, args.tokens_s))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads at most, "
        f"{args.parameters:.3g} parameters, {args.tokens_s:g} tokens/s"
    )


if __name__ == "__main__":
    main()
