"""What is predicted beside the tensors of a step."""

from __future__ import annotations

import torch

from chunkft_fx.machine.overhead import PAGE_NBYTES, PAGE_ROUNDING_NBYTES, overhead


def test_what_the_limit_holds_back_is_predicted() -> None:
    """A step that needs what was predicted, and whose last page is nearly empty, must not meet the limit."""
    predicted = overhead(torch.device("cuda"), 0)
    assert predicted["fragmentation"] >= PAGE_ROUNDING_NBYTES + PAGE_NBYTES
    assert overhead(torch.device("cuda"), 1000 * 2**20)["fragmentation"] > predicted["fragmentation"]
    assert overhead(torch.device("cpu"), 1000 * 2**20) == {}
