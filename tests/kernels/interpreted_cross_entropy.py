"""Tests of the cross-entropy kernel against its reference, on CUDA or in Triton's interpreter.

`test_cross_entropy` runs this file in a process of its own, with the interpreter on; `tests.gpu.test_head` runs
`compare` on CUDA.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.kernels import cross_entropy

# A row longer than one step of the kernel's loop, a multiple of it, and short ones.
CLASSES = (1, 2, 37, 4096, 4100)


def compare(
    device: str, rows: int, classes: int, dtype: torch.dtype, smoothing: float, ignore: int, size: float
) -> None:
    """Kernel and reference on the same logits, whose rows lie apart in memory; ``size`` is their magnitude."""
    generator = torch.Generator().manual_seed(rows * classes)
    wide = (torch.randn(rows, classes + 3, generator=generator) * size).to(dtype).to(device)
    labels = torch.randint(0, classes, (rows,), generator=generator).to(device)
    labels[::3] = ignore
    for scale in (None, torch.tensor(-0.25, device=device)):
        found, expected = (_outputs(wide.clone()[:, :classes], rows, device) for _ in range(2))
        cross_entropy.launch(*found[:1], labels, *found[1:], scale, ignore, smoothing)
        cross_entropy.reference(*expected[:1], labels, *expected[1:], scale, ignore, smoothing)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5 * size)
        if scale is not None:
            # one rounding to the logits' dtype, which may fall to either side
            rounding = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(found[0], expected[0], rtol=max(rounding, 1e-5), atol=1e-7)
            assert not found[0][labels == ignore].any()
        assert not found[1][labels == ignore].any()


def _outputs(logits: Tensor, rows: int, device: str) -> tuple[Tensor, Tensor]:
    return logits, torch.full((rows,), float("nan"), device=device)


@settings(max_examples=25)
@given(
    rows=st.integers(0, 5),
    classes=st.sampled_from(CLASSES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignore=st.sampled_from([-100, 0, 1]),
    size=st.sampled_from([1.0, 30.0]),
)
def test_kernel_equals_reference(
    rows: int, classes: int, dtype: torch.dtype, smoothing: float, ignore: int, size: float
) -> None:
    compare("cpu", rows, classes, dtype, smoothing, ignore, size)


def test_neighbours_of_a_row_are_not_written() -> None:
    buffer = torch.zeros(3, 50)
    cross_entropy.launch(buffer[:, :37], torch.tensor([0, 1, 2]), torch.empty(3), torch.tensor(1.0), -100, 0.0)
    assert buffer[:, :37].all()
    assert not buffer[:, 37:].any()


def test_logits_that_are_minus_infinity_have_no_probability() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    expected, losses = logits.clone(), torch.empty(1)
    for function, block in ((cross_entropy.launch, logits), (cross_entropy.reference, expected)):
        function(block, torch.tensor([2]), losses, torch.tensor(1.0), -100, 0.0)
    torch.testing.assert_close(logits, expected)
    assert float(logits[0, 1]) == 0


def test_a_label_outside_the_classes_has_a_loss_of_nan() -> None:
    losses = torch.empty(2)
    cross_entropy.launch(torch.randn(2, 5), torch.tensor([7, 1]), losses, None, -100, 0.0)
    assert losses.isnan().tolist() == [True, False]
