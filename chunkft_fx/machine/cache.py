"""Reads and writes the cache: what was measured on a machine, a file by device, and what was decided, a file each.

A file of measurements holds ``{"version": ..., "devices": {...}}``, one entry for each device, torch version and
driver. A cache only saves time: a file that is damaged, of another version or not writable is worked around, and
logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import threading
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
        return _root() / self.name

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
        devices = {k: self.plain(e) for k, e in (self.load() | {key: entry}).items()}
        _put(self.path(), json.dumps({"version": self.version, "devices": devices}, indent=1))


@dataclass(frozen=True)
class CacheFolder:
    """A folder of the cache with a file for each key, which together take at most ``most_nbytes`` bytes."""

    name: str
    most_nbytes: int

    def path(self, key: str) -> Path:
        """Where the file of a key is; a key is a name that files can have."""
        return _root() / self.name / key

    def load(self, key: str) -> str | None:
        """The text that was stored last for a key, None where there is none that can be read. Counts as its use."""
        path = self.path(key)
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is not readable: %s", path, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return text

    def store(self, key: str, text: str) -> None:
        """Put a text in the place of what is stored for its key; files that were used longest ago give way."""
        path = self.path(key)
        _put(path, text)
        taken = 0
        for other in sorted(path.parent.glob("*"), key=_last_use, reverse=True):
            with contextlib.suppress(OSError):  # another process may have been faster
                taken += other.stat().st_size
                if taken > self.most_nbytes:
                    other.unlink()


def _root() -> Path:
    return Path(os.environ.get("CHUNKFT_CACHE") or "~/.cache/chunkft_fx").expanduser()


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _put(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a reader never sees half of it, whoever else writes it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_native_id()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        log.warning("%s cannot be written; this process keeps for itself what it found: %s", path, error)
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
