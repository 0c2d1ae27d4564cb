"""What is predicted beside the tensors of a step."""

from __future__ import annotations

import torch

from chunkft_fx.machine.overhead import PAGE_NBYTES, PAGE_ROUNDING_NBYTES, overhead


def test_what_the_limit_holds_back_is_predicted() -> None:
    """A step that needs what was predicted, and whose last page is nearly empty, must not meet the limit."""
    predicted = overhead(torch.device("cuda"), 0, 0)
    assert predicted["fragmentation"] >= PAGE_ROUNDING_NBYTES + PAGE_NBYTES
    of_step = overhead(torch.device("cuda"), 1000 * 2**20, 0)
    assert of_step["fragmentation"] > predicted["fragmentation"]
    assert overhead(torch.device("cuda"), 1000 * 2**20, 100 * 2**20) == of_step  # the larger of the two
    assert overhead(torch.device("cuda"), 1000 * 2**20, 800 * 2**20)["fragmentation"] > of_step["fragmentation"]
    assert overhead(torch.device("cpu"), 1000 * 2**20, 800 * 2**20) == {}
