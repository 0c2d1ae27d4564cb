"""What a run changes of a model: frozen parameters, added tokens, noise, smoothed labels; beside a plain loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune
from transformers.trainer_pt_utils import LabelSmoother

import chunkft_fx
from chunkft_fx.checkpoints.load import read
from chunkft_fx.errors import CheckpointMismatch, OptionError
from chunkft_fx.tools.changes.frozen import fits, freeze
from chunkft_fx.tools.changes.noise import add_noise
from chunkft_fx.tools.changes.smoothing import smooth_labels
from chunkft_fx.tools.changes.vocabulary import add_tokens, fit_embeddings
from chunkft_fx.tools.changes.wanted import ModelChanges
from chunkft_fx.tools.data.rows import Sequences
from chunkft_fx.tools.models.evaluate import evaluate
from chunkft_fx.tools.training.checkpoint import _check_options, require_checkpoint
from chunkft_fx.tools.training.data import Batches
from chunkft_fx.tools.training.loop import train
from chunkft_fx.tools.training.options import TrainOptions
from chunkft_fx.tools.zoo import tiny
from tests.support.tiny_text import character_tokenizer, tiny_folder
from tests.tools.test_load import no_weights
from tests.tools.test_tools import EAGER, chunkft, sequences

STEPS = TrainOptions(3, 2, lr=1e-2, schedule="constant", max_grad_norm=None)


def trained(model: nn.Module, **more: Any) -> nn.Module:
    module = chunkft_fx.compile(model, "1GB", backend="eager", coverage="all")
    train(module, sequences(), STEPS, **more)
    return module


def plain_steps(model: Any, loss_of: Any) -> None:
    """The same steps by torch alone."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    batches = Batches(Sequences(sequences()), 2, STEPS.seed)
    for _ in range(STEPS.steps):
        loss_of(model, next(batches)["input_ids"]).backward()
        optimizer.step()
        optimizer.zero_grad()


def own_loss(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def assert_equal(found: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    other = dict(expected.named_parameters())
    for name, value in found.named_parameters():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1", "model.layers.1.mlp.weight", True),
        ("layers.1", "model.layers.12.mlp.weight", False),
        ("layers.[0-2]", "model.layers.2.mlp.weight", True),
        ("layers.*.mlp", "model.layers.7.mlp.up.weight", True),
        ("embed", "model.embed_tokens.weight", False),
        ("embed*", "model.embed_tokens.weight", True),
        ("model.embed_tokens.weight", "model.embed_tokens.weight", True),
        ("*.bias", "model.norm.bias", True),
    ],
)
def test_a_pattern_is_a_run_of_whole_parts_of_a_name(pattern: str, name: str, expected: bool) -> None:
    assert fits(pattern, name) == expected


def test_smoothed_labels_have_the_loss_of_a_trainer_and_scores_the_plain_one() -> None:
    plain: Any = tiny("llama", torch.float64)[0]

    def loss_of(model: Any, ids: Tensor) -> Tensor:
        outputs = model(input_ids=ids, use_cache=False)
        log_probs = outputs.logits[:, :-1].log_softmax(-1)
        loss = -0.7 * log_probs.gather(-1, ids[:, 1:, None]).mean() - 0.3 * log_probs.mean()
        torch.testing.assert_close(LabelSmoother(0.3)(outputs, ids, shift_labels=True), loss, rtol=1e-6, atol=0)
        return loss

    plain_steps(plain, loss_of)
    model: Any = tiny("llama", torch.float64)[0]
    smooth_labels(model, 0.3, "causal")
    module = trained(model)
    assert_equal(module, plain, 1e-8)
    with torch.no_grad():
        expected = float(own_loss(plain.eval(), sequences()))
    assert evaluate(module, sequences(), 2).loss == pytest.approx(expected, rel=1e-4)  # type: ignore[arg-type]


def test_smoothed_labels_of_classes_are_not_shifted() -> None:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(tiny("llama")[0].config).eval()
    ids, labels = sequences()[:4], torch.tensor([0, 1, 1, 0])
    smooth_labels(model, 0.2, "classification")
    outputs = model(input_ids=ids, labels=labels)
    expected = nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(outputs.loss, expected)


def test_a_model_with_a_loss_of_its_own_is_refused_for_smoothing() -> None:
    model = tiny("bert")[0]
    with pytest.raises(OptionError, match="a BertForMaskedLM computes its loss itself"):
        smooth_labels(model, 0.1, "masked")
    assert model.training and not hasattr(model, "_loss_function")


