"""Known rates: the cache saves time without ever being trusted or needed."""

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

from chunkft_fx.machine import known_rates as module
from chunkft_fx.machine.known_rates import FILE, known_rates
from chunkft_fx.machine.rates import Rates

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
    monkeypatch.setattr(module, "_known", {})
    return made


def forget() -> None:
    """As if a new process began."""
    module._known.clear()


def test_rates_are_measured_once_and_read_back_by_the_next_process(measured: list[Rates]) -> None:
    first = known_rates("cpu")
    assert known_rates(torch.device("cpu")) is first
    forget()
    assert known_rates("cpu") == first
    assert len(measured) == 1


def test_each_number_of_threads_has_rates_of_its_own(measured: list[Rates]) -> None:
    one = known_rates("cpu")
    torch.set_num_threads(2)
    two = known_rates("cpu")
    torch.set_num_threads(1)
    forget()
    assert known_rates("cpu") == one != two
    assert len(measured) == 2
    assert len(FILE.load()) == 2


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
    known_rates("cpu")
    content = json.loads(FILE.path().read_text())
    for entry in content["devices"].values():
        damage(entry)
    FILE.path().write_text(json.dumps(content))
    forget()
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        assert known_rates("cpu") == measured[1]
    assert "damaged" in caplog.text
    forget()
    assert known_rates("cpu") == measured[1]
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"a": 1}', "\0\0", '{"version": 1, "devices": []}'])
def test_a_damaged_file_is_measured_anew_and_replaced(
    measured: list[Rates], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    FILE.path().parent.mkdir()
    FILE.path().write_text(text)
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        known_rates("cpu")
    assert str(FILE.path()) in caplog.text
    forget()
    assert known_rates("cpu") == measured[0]
    assert len(measured) == 1


def test_entries_of_other_machines_are_kept(measured: list[Rates]) -> None:
    FILE.path().parent.mkdir()
    FILE.path().write_text(json.dumps({"version": FILE.version, "devices": {"another machine": asdict(SOME)}}))
    known_rates("cpu")
    entries = FILE.load()
    assert entries["another machine"] == SOME
    assert len(entries) == 2
    assert [p.name for p in FILE.path().parent.iterdir()] == ["rates.json"]


def test_without_a_writable_folder_rates_last_for_the_process(
    measured: list[Rates], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        first = known_rates("cpu")
    assert "cannot be written" in caplog.text
    assert known_rates("cpu") is first
    assert len(measured) == 1


def test_the_cache_is_below_the_home_folder_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CHUNKFT_CACHE", raising=False)
    assert FILE.path() == tmp_path / ".cache" / "chunkft_fx" / "rates.json"
    monkeypatch.setenv("CHUNKFT_CACHE", str(tmp_path / "other"))
    assert FILE.path() == tmp_path / "other" / "rates.json"


@pytest.mark.parametrize("version", [0, FILE.version + 1, None])
def test_a_file_of_another_version_is_measured_anew_and_replaced(
    measured: list[Rates], version: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    known_rates("cpu")
    content = json.loads(FILE.path().read_text())
    FILE.path().write_text(json.dumps(content | {"version": version}))
    forget()
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        assert known_rates("cpu") == measured[1]
    assert f"not a file of version {FILE.version}" in caplog.text
    assert json.loads(FILE.path().read_text())["version"] == FILE.version


def test_a_file_without_a_version_is_measured_anew(measured: list[Rates], caplog: pytest.LogCaptureFixture) -> None:
    known_rates("cpu")
    content = json.loads(FILE.path().read_text())
    del content["version"]
    FILE.path().write_text(json.dumps(content))
    forget()
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        assert known_rates("cpu") == measured[1]
    assert f"not a file of version {FILE.version}" in caplog.text
