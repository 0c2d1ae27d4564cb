"""Writes logs: ``CHUNKFT_LOGS=passes,program`` (or ``all``) shows what the named rooms of the library do."""

from __future__ import annotations

import logging
import os


def enable_logs(names: str | None = None) -> None:
    """Turn loggers ``chunkft_fx.<name>`` on at DEBUG; ``names`` is comma-separated, default ``$CHUNKFT_LOGS``."""
    wanted = [n.strip() for n in (os.environ.get("CHUNKFT_LOGS", "") if names is None else names).split(",")]
    for name in filter(None, wanted):
        logger = logging.getLogger("chunkft_fx" if name == "all" else f"chunkft_fx.{name}")
        logger.setLevel(logging.DEBUG)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
            logger.addHandler(handler)
