"""The sweep over torch's own modules: does what torch trains as one graph train here too, with the same gradients?

Every entry of ``torch.testing._internal.common_modules.module_db`` is built with some of its sample inputs, its first
floating input multiplied by a parameter of its shape, so that modules without parameters have something to train too.
Gradients of all chunks, of the inputs, and buffers afterwards are held to those of the plain module. What is refused
here is given to ``torch.compile(fullgraph=True, backend="aot_eager")``: what that trains counts as a fault.

    python -m tests.coverage.sweep_modules                    # all entries, rewrites the table in docs/coverage.md
    python -m tests.coverage.sweep_modules Conv1d LSTM        # some entries, printed only
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import chunkft_fx
from chunkft_fx.errors import ChunkFTError

TABLE = Path(__file__).parents[2] / "docs" / "coverage.md"
BEGIN, END = "<!-- modules: begin -->", "<!-- modules: end -->"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
SEED = 5


@dataclass
class Sample:
    """One module to train, and what it is called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype


@dataclass
class Row:
    """What became of one entry: number of samples by verdict, and the first reason of each."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, verdict: str, reason: str) -> None:
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        self.reasons.setdefault(verdict, " ".join(reason.split()))


class Gained(nn.Module):
    """A module whose first floating input is multiplied by a parameter of its shape."""

    def __init__(self, inner: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point())
        self.gain = nn.Parameter(torch.ones_like(first))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pending = [self.gain]

        def gained(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and pending:
                return value * pending.pop()
            return value

        args, kwargs = tree_map(gained, (args, kwargs))
        return self.inner(*args, **kwargs)


def samples(entry: Any, dtype: torch.dtype, most: int) -> Iterator[Sample]:
    """Up to ``most`` samples of an entry, spread evenly over those that torch gives."""
    torch.manual_seed(0)
    inputs = entry.module_inputs_func(entry, device="cpu", dtype=dtype, requires_grad=True, training=True)
    given = [i for i in inputs if i.forward_input is not None]
    step = max(1, -(-len(given) // most))
    for sample in given[::step]:
        made, called = sample.constructor_input, sample.forward_input
        torch.manual_seed(1)
        module = entry.module_cls(*made.args, **made.kwargs)
        module = module.to(dtype).train()
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
            module(*called.args, **called.kwargs)  # lazy parameters get their shapes from a first call
        floating = [t for t in tree_leaves((called.args, called.kwargs)) if isinstance(t, Tensor)]
        if any(t.is_floating_point() for t in floating):
            module = Gained(module, called.args, called.kwargs)
        yield Sample(module, called.args, called.kwargs, dtype)


def _fresh(value: Any) -> Any:
    """A copy of a call's tensors that are leaves of their own."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def loss_of(result: Any) -> Tensor:
    """A weighted sum of everything floating in a result, so that each element has a gradient of its own."""
    parts = []
    for leaf in tree_leaves(result):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            continue
        values = (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).reshape(-1)
        parts.append((values * torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype)).sum())
    return torch.stack(parts).sum()


@dataclass
class Outcome:
    """Gradients and buffers after one forward and backward, by name; a zero gradient where there is none."""

    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def train(call: Callable[..., Any], module: nn.Module, sample: Sample) -> Outcome:
    """Forward and backward of ``call`` under the fixed seed; gradients as autograd leaves them."""
    args, kwargs = tree_map(_fresh, (sample.args, sample.kwargs))
    torch.manual_seed(SEED)
    loss_of(call(*args, **kwargs)).backward()
    gradients = {n: _dense(p) for n, p in module.named_parameters() if p.requires_grad}
    return Outcome(gradients | _input_gradients(args, kwargs), dict(module.named_buffers()))


