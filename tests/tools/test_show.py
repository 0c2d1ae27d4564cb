"""What the command line shows of steps that cover all parameters: pieces in the program, and when a step does what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import chunkft_fx
from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.graph import ops
from chunkft_fx.plan.pieces import moving_nbytes
from chunkft_fx.predict.step_clock import COMPUTE, INCOMING, LANES, OUTGOING, UPDATES, Span
from chunkft_fx.tools.show import clock, pieces
from chunkft_fx.tools.zoo import tiny
from tests.support.forced_splits import unsplit
from tests.tools.test_rates import CARD
from tests.tools.test_tools import chunkft

SMALL = ["--budget", "1GB", "--seq-len", "16", "--backend", "eager"]


def compiled(update: str, budget: int | str = "1GB") -> Any:
    model, batch = tiny("llama")
    module = chunkft_fx.compile(model, budget, coverage="all", backend="eager")
    module.optimizer_held = chunkft_fx.AdamW(module, update=update)
    module(**batch(2, 16, 0))
    return module


def test_each_piece_is_shown_where_the_program_has_its_nodes() -> None:
    module = compiled("backward")
    program = module.program.module
    placed = pieces.places(program)
    assert sorted(placed) == list(range(len(module.plan.policy.pieces)))
    lines = pieces.table(module).splitlines()
    calls = {n for n in program.graph.nodes if n.op == "call_module"}
    for node in program.graph.find_nodes(op="call_function", target=ops.update):
        i = node.args[1]
        before = node.prev
        while before not in calls:
            before = before.prev
        region = program.get_submodule(str(before.target)).region
        assert placed[i][ops.update] == f"{region.label} backward"
        (line,) = [text for text in lines if text.startswith(f"{i} ")]
        nbytes = moving_nbytes(module.plan.policy.pieces[i], dict(module.named_parameters()), frozenset())
        assert format_bytes(nbytes) in line and line.endswith(f"{region.label} backward")
        assert f"{module.plan.policy.pieces[i].numel:,}" in line
    assert placed[0][ops.fetch_states].endswith("backward")
    assert all(len(line) <= 120 for line in lines)


def test_pieces_that_the_optimizers_step_updates_have_no_place_in_the_program() -> None:
    module = compiled("step")
    assert pieces.places(module.program.module) == {}
    text = pieces.table(module)
    assert "at the optimizer's step" in text and "behind" not in text


def test_a_piece_moves_its_streamed_weights_too() -> None:
    with unsplit(), pytest.raises(BudgetInfeasible) as smallest:
        compiled("backward", 1000)
    module = compiled("backward", smallest.value.smallest_budget_bytes)
    held = dict(module.named_parameters())
    assert module.plan.streamed
    away = sum(moving_nbytes(p, held, module.plan.streamed) for p in module.plan.policy.pieces)
    alone = sum(moving_nbytes(p, held, frozenset()) for p in module.plan.policy.pieces)
    assert away - alone == sum(held[name].nbytes for name in module.plan.streamed)


def test_inspect_shows_a_step_that_covers_all_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    chunkft("inspect", "tiny:llama", "--full", "--update", "backward", *SMALL)
    printed = capsys.readouterr().out
    assert "every step updates all parameters in" in printed
    assert "chunkft_fx.update.default" in printed
    assert printed.split("pieces: updated")[1].count("backward") > 30
    with pytest.raises(SystemExit):
        chunkft("inspect", "tiny:llama", "--full", "--chunks", "4", *SMALL)
    assert "leave chunks out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        chunkft("inspect", "tiny:llama", "--update", "backward", *SMALL)
    assert 'coverage="all"' in capsys.readouterr().err


SPANS = (
    Span(COMPUTE, "a forward", 0.0, 10.0),
    Span(INCOMING, "states of piece 0", 5.0, 15.0, 100),
    Span(COMPUTE, "a backward", 12.0, 20.0),
    Span(UPDATES, "update of piece 0", 20.0, 21.0),
    Span(OUTGOING, "states of piece 0", 21.0, 31.0, 100),
)


def test_bytes_are_shared_out_among_the_calls_that_they_move_beside() -> None:
    assert clock.rows(SPANS) == [
        clock.Row("a forward", 0.0, 0.0, 10.0, 0.0, 50, 0),
        clock.Row("a backward", 12.0, 2.0, 8.0, 0.0, 50, 0),
        clock.Row(clock.BEHIND, 20.0, 1.0, 0.0, 1.0, 0, 100),
    ]
    assert [row.what for row in clock.rows(SPANS[:3])] == ["a forward", "a backward"]


def test_what_comes_before_the_first_call_has_a_row_so_that_no_bytes_are_lost() -> None:
    early = (Span(INCOMING, "states of piece 1", -10.0, 5.0, 60), *SPANS)
    found = clock.rows(early)
    assert found[0] == clock.Row(clock.BEFORE, -10.0, 0.0, 0.0, 0.0, 40, 0)
    assert [sum(row.incoming for row in found), sum(row.outgoing for row in found)] == [160, 100]
    assert [row.what for row in found[1:]] == [row.what for row in clock.rows(SPANS)]


def test_a_trace_has_every_span_on_the_thread_of_its_lane() -> None:
    events = json.loads(clock.chrome_trace(SPANS))["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert tuple(threads.values()) == LANES
    done = [e for e in events if e["ph"] == "X"]
    assert [(threads[e["tid"]], e["name"], e["ts"], e["ts"] + e["dur"], e["args"]["bytes"]) for e in done] == [
        (s.lane, s.what, s.begin_us, s.end_us, s.nbytes) for s in SPANS
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config alone: no weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 300}
    config = LlamaConfig(num_hidden_layers=3, use_cache=False, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("update", ["backward", "step"])
def test_plan_shows_a_step_against_the_clock(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, update: str
) -> None:
    options = [str(folder), "--coverage", "all", "--update", update, "--rates", CARD, "--budget", "150MB"]
    options += ["--seq-len", "16"]
    out = tmp_path / "trace.json"
    chunkft("plan", *options, "--timeline", "--trace", str(out))
    printed = capsys.readouterr().out
    beside = tmp_path / "beside.json"
    chunkft("plan", *options, "--json", "--trace", str(beside))
    assert beside.read_text() == out.read_text()
    link = json.loads(capsys.readouterr().out)["link"]
    assert f"brings {format_bytes(link['incoming_nbytes'])} to the device" in " ".join(printed.split())
    assert ("hides from" in printed) == (update == "backward")
    calls = printed.split("to the host\n")[1].splitlines()
    assert sum("forward" in line for line in calls) == sum(" backward" in line for line in calls) == 3 + 2
    done = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X"]
    moved = {lane: sum(e["args"]["bytes"] for e in done if e["tid"] == LANES.index(lane)) for lane in LANES}
    assert (moved[INCOMING], moved[OUTGOING]) == (link["incoming_nbytes"], link["outgoing_nbytes"])
    assert max(e["ts"] + e["dur"] for e in done if e["tid"] < 2) == pytest.approx(link["step_us"])


def test_traces_of_steps_without_times_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    for options, why in (
        (["--coverage", "all"], "no times of this machine"),
        (["--coverage", "one"], "give --coverage all"),
        (["--chunks", "2"], "give --coverage all"),
    ):
        with pytest.raises(SystemExit):
            chunkft("plan", "tiny:llama", *SMALL, "--trace", str(out), *options)
        assert why in capsys.readouterr().err
    assert not out.exists()
    module = compiled("backward")
    assert module.spans == ()
