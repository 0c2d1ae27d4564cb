"""The folder of a run: one process at a time, and a model in it that is whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from chunkft_fx.checkpoints.disk.folders import OLD, write_record
from chunkft_fx.checkpoints.disk.places import REPLACED, UNFINISHED
from chunkft_fx.errors import FolderInUse, OptionError, SaveFailed, TrainingDiverged
from chunkft_fx.tools.training.folder import LOCK, MODEL, claimed, save_model
from chunkft_fx.tools.zoo import tiny
from tests.support.tiny_text import character_tokenizer

HOLDER = "import sys, pathlib, time\nfrom chunkft_fx.tools.training.folder import claimed\n"
HOLDER += "with claimed(pathlib.Path(sys.argv[1]), ''): print('held', flush=True); time.sleep(600)"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(FolderInUse, match=f"process {holder.pid} is writing to --out"), claimed(tmp_path, "model"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with claimed(tmp_path, "model"):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())


def test_a_folder_is_free_again_after_use_and_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), claimed(tmp_path / "new" / "out", "model"):
            raise ZeroDivisionError


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "model.safetensors").touch()
    (tmp_path / f"{OLD}{UNFINISHED}").touch()
    (tmp_path / OLD).touch()
    for name in ("checkpoint-2", f"checkpoint-2{REPLACED}", f"checkpoint-4{REPLACED}", f"checkpoint-6{UNFINISHED}"):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, {"version": 2})
    with claimed(tmp_path, "model"):
        # of step 4 there is no other: it was to be replaced when the run was killed
        assert {p.name for p in tmp_path.iterdir()} == {OLD, LOCK, "checkpoint-2", f"checkpoint-4{REPLACED}"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.touch()
    for out in (file, file / "below"):
        with pytest.raises(OptionError, match="is, or lies in, a file"), claimed(out, "model"):
            pass


def test_the_folder_of_the_model_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the folder of the model itself"), claimed(tmp_path, str(tmp_path)):
        pass


def llama(fill: float = 0.5) -> Any:
    model: Any = tiny("llama")[0]
    with torch.no_grad():
        model.lm_head.weight.fill_(fill)
    return model


def loaded(folder: Path) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return float(model.lm_head.weight.detach()[0, 0])


def test_a_saved_model_replaces_the_one_before_also_one_of_other_shards(tmp_path: Path) -> None:
    llama(0.25).save_pretrained(tmp_path, max_shard_size="50kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    save_model(tmp_path, llama(0.5), character_tokenizer())
    assert loaded(tmp_path) == 0.5
    assert {p.name for p in tmp_path.glob("model*")} == {"model.safetensors"}
    save_model(tmp_path, llama(0.75), character_tokenizer())
    assert loaded(tmp_path) == 0.75
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == len(character_tokenizer())


@pytest.mark.parametrize("when", ["tokenizer", "model"])
def test_a_full_disk_leaves_the_model_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    save_model(tmp_path, llama(0.25), character_tokenizer())
    model, tokenizer = llama(0.5), character_tokenizer()

    def fill(folder: Path, **_: Any) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").symlink_to("/dev/full")
        (Path(folder) / "model.safetensors").write_bytes(bytes(100_000))

    monkeypatch.setattr(tokenizer if when == "tokenizer" else model, "save_pretrained", fill)
    if when == "tokenizer":
        monkeypatch.setattr(model, "save_pretrained", lambda folder: None)
    with pytest.raises(SaveFailed, match=rf"is full \(.* free\): {tmp_path} was not written"):
        save_model(tmp_path, model, tokenizer)
    assert loaded(tmp_path) == 0.25
    assert not (tmp_path / MODEL).exists()


def test_the_disk_is_named_also_where_a_library_of_rust_met_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def fail(folder: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model = llama()
    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(SaveFailed, match="is full"):
        save_model(tmp_path, model, character_tokenizer())


def test_a_model_with_weights_that_are_not_numbers_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"lm_head\.weight"):
        save_model(tmp_path, llama(float("nan")), character_tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_folder_killed_between_two_files_holds_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the config of one run with the weights of another."""
    save_model(tmp_path, llama(0.25), character_tokenizer())
    replace, names = os.replace, list[str]()

    def killed(source: Path, target: Path) -> None:
        names.append(Path(target).name)
        if len(names) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path, llama(0.5), character_tokenizer())
    assert not (tmp_path / "config.json").exists()
    monkeypatch.undo()
    save_model(tmp_path, llama(0.5), character_tokenizer())
    assert loaded(tmp_path) == 0.5
