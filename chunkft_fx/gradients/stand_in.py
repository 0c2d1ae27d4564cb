"""Defines what the kinds of gradient of this library share: a tensor in the place of values that lie elsewhere.

All arithmetic on one goes through its ``__torch_dispatch__``. Some of what a tensor can do does not: there torch would
work on memory that a stand-in has none of, and say nothing, or say something of subclasses.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from chunkft_fx.errors import ChunkFTError


class StandIn(Tensor):
    """A wrapper subclass without memory of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """All is set in ``__new__``: torch's wrapper subclasses have no other moment."""

    @abstractmethod
    def refusal(self, what: str) -> ChunkFTError:
        """The error that says that this gradient cannot be ``what`` ("read by numpy()"), and what to do instead."""

    @abstractmethod
    def whole(self, what: str) -> Tensor:
        """A plain tensor of these values; raises the `refusal` if there is none to be ``what``."""

    @property
    def data(self) -> Tensor:
        """The same gradient, as `torch.Tensor.data` is; what is assigned to it is copied in, which can be refused."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        if values.shape != self.shape:
            raise self.refusal(f"given data of shape {list(values.shape)}")
        self.copy_(values)

    def numpy(self, *, force: bool = False) -> Any:
        """A NumPy array of these values."""
        return self.whole("read by numpy()").numpy(force=force)

    def tolist(self) -> Any:
        """Nested lists of these values."""
        return self.whole("read by tolist()").tolist()
