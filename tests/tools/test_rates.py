"""Plans for another machine: rates from the command line, and a plan by them that reads no weight and needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from chunkft_fx.errors import OptionError
from chunkft_fx.tools.rates import BOTH_SHARE, LAUNCH_US, parse_rates
from tests.tools.test_tools import chunkft

CARD = "matmul=165T,memory=1T,link=25G"


def test_rates_are_read_with_their_units() -> None:
    found = parse_rates(CARD, "bfloat16")
    assert found.matmul_flops_per_s == {"bfloat16": 165e12, "float32": 165e12}
    assert (found.memory_nbytes_per_s, found.launch_us) == (1e12, LAUNCH_US)
    assert found.host_to_device_nbytes_per_s == found.device_to_host_nbytes_per_s == 25e9
    assert found.both_ways_nbytes_per_s == pytest.approx(BOTH_SHARE * 25e9)
    given = parse_rates(" matmul = 1.5p, memory=2000000, link=10g, both=9G, launch=4", "float32")
    assert (given.matmul_flops_per_s, given.memory_nbytes_per_s) == ({"float32": 1.5e15}, 2e6)
    assert (given.both_ways_nbytes_per_s, given.launch_us) == (9e9, 4.0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not one of"), ("matmul=1T,memory=1T", "link is missing"), ("matmul", "'matmul' is not one of"),
        (f"{CARD},link=2G", "each once"), (f"{CARD},speed=1", "'speed=1' is not one of"),
        ("matmul=fast,memory=1T,link=1G", "'fast' is not a number"), ("matmul=1T,memory=0,link=1G", "positive"),
        ("matmul=1T,memory=1T,link=", "'' is not a number"), ("matmul=nan,memory=1T,link=1G", "positive and finite"),
    ],
)  # fmt: skip
def test_rates_that_say_nothing_are_refused(text: str, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        parse_rates(text, "bfloat16")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config alone: no weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "vocab_size": 1000}
    config = LlamaConfig(num_hidden_layers=4, use_cache=False, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], folder: Path, rates: str, *more: str) -> tuple[dict[str, object], str]:
    options = ["--budget", "150MB", "--seq-len", "64", "--coverage", "all", "--update", "backward", "--rates", rates]
    chunkft("plan", str(folder), *options, *more)
    printed = capsys.readouterr().out
    chunkft("plan", str(folder), *options, *more, "--json")
    return json.loads(capsys.readouterr().out), printed


def test_a_plan_for_another_machine_needs_neither_it_nor_weights(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    plan, printed = planned(capsys, folder, CARD)
    step = float(str(plan["predicted_step_us"]))
    assert step > 0
    assert f"{64 / step * 1e6:.0f} tokens/s" in printed
    assert "MiB" in printed
    assert "1,000 steps (64,000 tokens) update each weight 1,000 times; a sweep takes 64 tokens" in printed
    slower, _ = planned(capsys, folder, "matmul=165T,memory=1T,link=5G")
    assert float(str(slower["predicted_step_us"])) > step
    smaller, _ = planned(capsys, folder, CARD, "--master", "remainder", "--state-dtype", "bfloat16")
    assert smaller["host_terms"] != plan["host_terms"]


def test_a_plan_tells_what_a_sweep_takes_and_what_a_run_gives_each_weight(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    options = ["--budget", "300MB", "--seq-len", "64", "--rates", CARD, "--chunks", "6"]
    chunkft("plan", str(folder), *options, "--steps", "100")
    printed = capsys.readouterr().out
    assert "a sweep of 42 steps updates every weight 7 times, predicted to take " in printed
    assert "100 steps (6,400 tokens) update each weight 15 to 22 times; a sweep takes 2,688 tokens" in printed
    chunkft("plan", str(folder), *options, "--interval", "1", "--steps", "20")
    printed = capsys.readouterr().out
    assert "a sweep of 6 steps updates every weight once, predicted to take " in printed
    assert "20 steps (1,280 tokens) update each weight 3 to 4 times; a sweep takes 384 tokens" in printed
    with pytest.raises(SystemExit):
        chunkft("plan", str(folder), *options, "--steps", "0")
    assert "steps is 0; it must be 1 or more" in capsys.readouterr().err


def test_a_timeline_of_another_machine_is_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    with pytest.raises(SystemExit):
        chunkft("plan", str(folder), "--rates", CARD, "--timeline")
    assert "leave out --rates" in capsys.readouterr().err


def test_a_device_beside_another_machine_is_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    with pytest.raises(SystemExit):
        chunkft("plan", str(folder), "--rates", CARD, "--device", "cpu")
    assert "leave out one of them" in capsys.readouterr().err


def test_another_machine_needs_what_a_gpu_needs_beside_tensors(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    plan, _ = planned(capsys, folder, CARD)
    terms = dict(plan["terms"])  # type: ignore[call-overload]
    assert terms["library workspaces"] > 0
    assert terms["fragmentation"] > 0


def test_planning_for_another_machine_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr("chunkft_fx.runtime.step.execute", refuse)
    planned(capsys, folder, CARD)
