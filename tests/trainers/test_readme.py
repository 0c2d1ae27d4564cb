"""What README shows users of trainers runs as it stands, with small models and data in the place of those it names."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import chunkft_fx
from tests.module.test_trainer import rows
from tests.support.tiny_trainers import assert_all_trained, llama, texts, tokenizer

README = Path(__file__).parents[2] / "README.md"


def sample(of: str) -> str:
    """The code block of README that attaches to this trainer."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = [b for b in blocks if f"import {of}" in b and "chunkft_fx.attach" in b]
    return str(found)


def on_the_cpu(code: str) -> str:
    return code.replace('"out"', '"out", use_cpu=True, report_to=[]')


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chunkft_fx, "compile", functools.partial(chunkft_fx.compile, backend="eager"))


@pytest.mark.usefixtures("_here")
def test_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    names: dict[str, Any] = {"chunkft_fx": chunkft_fx, "model": model, "dataset": rows()}
    exec(on_the_cpu(sample("Trainer, TrainingArguments")), names)
    assert names["trainer"].state.global_step == 3
    assert_all_trained(model, llama())


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")
@pytest.mark.usefixtures("_here")
def test_a_trainer_of_trl(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    names: dict[str, Any] = {"chunkft_fx": chunkft_fx, "dataset": texts(8)}
    exec(on_the_cpu(sample("SFTConfig, SFTTrainer")).replace("Qwen/Qwen3-0.6B", "model"), names)
    assert names["trainer"].state.global_step == 3
    assert_all_trained(names["trainer"].model, llama())
