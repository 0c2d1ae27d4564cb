"""``chunkft train`` from its options to a model, and ``chunkft chat`` with it: each run as the entry point runs it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from chunkft_fx.checkpoints.load import read
from chunkft_fx.errors import OptionError
from chunkft_fx.tools.models.evaluate import Score
from chunkft_fx.tools.report.best import Best
from chunkft_fx.tools.report.log import Log, tracking
from chunkft_fx.tools.training.checkpoint import require_checkpoint
from chunkft_fx.tools.zoo import tiny
from tests.support.tiny_text import character_tokenizer, tiny_folder
from tests.tools.test_load import no_weights
from tests.tools.test_tools import EAGER, chunkft

CHATS = [
    {"messages": [{"role": "user", "content": f"{i} of?"}, {"role": "assistant", "content": "ab" * (i % 3 + 1)}]}
    for i in range(20)
]
SHORT = ["--seq-len", "48", "--chat-template", "zephyr", "--lr", "0.01"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, CHATS)))
    return path


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_file_of_options_trains_keeps_the_best_and_chats(
    folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "out", tmp_path / "run.toml"
    config.write_text(
        f"""
model = "{folder}"
data = ["{chats}"]
out = "{out}"
budget = "1GB"
backend = "eager"
device = "cpu"
seq_len = 48
chat-template = "zephyr"
lr = 1.0
steps = 6
optimizer = "sgd"
optimizer-options = {{ momentum = 0.9, nesterov = true }}
schedule-options = {{ num_cycles = 0.5 }}
eval-split = 0.2
eval-every = 2
save-every = 2
track = ["tensorboard"]
"""
    )
    chunkft("train", str(config), "--lr", "0.05")
    printed = capsys.readouterr().out
    scores = {line["step"]: line["eval_loss"] for line in logged(out) if "eval_loss" in line}
    assert list(scores) == [2, 4, 6]
    assert [line["step"] for line in logged(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert logged(out)[0]["lr"] == 0.05, "a flag wins over the file"
    best = json.loads((out / "best" / "score.json").read_text())
    assert scores[best["step"]] == best["loss"] == min(scores.values())
    assert f"the best model, of step {best['step']} with held-out loss" in printed
    assert list((out / "runs").glob("events.out.tfevents.*"))
    saved = read(require_checkpoint(out)).optimizer
    assert saved is not None and saved["param_groups"][0]["nesterov"] is True
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "best").config.model_type == "llama"
    monkeypatch.setattr("sys.stdin", io.StringIO("1 of?\n\n/new\n2 of?\n"))
    chunkft("chat", str(out), "--max-new-tokens", "5", "--temperature", "0", "--system", "be", "--device", "cpu")
    answers = capsys.readouterr().out
    assert answers.count("\n") >= 2 and ">" not in answers.split("\n")[0]


def test_the_same_command_goes_on_from_a_checkpoint_by_itself(
    folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, twice = tmp_path / "whole", tmp_path / "twice"
    arguments = ["train", str(folder), str(chats), *EAGER, *SHORT, "--coverage", "all", "--schedule", "constant"]
    chunkft(*arguments, "--out", str(whole), "--steps", "5")
    chunkft(*arguments, "--out", str(twice), "--steps", "3", "--save-every", "3")
    with (twice / "log.jsonl").open("a") as log:  # as a killed run leaves it
        log.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    capsys.readouterr()
    chunkft(*arguments, "--out", str(twice), "--steps", "5", "--save-every", "3")
    assert "going on after step 3" in capsys.readouterr().out
    expected, found = (load_file(out / "model.safetensors") for out in (whole, twice))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [line["loss"] for line in logged(twice)] == [line["loss"] for line in logged(whole)]
    with pytest.warns(match="holds a model, which this run replaces when it ends"):
        chunkft(*arguments, "--out", str(twice), "--steps", "1", "--resume", "never")
    assert [line["step"] for line in logged(twice)] == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rat = 1",
            "has the key learning_rat, which train does not have; known are accumulate, add-special-tokens",
        ),
        ("learning_rate = 1", "has the key learning_rate, which train does not have; did you mean lr?"),
        ("num_train_epochs = 1", "did you mean epochs?"),
        ("batch_sise = 1", "has the key batch_sise, which train does not have; did you mean batch-size?"),
        ("lr = [1, 2]", "lr has a list, and takes one value"),
        ("lr = ", "is not TOML"),
        ("seq_len = 1", "seq-len is 1; it must be 2 or more"),
        ("update = 'backward'\nchunks = 4\nmax_grad_norm = 0", "--chunks 4 leaves it one chunk"),
    ],
)
def test_a_mistake_in_a_file_of_options_is_found_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'model = "no"\ndata = "no"\nout = "{tmp_path}"\nbudget = "1GB"\n{text}\n')
    monkeypatch.setattr("chunkft_fx.tools.setup.job.load_config", no_weights)
    for arguments in ([str(config)], ["--config", str(config)]):
        with pytest.raises(SystemExit) as ended:
            chunkft("train", *arguments)
        assert ended.value.code == 2
        complaint = capsys.readouterr().err
        assert message in complaint and complaint.count("\n") == 1


def test_a_number_that_is_none_is_refused_in_a_file_as_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'model = "no"\ndata = "no"\nout = "{tmp_path}"\nbudget = "1GB"\nsteps = 1.5\n')
    with pytest.raises(SystemExit):
        chunkft("train", str(config))
    assert "'--steps': Input should be a valid integer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no model; give MODEL"),
        (["model"], "there is no data; give files"),
        (["--config", "nowhere.toml"], "the options in nowhere.toml cannot be read"),
    ],
)
def test_a_command_without_model_or_data_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        chunkft("train", *arguments, "--out", str(tmp_path), *EAGER)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rates", ["", "matmul=165T,memory=1T,link=25G"])
def test_a_dry_run_shows_the_first_row_the_plan_and_what_the_run_takes(
    folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    rates: str,
) -> None:  # fmt: skip
    if rates:
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
    out = tmp_path / "out"
    device = ["--device", "auto", "--rates", rates] if rates else []
    chunkft(
        "train", str(folder), str(chats), "--out", str(out), *EAGER, *SHORT, "--dry-run", "--epochs", "3",
        "--batch-size", "2", "--coverage", "all", *device,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "  + 'a b" in printed and "  - '< | u s e r | >" in printed
    rows = int(re.findall(r"([\d,]+) rows of 48", printed)[0])
    steps = -(-3 * (rows // 2) // 1)
    assert f"{steps} steps over {steps * 96:,} tokens update each weight {steps} times" in printed
    assert ("predicted to take 0.00 hours" if rates else "plan for a GPU with --rates") in printed
    assert "predicted peak" in printed
    assert not out.exists()


def test_a_classifier_is_made_of_an_encoder_and_says_how_often_it_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, data = tiny_folder(tmp_path / "model", "bert"), tmp_path / "out", tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"{'abc'[i % 3] * 5},{'xyz'[i % 3]}\n" for i in range(30)))
    arguments = ["train", str(folder), str(data), "--out", str(out), *EAGER, "--task", "classification"]
    arguments += ["--seq-len", "16"]
    with pytest.warns(match="the classifier's head begins with random values"):
        chunkft(
            *arguments, "--steps", "16", "--batch-size", "6", "--lr", "0.005", "--eval", str(data), "--coverage", "all"
        )
    assert logged(out)[-1]["eval_accuracy"] > 0.9
    assert "% right, the best so far" in capsys.readouterr().out
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.id2label == {0: "x", 1: "y", 2: "z"}
    found = load_file(out / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    # a BERT for masked tokens has no pooler, and positions behind the longest text are not trained
    changed = [name for name in before.keys() & found.keys() if not torch.equal(before[name], found[name])]
    assert len(changed) == len(before.keys() & found.keys())


def test_an_encoder_learns_masked_tokens(tmp_path: Path) -> None:
    folder, out = tiny_folder(tmp_path / "model", "bert"), tmp_path / "out"
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    chunkft(
        "train", str(folder), str(tmp_path / "a.txt"), "--out", str(out), *EAGER, "--task", "masked", "--seq-len", "32",
        "--batch-size", "4", "--steps", "20", "--lr", "0.003", "--coverage", "all",
    )  # fmt: skip
    losses = [line["loss"] for line in logged(out)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_rows_are_padded_where_a_model_would_mix_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "model", "roberta")
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    arguments = [
        "train", str(folder), str(tmp_path / "a.txt"), *EAGER, "--task", "masked", "--seq-len", "32", "--steps", "1",
        "--coverage", "all",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        chunkft(*arguments, "--out", str(tmp_path / "out"))
    assert "give --no-packing" in capsys.readouterr().err
    chunkft(*arguments, "--out", str(tmp_path / "out"), "--no-packing")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_best_model_stays_until_a_better_one_comes(tmp_path: Path) -> None:
    model = tiny("llama")[0]
    best = Best(tmp_path, model, character_tokenizer())
    assert best.offer(1, Score(2.0))
    assert not best.offer(2, Score(2.0))
    assert not best.offer(3, Score(float("nan")))
    again = Best(tmp_path, model, character_tokenizer())
    again.resume(2)
    assert (again.step, again.loss) == (1, 2.0)
    assert again.offer(4, Score(1.5))
    (tmp_path / "best" / "config.json").unlink()  # as a run that was killed while it saved leaves it
    damaged = Best(tmp_path, model, character_tokenizer())
    damaged.resume(4)
    assert damaged.offer(5, Score(9.0))


def test_trackers_get_what_the_log_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    done: list[Any] = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, run_name: str) -> None:
            done.append(run_name)

        def start(self) -> None:
            done.append("start")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            done.append(values)

        def log(self, values: dict[str, Any], step: int) -> None:
            done.append((step, values))

        def finish(self) -> None:
            done.append("finish")

    monkeypatch.setattr(accelerate.tracking, "WandBTracker", Tracker)
    with pytest.raises(ZeroDivisionError), tracking(["wandb"], tmp_path, {"lr": 0.1, "data": ["a"]}) as log:
        assert isinstance(log, Log)
        log.begin(0)
        log.score(3, Score(1.5, 0.5))
        raise ZeroDivisionError
    values = {"eval_loss": 1.5, "eval_accuracy": 0.5}
    assert done == [tmp_path.name, "start", {"lr": 0.1, "data": "['a']"}, (3, values), "finish"]
    assert logged(tmp_path) == [{"step": 3, **values}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top-p 0.0"),
        (["--max-new-tokens", "0"], "max-new-tokens is 0"),
        (["--system", "be kind"], "has no chat template; leave it out"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_before_the_model_is_read(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
    with pytest.raises(SystemExit) as ended:
        chunkft("chat", str(folder), *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_template_goes_on_with_each_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncd"))
    chunkft("chat", str(folder), "--max-new-tokens", "3", "--seed", "1", "--device", "cpu")
    assert len(capsys.readouterr().out.split("\n")) >= 3


def test_an_optimizer_that_refuses_its_options_is_an_error_of_options(
    folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        chunkft(
            "train", str(folder), str(chats), "--out", str(tmp_path / "out"), *EAGER, *SHORT, "--steps", "1",
            "--optimizer-options", '{"betas": [2, 3]}',
        )  # fmt: skip
    assert ended.value.code == 2
    assert "betas" in capsys.readouterr().err
    assert issubclass(OptionError, ValueError)


def test_any_class_of_torch_optimizers_trains_by_its_path(folder: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chunkft(
        "train", str(folder), str(chats), "--out", str(out), *EAGER, *SHORT, "--steps", "2", "--save-every", "2",
        "--optimizer", "torch.optim.NAdam", "--optimizer-options", '{"betas": [0.8, 0.9]}',
    )  # fmt: skip
    saved = read(require_checkpoint(out)).optimizer
    assert saved is not None and saved["param_groups"][0]["betas"] == (0.8, 0.9)
    assert {"mu_product", "step"} <= {name for name, _ in saved["state"][0]["slice_steps"][0][3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "torch.optim.Nadam"], "such as torch.optim.NAdam"),
        (["--optimizer", "torch.nn.Linear"], "it must be one of adamw"),
        (["--optimizer", "nadam"], "it must be one of adamw"),
        (["--optimizer", "torch.optim.Rprop"], "give --weight-decay 0"),
        (["--optimizer", "torch.optim.NAdam", "--optimizer-options", '{"beta": 1}'], "has beta, which"),
        (["--optimizer", "torch.optim.NAdam", "--master", "remainder"], "master is remainder"),
    ],
)
def test_what_is_no_optimizer_or_not_its_option_is_named_before_the_model_is_read(
    folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        chunkft("train", str(folder), str(chats), "--out", str(tmp_path / "out"), *EAGER, *SHORT, *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_commands_of_the_readme_lead_to_a_model_and_a_chat(
    folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, with a small model in the place of the one that they load, and on the CPU."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    block = re.search(r"## Command line\n.*?```\n(pip install .*?)```", readme, re.DOTALL)
    assert block is not None
    commands = [line.split() for line in block[1].splitlines()]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("1 of?\n"))
    small = ["--backend", "eager", "--device", "cpu", "--seq-len", "128", "--chat-template", "zephyr"]
    for program, *arguments in commands[1:]:
        assert program == "chunkft"
        arguments = [str(folder) if "/" in a else a for a in arguments]
        chunkft(*arguments, *(small if arguments[0] == "train" else ["--max-new-tokens", "3"]))
    assert (tmp_path / "tuned" / "model.safetensors").exists()
