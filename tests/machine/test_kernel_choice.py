"""Choosing kernels: the library on the CPU, the fastest candidate where one was measured, answers kept in a file."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch

import chunkft_fx
from chunkft_fx.kernels import weight_gradient
from chunkft_fx.kernels.weight_gradient import LIBRARY, Choose, Problem
from chunkft_fx.machine import kernel_choice
from chunkft_fx.machine.kernel_choice import choice, chooser, fastest, operand_nbytes
from chunkft_fx.module import sessions
from chunkft_fx.tools.zoo import tiny
from tests.predict.test_step_memory import compare
from tests.support.equivalence import chunk_gradients

CUDA = torch.device("cuda", 0)
SMALL = Problem(1024, 256, 4096, 0, torch.bfloat16)
TIMES: dict[str | None, float] = {None: 100.0, LIBRARY: 90.0, "128x256": 80.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Problem]:
    """A machine with a GPU on which ``128x256`` is fastest; lists what was measured."""
    asked: list[Problem] = []

    def measure(_: torch.device, problem: Problem) -> dict[str | None, float]:
        asked.append(problem)
        return TIMES

    monkeypatch.setenv("CHUNKFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_choice, "device_key", lambda device: str(device))
    monkeypatch.setattr(kernel_choice, "_too_large", lambda device, problem: None)
    monkeypatch.setattr(kernel_choice, "_measured", measure)
    monkeypatch.setattr(kernel_choice, "_known", {})
    return asked


def forget() -> None:
    kernel_choice._known.clear()


def cache(folder: Path) -> Path:
    return folder / "cache" / "kernels.json"


def devices(entries: dict[str, object]) -> str:
    """The text of a cache file."""
    return json.dumps({"version": kernel_choice.FILE.version, "devices": entries})


def test_on_the_cpu_it_is_always_the_library(measured: list[Problem]) -> None:
    assert chooser(torch.device("cpu")) is None
    assert not measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_have_no_kernel(
    measured: list[Problem], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernel_choice.SWITCH, "1")
    choose = chooser(CUDA)
    assert choose is not None
    assert choose(Problem(1024, 256, 4096, 0, dtype)) is None
    assert not measured


def test_a_problem_is_measured_once_and_read_back_by_the_next_process(measured: list[Problem]) -> None:
    other = Problem(1024, 4096, 256, 1, torch.float16)
    for _ in range(2):
        assert [choice(CUDA, p) for p in (SMALL, other)] == ["128x256"] * 2
    forget()
    assert choice(CUDA, SMALL) == choice(CUDA, other) == "128x256"
    assert measured == [SMALL, other]


def test_a_candidate_must_save_time_worth_speaking_of() -> None:
    assert fastest(TIMES) == "128x256"
    assert fastest({None: 100.0, LIBRARY: 99.0}) is None
    assert fastest({None: 100.0, LIBRARY: 97.0, "128x256": 99.0}) == LIBRARY
    assert fastest({None: 100.0}) is None


def test_what_does_not_fit_is_left_to_the_library_and_not_written_down(
    measured: list[Problem], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_choice, "_too_large", lambda device, problem: "5 bytes are free")
    with caplog.at_level(logging.INFO, logger="chunkft_fx.machine.kernel_choice"):
        assert choice(CUDA, SMALL) is None
    assert "5 bytes are free" in caplog.text
    assert not measured and not cache(tmp_path).exists()


def test_memory_that_runs_out_leaves_the_library(
    measured: list[Problem], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel_choice, "_measured", lambda device, problem: None)
    assert choice(CUDA, SMALL) is None
    assert not cache(tmp_path).exists()


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is held to 1000 MiB, of which 900 are reserved and 800 allocated."""
    mib = 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70_000 * mib, 80_000 * mib))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1 / 80)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 900 * mib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 800 * mib)
    assert operand_nbytes(SMALL) < 200 * mib
    assert kernel_choice._too_large(CUDA, SMALL) is None
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 890 * mib)
    large = Problem(8192, 1024, 4096, 0, torch.bfloat16)
    assert 110 * mib < operand_nbytes(large) < kernel_choice.MOST_NBYTES
    assert "are free" in str(kernel_choice._too_large(CUDA, large))
    assert "more than" in str(kernel_choice._too_large(CUDA, Problem(2**20, 256, 4096, 0, torch.bfloat16)))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", devices({"cuda:0": 1}), devices({"cuda:0": {"8 8": None}}), '{"devices": {}}']
)
def test_a_damaged_file_is_measured_anew_and_replaced(
    measured: list[Problem], text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache(tmp_path).parent.mkdir()
    cache(tmp_path).write_text(text)
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        assert choice(CUDA, SMALL) == "128x256"
    assert "kernels.json" in caplog.text
    forget()
    assert choice(CUDA, SMALL) == "128x256"
    assert measured == [SMALL]


@pytest.mark.parametrize(
    "entry",
    [{"1024 256 4096 0 bfloat16": "64x64"}, {"1024 256 4096 2 bfloat16": None}, {"1 2 3 0 float": None, "x": 1}],
)
def test_a_damaged_entry_loses_only_its_device(
    measured: list[Problem], entry: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choice(torch.device("cuda", 1), SMALL)
    known = json.loads(cache(tmp_path).read_text())["devices"]
    cache(tmp_path).write_text(devices(known | {"cuda:0": entry}))
    forget()
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        assert choice(CUDA, SMALL) == "128x256"
    assert "damaged" in caplog.text
    assert kernel_choice.FILE.load().keys() == {"cuda:0", "cuda:1"}
    assert [p.name for p in cache(tmp_path).parent.iterdir()] == ["kernels.json"]


def test_without_a_writable_folder_choices_last_for_the_process(
    measured: list[Problem], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        assert choice(CUDA, SMALL) == choice(CUDA, SMALL) == "128x256"
    assert "cannot be written" in caplog.text
    assert measured == [SMALL]


def choose_everywhere(monkeypatch: pytest.MonkeyPatch, by: str = LIBRARY) -> list[Problem]:
    """Let sessions take the operator for every problem; lists the problems."""
    asked: list[Problem] = []

    def choose(problem: Problem) -> str:
        asked.append(problem)
        return by

    def always(_: torch.device) -> Choose:
        return choose

    monkeypatch.setattr(sessions, "chooser", always)
    return asked


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_step_with_the_operator_gives_the_librarys_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("llama", dtype=torch.bfloat16)
    values = batch(2, 12, 0)
    usual = chunk_gradients(
        chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=5, interval=1, backend=backend), values
    )
    asked = choose_everywhere(monkeypatch)
    lowered = chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=5, interval=1, backend=backend)
    found = chunk_gradients(lowered, values)
    assert asked
    assert sum(v.counts["lower_triton"] for v in lowered.variants if v.backward is not None) > 0
    assert [float(a) for a in found[0]] == [float(b) for b in usual[0]]
    for name, expected in usual[1].items():
        # once rounded to bfloat16 at most, on one of the two sides
        atol = 2.0**-8 * float(expected.abs().max())
        torch.testing.assert_close(found[1][name], expected, rtol=torch.finfo(torch.bfloat16).eps, atol=atol)


def test_the_memory_model_follows_a_step_with_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, with gradients that are kept as they come; what the CPU widens inside is seen by no tracker."""
    choose_everywhere(monkeypatch)
    monkeypatch.setattr(weight_gradient, "workspace", lambda node, sizes: 0)
    model, batch = tiny("mlp", dtype=torch.bfloat16)
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, backend="eager")
    for chunk in range(3):
        compiled.activate(chunk)
        compare(compiled, batch(2, 12, 0))
    assert any(v.counts.get("lower_triton") for v in compiled.variants)