def _dense(p: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad.to_dense() if p.grad.is_sparse else p.grad


def _input_gradients(args: Any, kwargs: Any) -> dict[str, Tensor]:
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    return {f"input {i}": torch.zeros_like(t) if t.grad is None else t.grad for i, t in enumerate(leaves)}


def compare(sample: Sample, chunks: int) -> None:
    """Hold the compiled module's gradients and buffers to the plain one's; raises AssertionError where they differ."""
    plain = copy.deepcopy(sample.module)
    expected = train(plain, plain, sample)
    compare_with(expected, sample, chunks)


def compare_with(expected: Outcome, sample: Sample, chunks: int) -> None:
    """Hold each chunk of a freshly compiled module to ``expected``."""
    trainable = sum(p.numel() for p in sample.module.parameters() if p.requires_grad)
    for k in range(min(chunks, trainable)):
        compiled = chunkft_fx.compile(
            copy.deepcopy(sample.module), "1GB", chunks=min(chunks, trainable), interval=1, backend="eager"
        )
        compiled.activate(k)
        args, kwargs = tree_map(_fresh, (sample.args, sample.kwargs))
        torch.manual_seed(SEED)
        loss_of(compiled(*args, **kwargs)).backward()
        finite = [g[g.isfinite()].abs().max() for g in expected.gradients.values() if g.isfinite().any()]
        scale = 1e-4 * float(max(finite, default=0.0))
        for s in compiled.active_slices():
            want = expected.gradients[s.name]
            want = want if s.slice.is_whole else want.narrow(s.dim, s.start, s.length)
            _assert_close(f"{s.name}[{s.dim}, {s.start}:{s.start + s.length}]", s.grad, want, scale, sample.dtype)
        for name, got in _input_gradients(args, kwargs).items():
            _assert_close(name, got, expected.gradients[name], scale, sample.dtype)
        for name, value in compiled.named_buffers():
            _assert_close(f"buffer {name}", value, expected.state[name], 0.0, sample.dtype)
        torch._dynamo.reset()


def _assert_close(name: str, got: Tensor | None, want: Tensor, scale: float, dtype: torch.dtype) -> None:
    value = torch.zeros_like(want) if got is None else got
    assert value.shape == want.shape, f"{name} has shape {list(value.shape)}, not {list(want.shape)}"
    same = torch.allclose(value.to(want.dtype), want, rtol=TOLERANCE[dtype], atol=scale * TOLERANCE[dtype] + 1e-12,
                          equal_nan=True)  # fmt: skip
    assert same, f"{name} differs by {float((value - want).abs().max()):.2e}"


def judge(sample: Sample, chunks: int) -> tuple[str, str]:
    """One of ``right``, ``refused by torch``, ``untrainable`` or ``FAULT``, with the reason."""
    try:
        plain = copy.deepcopy(sample.module)
        expected = train(plain, plain, sample)
    except Exception as error:  # a sample that shows an error, or has no gradient: nothing to compare with
        return "untrainable", f"{type(error).__name__}: {error}"
    try:
        compare_with(expected, sample, chunks)
    except AssertionError as error:
        return "FAULT", f"wrong: {error}"
    except ChunkFTError as error:
        reason = _refusal(sample)
        return ("refused by torch", reason) if reason else ("FAULT", f"refused: {error}")
    except Exception as error:
        return "FAULT", f"{type(error).__name__}: {error}"
    finally:
        torch._dynamo.reset()
    return "right", ""


def _refusal(sample: Sample) -> str | None:
    """Why torch itself cannot train a module as one graph; None if it can."""
    torch._dynamo.reset()
    model = copy.deepcopy(sample.module)
    try:
        train(torch.compile(model, fullgraph=True, backend="aot_eager"), model, sample)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def sweep(names: Sequence[str] = (), most: int = 4, dtypes: Iterable[torch.dtype] = TOLERANCE) -> list[Row]:
    """A row for each entry of the database (those whose names contain one of ``names``)."""
    from torch.testing._internal.common_modules import module_db  # needs the package expecttest

    rows = []
    for entry in module_db:
        if names and not any(n in entry.name for n in names):
            continue
        row = Row(entry.name)
        for dtype in dtypes:
            # float32 is a check of types more than of values: fewer samples, and one chunk
            chunks, count = (2, most) if dtype == torch.float64 else (1, max(1, most // 2))
            for sample in samples(entry, dtype, count):
                row.add(*judge(sample, chunks))
        rows.append(row)
        sys.stdout.write(f"{row.name} {row.counts} {row.reasons.get('FAULT', '')[:300]}\n")
        sys.stdout.flush()
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as markdown, between the markers that separate this part of the document from others."""
    verdicts = ("right", "refused by torch", "untrainable", "FAULT")
    lines = [f"| module | {' | '.join(verdicts)} | first reason |", f"| --- | {'--- | ' * len(verdicts)}--- |"]
    for row in rows:
        reason = next((row.reasons[v] for v in ("FAULT", "refused by torch", "untrainable") if v in row.reasons), "")
        counts = " | ".join(str(row.counts.get(v, "")) for v in verdicts)
        lines.append(f"| `{row.name}` | {counts} | {reason[:120].replace('|', chr(92) + '|')} |")
    total = " | ".join(str(sum(row.counts.get(v, 0) for row in rows)) for v in verdicts)
    lines.append(f"| all {len(rows)} | {total} | |")
    return "\n".join(lines)


def write(rows: Sequence[Row]) -> None:
    """Put the table between its markers in the document; the rest of the document stays."""
    text = TABLE.read_text()
    head, rest = text.split(BEGIN)
    TABLE.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = sweep(options.names, options.samples)
    if not options.names:
        write(rows)
    return int(any("FAULT" in row.counts for row in rows))


if __name__ == "__main__":
    sys.exit(main())
