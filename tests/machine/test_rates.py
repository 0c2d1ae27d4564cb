"""Rates: measured figures make sense, and the cache saves time without ever being trusted or needed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkft_fx.machine import rates as module
from chunkft_fx.machine.rates import Rates, cache_path, calibrate, rates

SOME = Rates({"float32": 1e11, "bfloat16": 2e11}, 2e10, 1e10, 1.1e10, 5e9, 2.5)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Rates]:
    """Measurements become counted stand-ins, each different; the cache is a folder of the test's own."""
    made: list[Rates] = []

    def stand_in(device: torch.device) -> Rates:
        made.append(replace(SOME, launch_us=1.0 + len(made)))
        return made[-1]

    monkeypatch.setenv("CHUNKFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "calibrate", stand_in)
    monkeypatch.setattr(module, "_measured", {})
    return made


def forget() -> None:
    """As if a new process began."""
    module._measured.clear()


def test_the_cpu_is_measured_with_positive_finite_rates() -> None:
    state = torch.get_rng_state()
    found = calibrate("cpu")
    figures = asdict(found)
    by_dtype = figures.pop("matmul_flops_per_s")
    assert set(by_dtype) == {"bfloat16", "float16", "float32", "float64"}
    assert all(math.isfinite(f) and f > 0 for f in [*by_dtype.values(), *figures.values()])
    assert torch.equal(state, torch.get_rng_state())


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        calibrate("meta")


def test_a_link_that_others_used_for_a_while_is_not_taken_for_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("host_to_device_nbytes_per_s", "device_to_host_nbytes_per_s", "both_ways_nbytes_per_s")
    seen = [dict(zip(names, rates, strict=True)) for rates in ((1e9, 5e9, 3e9), (4e9, 2e9, 3.5e9))]
    monkeypatch.setattr(module, "_links", lambda _device, _smaller: seen.pop())
    found = calibrate("cpu")
    assert [getattr(found, name) for name in names] == [4e9, 5e9, 3.5e9]


def test_rates_are_measured_once_and_read_back_by_the_next_process(measured: list[Rates]) -> None:
    first = rates("cpu")
    assert rates(torch.device("cpu")) is first
    forget()
    assert rates("cpu") == first
    assert len(measured) == 1


def test_each_number_of_threads_has_rates_of_its_own(measured: list[Rates]) -> None:
    one = rates("cpu")
    torch.set_num_threads(2)
    two = rates("cpu")
    torch.set_num_threads(1)
    forget()
    assert rates("cpu") == one != two
    assert len(measured) == 2
    assert len(json.loads(cache_path().read_text())) == 2


def _without_a_field(entry: dict[str, Any]) -> None:
    del entry["launch_us"]


def _with_an_unknown_field(entry: dict[str, Any]) -> None:
    entry["speed"] = 1.0


def _with_a_zero(entry: dict[str, Any]) -> None:
    entry["memory_nbytes_per_s"] = 0.0


def _with_a_nan(entry: dict[str, Any]) -> None:
    entry["matmul_flops_per_s"]["float32"] = math.nan


def _with_text(entry: dict[str, Any]) -> None:
    entry["both_ways_nbytes_per_s"] = "fast"


def _without_dtypes(entry: dict[str, Any]) -> None:
    entry["matmul_flops_per_s"] = {}


def _with_a_list(entry: dict[str, Any]) -> None:
    entry["matmul_flops_per_s"] = [1e12]


@pytest.mark.parametrize(
    "damage",
    [
        _without_a_field,
        _with_an_unknown_field,
        _with_a_zero,
        _with_a_nan,
        _with_text,
        _without_dtypes,
        _with_a_list,
    ],
)
def test_a_damaged_entry_is_measured_anew_and_repaired(
    measured: list[Rates], damage: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    rates("cpu")
    entries = json.loads(cache_path().read_text())
    for entry in entries.values():
        damage(entry)
    cache_path().write_text(json.dumps(entries))
    forget()
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.rates"):
        assert rates("cpu") == measured[1]
    assert "damaged" in caplog.text
    forget()
    assert rates("cpu") == measured[1]
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"a": 1}', "\0\0"])
def test_a_damaged_file_is_measured_anew_and_replaced(
    measured: list[Rates], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache_path().parent.mkdir()
    cache_path().write_text(text)
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.rates"):
        rates("cpu")
    assert str(cache_path()) in caplog.text
    forget()
    assert rates("cpu") == measured[0]
    assert len(measured) == 1


def test_entries_of_other_machines_are_kept(measured: list[Rates]) -> None:
    cache_path().parent.mkdir()
    cache_path().write_text(json.dumps({"another machine": asdict(SOME)}))
    rates("cpu")
    entries = json.loads(cache_path().read_text())
    assert entries["another machine"] == asdict(SOME)
    assert len(entries) == 2
    assert [p.name for p in cache_path().parent.iterdir()] == ["rates.json"]


def test_without_a_writable_folder_rates_last_for_the_process(
    measured: list[Rates], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.rates"):
        first = rates("cpu")
    assert "cannot be written" in caplog.text
    assert rates("cpu") is first
    assert len(measured) == 1


def test_the_cache_is_below_the_home_folder_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CHUNKFT_CACHE", raising=False)
    assert cache_path() == tmp_path / ".cache" / "chunkft_fx" / "rates.json"
    monkeypatch.setenv("CHUNKFT_CACHE", str(tmp_path / "other"))
    assert cache_path() == tmp_path / "other" / "rates.json"