def test_noise_is_that_of_transformers_and_not_there_in_evaluation() -> None:
    ids = sequences()[:2]
    outputs = []
    for add in (lambda m: add_noise(m, 5.0), lambda m: activate_neftune(m, 5.0), lambda m: None):
        model: Any = tiny("llama")[0]
        add(model)
        torch.manual_seed(3)
        noisy = model.get_input_embeddings()(ids)
        model.eval()
        outputs.append((noisy, model.get_input_embeddings()(ids)))
    (ours, calm), (theirs, _), (none, _) = outputs
    bound = 5.0 / (ids.shape[1] * 64) ** 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert 0.9 * bound < float((ours - none).detach().abs().max()) <= bound * 1.001
    assert torch.equal(calm, none)


def test_noise_of_a_compiled_model_trains_as_that_of_a_plain_one() -> None:
    plain, model = tiny("llama")[0], tiny("llama")[0]
    for each in (plain, model):
        add_noise(each, 5.0)
    torch.manual_seed(STEPS.seed)
    plain_steps(plain, own_loss)
    found: Any = trained(model)
    assert_equal(found, plain)
    quiet: Any = tiny("llama")[0]
    plain_steps(quiet, own_loss)
    assert not torch.allclose(quiet.lm_head.weight, found.lm_head.weight, rtol=1e-5, atol=1e-5)


def test_frozen_parameters_stay_and_the_others_train_as_in_a_plain_loop() -> None:
    plain, model = tiny("llama")[0], tiny("llama")[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lines = freeze(model, ["embed_tokens", "layers.[0-1].mlp"], ["layers", "embed_tokens"])
    kept = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= kept
    assert "model.layers.1.mlp.up_proj.weight" in kept and "model.layers.2.mlp.up_proj.weight" not in kept
    assert f"of {sum(p.numel() for p in before.values()):,} parameters are trained" in lines[0]
    for name, p in plain.named_parameters():
        p.requires_grad_(name not in kept)
    plain_steps(plain, own_loss)
    found = trained(model)
    assert_equal(found, plain)
    assert {name for name, p in found.named_parameters() if torch.equal(p, before[name])} == kept


def test_tied_weights_go_by_both_of_their_names() -> None:
    made: Any = tiny("llama")[0]
    config = transformers.LlamaConfig(**(made.config.to_dict() | {"tie_word_embeddings": True}))
    model: Any = transformers.LlamaForCausalLM(config)
    freeze(model, ["lm_head"], [])
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def test_smoothed_labels_take_no_more_memory() -> None:
    made: Any = tiny("llama")[0]
    config = transformers.LlamaConfig(**(made.config.to_dict() | {"vocab_size": 8000, "num_hidden_layers": 1}))
    peaks = []
    for share in (0.0, 0.1):
        model: Any = transformers.LlamaForCausalLM(config)
        if share:
            smooth_labels(model, share, "causal")
        module = chunkft_fx.compile(model, "1GB", backend="eager", coverage="all")
        optimizer = chunkft_fx.AdamW(module, lr=1e-3)
        own_loss(module, sequences().repeat(2, 2)).backward()
        optimizer.step()
        peaks.append(module.plan.predicted_peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("frozen", "only", "message"),
    [
        (
            ["embed_token"],
            [],
            "freeze is embed_token, which fits no parameter of this model; did you mean embed_tokens",
        ),
        ([], ["decoder.blocks"], "train-only is decoder.blocks, which fits no parameter of this model"),
        (["*"], [], r"--freeze \* leaves no parameter of this model to train"),
        (["model"], ["layers.1"], "--freeze model --train-only layers.1 leaves no parameter"),
    ],
)
def test_patterns_that_fit_nothing_or_leave_nothing_change_nothing(
    frozen: list[str], only: list[str], message: str
) -> None:
    model = tiny("llama")[0]
    with pytest.raises(OptionError, match=message):
        freeze(model, frozen, only)
    assert all(p.requires_grad for p in model.parameters())


def test_added_tokens_have_rows_as_transformers_draws_them_and_are_read_as_one() -> None:
    tokenizer = character_tokenizer()
    model: Any = tiny("llama")[0]
    expected: Any = tiny("llama")[0]
    lines = add_tokens(tokenizer, ["think"], ["<|call|>", "</s>"])
    assert lines == [f"2 tokens are new to the tokenizer, of {len(tokenizer)} now; it had 1 already"]
    ids = tokenizer("a<|call|>think").input_ids
    assert len(ids) == 3 and tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "athink"
    torch.manual_seed(7)
    fit_embeddings(model, 170)
    torch.manual_seed(7)
    expected.resize_token_embeddings(192)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert model.config.vocab_size == 192
    fit_embeddings(model, 180)
    assert model.config.vocab_size == 192, "rows that are there are used"
    with pytest.raises(OptionError, match="x is in add-tokens and in add-special-tokens"):
        add_tokens(tokenizer, ["x"], ["x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neftune_noise_alpha": -1.0}, "neftune-noise-alpha is -1.0"),
        ({"neftune_noise_alpha": float("inf")}, "neftune-noise-alpha is inf"),
        ({"label_smoothing": 1.0}, "label-smoothing is 1.0"),
        ({"freeze": ("",)}, "freeze is empty"),
    ],
)
def test_changes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ModelChanges(**changes)


