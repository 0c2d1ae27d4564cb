"""Reads the rates of another machine from the command line, to plan for it without it."""

from __future__ import annotations

from chunkft_fx.errors import OptionError
from chunkft_fx.machine.rates import ALONE, RankLink, Rates

# What each name of the option stands for, and whether it may be left out.
NAMES = {"matmul": False, "memory": False, "link": False, "both": True, "launch": True}
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
# Of the link's rate one way, what it keeps each way when both are busy; one H200 keeps 0.83 to 0.91.
BOTH_SHARE = 0.85
LAUNCH_US = 7.0
# Bus bandwidths of links between GPUs, bytes a second: two H200 were measured, PCIe 4.0 x16 is 80% of its data sheet's.
LINKS = {"nvlink": 240e9, "pcie": 25e9}


def parse_rates(text: str, dtype: str) -> Rates:
    """The rates in text such as ``"matmul=165T,memory=1T,link=25G"``, for matrix products in ``dtype``.

    ``matmul`` is in operations a second (a multiply-add counting two), ``memory`` in bytes a second that are read or
    written on the device, ``link`` and ``both`` in bytes a second between host and device, one way alone and each way
    with both busy, ``launch`` in microseconds that one more small kernel takes. Raises `OptionError` for anything else.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, figure = (piece.strip() for piece in part.partition("="))
        if not equals or name not in NAMES or name in found:
            raise _wrong(text, f"{part!r} is not one of {', '.join(f'{n}=NUMBER' for n in NAMES)}, each once")
        found[name] = _number(text, figure)
    missing = [name for name, may_be_left_out in NAMES.items() if not may_be_left_out and name not in found]
    if missing:
        raise _wrong(text, f"{missing[0]} is missing")
    matmul = dict.fromkeys({dtype, "float32"}, found["matmul"])
    link, both = found["link"], found.get("both", BOTH_SHARE * found["link"])
    try:
        return Rates(matmul, found["memory"], link, link, both, found.get("launch", LAUNCH_US))
    except ValueError as error:
        raise _wrong(text, str(error)) from None


def _number(text: str, figure: str) -> float:
    unit = figure[-1:].upper()
    try:
        return float(figure[:-1]) * UNITS[unit] if unit in UNITS else float(figure)
    except ValueError:
        raise _wrong(text, f"{figure!r} is not a number, with K, M, G, T or P behind it") from None


def _wrong(text: str, why: str) -> OptionError:
    return OptionError(f'rates are {text!r}: {why}; give them as "matmul=165T,memory=1T,link=25G"')


def parse_link(ranks: int, text: str) -> RankLink:
    """The link of so many ranks: a word of `LINKS`, or a rate such as ``240G``; else raises `OptionError`."""
    if ranks < 1:
        raise OptionError(f"--ranks {ranks} must be 1 or more")
    if ranks == 1:
        return ALONE
    if text in LINKS:
        return RankLink(ranks, LINKS[text])
    try:
        rate = _number(text, text)
    except OptionError:
        rate = 0.0
    if not rate > 0:
        raise OptionError(f"--link {text!r} is neither {' nor '.join(LINKS)} nor a rate such as 240G")
    return RankLink(ranks, rate)
