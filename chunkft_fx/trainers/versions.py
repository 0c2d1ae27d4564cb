"""Says which versions of TRL trainers were tested with, and warns of others."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from chunkft_fx.errors import ChunkFTWarning

# Of TRL, by major and minor number; docs/versions.md has the table.
TESTED_TRL = ("1.16",)


def warn_of_version(trainer: Any) -> None:
    """Warn, once in a process, if this is a trainer of a TRL that was not tested."""
    if not any(kind.__module__.split(".")[0] == "trl" for kind in type(trainer).__mro__):
        return
    import trl

    _warn_unless_tested(trl.__version__)


@functools.cache
def _warn_unless_tested(version: str) -> None:
    if ".".join(version.split(".")[:2]) not in TESTED_TRL:
        warnings.warn(
            f"trl {version} was not tested with this library, {' and '.join(TESTED_TRL)} was: compare the losses of "
            "the first steps with those of the plain trainer",
            ChunkFTWarning,
            stacklevel=4,
        )