def test_all_changes_at_once_go_on_to_the_bit_and_stand_in_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data, config = tiny_folder(tmp_path / "model"), tmp_path / "a.jsonl", tmp_path / "run.toml"
    words = [f"<|w{i}|>" for i in range(64)]
    data.write_text("\n".join(json.dumps({"text": f"{words[i % 64]}abc{i}"}) for i in range(40)))
    config.write_text(
        f"""
model = "{folder}"
data = "{data}"
add-special-tokens = {json.dumps(words)}
freeze = ["norm", "layers.0"]
neftune-noise-alpha = 5
label-smoothing = 0.1
model-config = {{ attention_dropout = 0.1 }}
seq-len = 32
lr = 0.01
coverage = "all"
schedule = "constant"
save-every = 2
"""
    )
    arguments = ["train", str(config), *EAGER]
    rates = ["--device", "auto", "--dry-run", "--rates", "matmul=165T,memory=1T,link=25G"]
    with monkeypatch.context() as patched:
        patched.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
        chunkft(*arguments, "--out", str(tmp_path / "dry"), *rates)
    shown = capsys.readouterr().out
    for line in ("tensors), the others frozen", "noise of alpha 5 while", "smoothed by 0.1", "new to the tokenizer"):
        assert line in shown
    whole, twice = tmp_path / "whole", tmp_path / "twice"
    chunkft(*arguments, "--out", str(whole), "--steps", "4")
    chunkft(*arguments, "--out", str(twice), "--steps", "2")
    chunkft(*arguments, "--out", str(twice), "--steps", "4")
    printed = capsys.readouterr().out
    assert "64 tokens are new to the tokenizer, of 167 now" in printed and "going on after step 2" in printed
    expected, found, first = (load_file(f / "model.safetensors") for f in (whole, twice, folder))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(found["lm_head.weight"]) == 192
    same = {
        name for name, value in first.items() if value.shape == found[name].shape and torch.equal(value, found[name])
    }
    assert {n for n in first if ".layers.0." in n or "norm" in n.split(".")} == same
    saved = transformers.AutoConfig.from_pretrained(whole)
    assert (saved.vocab_size, saved.attention_dropout) == (192, 0.1)
    assert transformers.AutoTokenizer.from_pretrained(whole)(words[5]).input_ids == [108]
    assert read(require_checkpoint(whole)).extra["options"]["freeze"] == ["norm", "layers.0"]
    for changed, message in (
        (["--freeze", "norm"], "freeze ['norm', 'layers.0'] (now ['norm'])"),
        (["--label-smoothing", "0.2"], "label_smoothing 0.1 (now 0.2)"),
        (["--neftune-noise-alpha", "0"], "neftune_noise_alpha 5.0 (now 0.0)"),
    ):
        with pytest.raises(SystemExit):
            chunkft(*arguments, "--out", str(twice), "--steps", "4", *changed)
        assert message in capsys.readouterr().err


def test_a_pattern_or_an_entry_that_is_not_there_is_named_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = tiny_folder(tmp_path / "model"), tmp_path / "a.txt"
    data.write_text("abc" * 100)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
    for given, message in (
        (["--freeze", "embd_tokens"], "did you mean embed_tokens?"),
        (["--train-only", "model", "--freeze", "model"], "leaves no parameter of this model to train"),
        (
            ["--model-config", '{"hidden_size": 128}'],
            "changes the weights of model "
            + repr(str(folder))
            + ": model.embed_tokens.weight is (160, 128) with it, and",
        ),
        (["--model-config", '{"num_hidden_layers": 2}'], "model.layers.2.self_attn.q_proj.weight is not there with it"),
        (["--model-config", '{"rope_scalin": 1}'], "model-config has rope_scalin, which model"),
    ):
        with pytest.raises(SystemExit) as ended:
            chunkft("train", str(folder), str(data), "--out", str(tmp_path / "out"), *EAGER, "--seq-len", "32", *given)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_of_before_these_options_goes_on_without_them() -> None:
    saved = {name: value for name, value in STEPS.lasting().items() if name not in ModelChanges().lasting()}
    _check_options(Path("old"), saved, STEPS)
    with pytest.raises(CheckpointMismatch, match=r"label_smoothing 0.0 \(now 0.1\)"):
        _check_options(Path("old"), saved, replace(STEPS, changes=ModelChanges(label_smoothing=0.1)))
