"""Models that are not all there, and text that does not fit them: one line each, before anything trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chunkft_fx.errors import ChunkFTWarning, ModelUnusable, OptionError
from chunkft_fx.tools.load import load_model, pick_device
from tests.support.tiny_text import tiny_folder
from tests.tools.test_tools import EAGER, TEXT, chunkft

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a saved model, or take them out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        del tensors[name]
        if value is not None:
            tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ModelUnusable, match=message):
        load_model(str(folder), torch.float32, CPU)


def test_missing_tensors_are_named(folder: Path) -> None:
    change(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    refused(
        folder, r"has no model\.layers\.1\.mlp\.up_proj\.weight, so that a LlamaForCausalLM would train from random"
    )
    change(folder, **{f"model.layers.{i}.mlp.down_proj.weight": None for i in range(3)})
    refused(folder, "and 1 more")


def test_a_model_without_a_head_of_its_own_is_whole(tmp_path: Path) -> None:
    """A tied head is no missing tensor."""
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(str(tmp_path), torch.float32, CPU)


def test_tensors_of_another_shape_are_named(folder: Path) -> None:
    change(folder, **{"model.norm.weight": torch.ones(63)})
    refused(folder, "could not be loaded")


def test_a_config_with_more_layers_than_the_weights_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    refused(folder, r"has no model\.layers\.3\.")


def test_tensors_that_have_no_place_are_told(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.warns(ChunkFTWarning, match=r"no place for model\.layers\.2\..*not trained, not saved"):
        load_model(str(folder), torch.float32, CPU)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1000])
def test_a_truncated_file_of_weights_is_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "could not be loaded: SafetensorError")


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "nonesuch"}', "[" * 100_000])
def test_a_broken_config_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, "could not be loaded")


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1
    with pytest.raises(OptionError, match="there are 2, from cuda:0"):
        pick_device("cuda:2")


def no_weights(*_: Any, **__: Any) -> Any:
    raise AssertionError("the weights were read")


@pytest.mark.parametrize(
    ("changes", "message", "code"),
    [
        (["--seq-len", "0"], "seq-len is 0; it must be 2 or more", 2),
        (["--seq-len", "1"], "seq-len is 1; it must be 2 or more", 2),
        (["--seq-len", "129"], "has positions for 128 tokens", 2),
        (["--lr", "-1"], "lr is -1.0; it must be", 2),
        (["--lr", "nan"], "lr is nan; it must be", 2),
        (["--lr", "inf"], "lr is inf; it must be", 2),
        (["--weight-decay", "-0.1"], "weight-decay is -0.1", 2),
        (["--max-grad-norm", "-1"], "max-grad-norm is -1.0", 2),
        (["--steps", "0"], "steps is 0", 2),
        (["--batch-size", "0"], "batch-size is 0", 2),
        (["--accumulate", "0"], "accumulate is 0", 2),
        (["--warmup", "-1"], "warmup is -1", 2),
        (["--steps", "3", "--warmup", "4"], "warmup is 4, more than all 3 steps", 2),
        (["--save-every", "-1"], "save-every is -1", 2),
        (["--seed", "-1"], "seed is -1", 2),
        (["--seed", "4294967296"], "seed is 4294967296", 2),
        (["--interval", "0"], "interval=0", 2),
        (["--order", "sideways"], "order='sideways'", 2),
        (["--backend", "tvm"], "backend='tvm'", 2),
        (["--schedule", "sawtooth"], "'sawtooth'", 2),
        (["--schedule-options", '{"teeth": 3}'], "teeth", 2),
        (["--budget", "-3GB"], "budget '-3GB'", 2),
        (["--chunks", "-3"], "chunks='-3'", 2),
        (["--batch-size", "1000"], "fewer than a batch of 1000", 1),
        (["--resume", "nowhere"], "there is no checkpoint at nowhere", 1),
        (["--out", "FILE"], "is, or lies in, a file", 2),
        (["--out", "FILE/below"], "is, or lies in, a file", 2),
        (["--out", "MODEL"], "the folder of the model itself", 2),
    ],
)
def test_a_mistake_is_found_before_the_weights_are_read(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    message: str,
    code: int,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
    capsys.readouterr()
    changes = [c.replace("FILE", str(text)).replace("MODEL", str(folder)) for c in changes]
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        chunkft("train", str(folder), str(text), *out, *EAGER, "--seq-len", "16", *changes)
    complaint = capsys.readouterr().err
    assert ended.value.code == code
    assert complaint.startswith("error: ")
    assert message in complaint
    assert complaint.count("\n") == 1
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused_before_the_weights_are_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<extra>" + TEXT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<filler{i}>" for i in range(160 - len(tokenizer))] + ["<extra>"])
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        chunkft("train", str(folder), str(text), "--out", str(tmp_path / "out"), *EAGER, "--seq-len", "5")
    assert ended.value.code == 1
    assert "token 160 ('<extra>'), the model only tokens below 160" in capsys.readouterr().err
