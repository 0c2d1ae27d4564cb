"""Writes and reads bytes as people do: ``"24GB"`` is 24·10^9 and ``"24GiB"`` is 24·2^30."""

from __future__ import annotations

import re
from decimal import Decimal

from chunkft_fx.errors import BudgetParseError

# Parsed here because humanfriendly also takes "24", "24g" and "24 gigs", where a unit that was meant otherwise would be
# taken for another budget; pint evaluates expressions.
UNITS = {"B": 1} | {
    prefix + suffix: base**power
    for suffix, base, prefixes in (("B", 1000, ("k", "M", "G", "T")), ("iB", 1024, ("K", "M", "G", "T")))
    for power, prefix in enumerate(prefixes, start=1)
}
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")


def parse_bytes(budget: str | int) -> int:
    """The number of bytes of ``"24GB"`` (decimal units), ``"13.3GiB"`` (binary units) or an int of bytes.

    Units are B, kB, MB, GB, TB, KiB, MiB, GiB and TiB; one space before the unit is allowed, and
    fractions of a byte are dropped. Raises `BudgetParseError` for anything else, and for less than a byte.
    """
    hint = f'write a number with a unit such as "24GB" or "13.3GiB" (units: {", ".join(UNITS)}), or an int of bytes'
    if isinstance(budget, str):
        written = _WRITTEN.fullmatch(budget.strip())
        if written is None or written[2] not in UNITS:
            raise BudgetParseError(f"budget {budget!r} is not a number of bytes; {hint}")
        nbytes = int(Decimal(written[1]) * UNITS[written[2]])
    elif isinstance(budget, int) and not isinstance(budget, bool):
        nbytes = budget
    else:
        raise BudgetParseError(f"budget {budget!r} is of type {type(budget).__name__}; {hint}")
    if nbytes < 1:
        raise BudgetParseError(f"budget {budget!r} is less than one byte; {hint}")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """Bytes for people, in the largest binary unit that they fill: ``"13.3 GiB"``, ``"64.0 MiB"``, ``"12 B"``."""
    for unit in ("GiB", "MiB", "KiB"):
        if abs(nbytes) >= UNITS[unit]:
            return f"{nbytes / UNITS[unit]:.1f} {unit}"
    return f"{nbytes} B"
