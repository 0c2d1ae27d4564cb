"""Decides where a machine's rates come from: this process, else the file ``rates.json``, else a measurement."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from chunkft_fx.machine.cache import CacheFile, device_key
from chunkft_fx.machine.calibrate import calibrate
from chunkft_fx.machine.rates import Rates

FILE = CacheFile("rates.json", 2, lambda value: Rates(**value), asdict)

# By file and device.
_known: dict[tuple[Path, str], Rates] = {}


def known_rates(device: torch.device | str) -> Rates:
    """The rates of a CUDA device or the CPU; the first time on a machine they are measured (see `calibrate`)."""
    device = torch.device(device)
    path, key = FILE.path(), device_key(device)
    if (path, key) not in _known:
        found = FILE.load().get(key)
        if found is None:
            found = calibrate(device)
            FILE.store(key, found)
        _known[path, key] = found
    return _known[path, key]
