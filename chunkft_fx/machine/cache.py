"""Reads and writes the cache files: what was measured on a machine, as JSON, by device.

A file holds ``{"version": ..., "devices": {...}}``, one entry for each device, torch version and driver. It only saves
time: a file that is damaged, of another version or not writable is measured around, and logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

log = logging.getLogger("chunkft_fx.machine.cache")

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class CacheFile(Generic[Entry]):
    """A file of the cache folder whose entries are of one type.

    ``parsed`` makes an entry of a JSON value (`TypeError`, `ValueError` or `AttributeError` for a damaged one),
    ``plain`` a JSON value of an entry. ``version`` changes when either does.
    """

    name: str
    version: int
    parsed: Callable[[Any], Entry]
    plain: Callable[[Entry], Any]

    def path(self) -> Path:
        """Where the file is: in ``$CHUNKFT_CACHE``, by default in ``~/.cache/chunkft_fx``."""
        return Path(os.environ.get("CHUNKFT_CACHE") or "~/.cache/chunkft_fx").expanduser() / self.name

    def load(self) -> dict[str, Entry]:
        """The readable entries, by device key; none of a file that is missing, damaged or of another version."""
        path = self.path()
        try:
            content: Any = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s is not readable and is measured anew: %s", path, error)
            return {}
        if not isinstance(content, dict) or content.get("version") != self.version:
            log.warning("%s is not a file of version %d and is measured anew", path, self.version)
            return {}
        if not isinstance(content.get("devices"), dict):
            log.warning("%s is damaged and measured anew: it holds no devices", path)
            return {}
        found: dict[str, Entry] = {}
        for key, value in content["devices"].items():
            try:
                found[key] = self.parsed(value)
            except (TypeError, ValueError, AttributeError) as error:
                log.warning("%s: the entry %r is damaged and measured anew: %s", path, key, error)
        return found

    def store(self, key: str, entry: Entry) -> None:
        """Put an entry in; the file is replaced as a whole, so that a reader never sees half of it."""
        path = self.path()
        devices = {k: self.plain(e) for k, e in (self.load() | {key: entry}).items()}
        part = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"version": self.version, "devices": devices}, indent=1))
            part.replace(path)
        except OSError as error:
            log.warning("%s cannot be written; this process keeps what it measured for itself: %s", path, error)
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def device_key(device: torch.device) -> str:
    """What measurements of a device depend on, as one line: its name, torch's version and the driver."""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _cuda_driver()
    else:
        name, driver = f"{platform.node()} {platform.machine()}", f"{torch.get_num_threads()} threads"
    return f"{device.type} {name}, torch {torch.__version__}, {driver}"


def _cuda_driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return f"driver {found[0] if found else 'unknown'}"
