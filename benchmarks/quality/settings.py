"""Decides what is trained on what: the settings of the table, their models, and how much of which text they see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.data import Text, read_text
from benchmarks.quality.results import alone
from benchmarks.quality.small import NARROW, SMALL, pretrained, random_model, source_code
from chunkft_fx.tools.load import load_model

MAIN = (
    "dense",
    "all",
    "one:chunks=8",
    "one:chunks=2",
    "one:chunks=8,beta1=0",
    "one:chunks=2,beta1=0",
    "lora:rank=16",
    "badam:interval=20",
    "dense:steps={half}",
    "dense:steps={eighth}",
)
ALONE = (
    "one",
    "one:chunks=4",
    "one:chunks=16",
    "one:chunks=64",
    "one:chunks=8,interval=5",
    "one:chunks=8,interval=25",
    "one:chunks=8,interval=25,order=random",
    "one:chunks=8,order=descending",
    "one:chunks=8,order=random",
    "one:chunks=8,interval=25,states=reset",
    "one:chunks=8,beta1=0.5",
    "one:chunks=8,beta2=0.99",
    "one:chunks=8,schedule_by=step",
    "one:chunks=8,max_grad_norm=0.35",
)
PEERS = (
    "galore",
    "apollo",
    "adalomo",
    "lomo",
    "badam:interval=6",
    "lora:rank=64",
    "lora:rank=16,dora=true",
    "lora:rank=full,dora=true",
)
CPU = (
    "dense",
    "all",
    *(f"one:chunks={n}{more}" for more in ("", ",interval=1", ",interval=1,beta1=0") for n in (2, 4, 8, 16)),
    "dense:steps={half}",
    "dense:steps={eighth}",
    "one:chunks=8,interval=20",
    "one:chunks=8,interval=20,states=reset",
    "one:chunks=8,order=random",
)


@dataclass(frozen=True)
class Setting:
    """A model's training: sequences of ``length`` tokens, ``held_out`` of them to evaluate on.

    ``budget`` holds for the library, ``rows`` are what the table has unless others are asked for, those in ``compared``
    from several seeds. ``config`` makes a model with random weights, or with those of ``base``.
    """

    steps: int
    batch: int
    length: int
    held_out: int
    budget: str
    rows: tuple[str, ...]
    compared: int
    config: dict[str, Any] | None = None
    is_byte_level: bool = False

    def rows_at(self, steps: int) -> list[str]:
        """The rows of a run of that many steps."""
        return [row.format(half=steps // 2, eighth=steps // 8) for row in self.rows]


SETTINGS = {
    # 4.69 GiB: half of what torch reserves for dense AdamW
    "german": Setting(600, 16, 512, 128, "4.69GiB", MAIN + PEERS + ALONE, len(MAIN)),
    "docs": Setting(300, 16, 512, 128, "4.69GiB", MAIN + PEERS, len(MAIN)),
    "chat": Setting(300, 16, 512, 128, "4.69GiB", MAIN + PEERS, len(MAIN)),
    "random": Setting(600, 16, 512, 128, "4GB", MAIN, len(MAIN), config=SMALL),
    "second": Setting(600, 16, 512, 128, "16GB", MAIN, len(MAIN)),
    "cpu": Setting(480, 16, 64, 256, "1GB", CPU, 2, config=NARROW, is_byte_level=True),
}


@dataclass(frozen=True)
class Inputs:
    """A model's folder, a file of token ids (`data.read_text`), and a folder for what is made on the way."""

    model: Path | None
    data: Path | None
    work: Path

    def check(self, name: str) -> None:
        """``ValueError`` says what a setting needs that was not given."""
        setting = SETTINGS[name]
        if setting.config is None and self.model is None:
            raise ValueError(f"setting {name} trains a model that exists: give --model")
        if not setting.is_byte_level and self.data is None:
            raise ValueError(f"setting {name} has no text of its own: give --data")

    def prepare(self, name: str) -> None:
        """Make what a setting needs beside the files that were given, once for all processes that share the folder."""
        setting = SETTINGS[name]
        with alone(self.work / "prepare"):
            if setting.is_byte_level and not self.base.exists():
                pretrained(setting.length, self.base)
            if setting.config is None and self._gguf is not None and not self._plain.exists():
                # a GGUF file takes many times longer to read than what it becomes
                model: Any = load_model(str(self._gguf), torch.float32, torch.device("cpu"))
                part = self._plain.with_suffix(".part")
                model.save_pretrained(part)
                part.replace(self._plain)

    @property
    def _gguf(self) -> Path | None:
        assert self.model is not None
        return next(iter(sorted(self.model.glob("*.gguf"))), None)

    @property
    def _plain(self) -> Path:
        """Where the weights of a GGUF file lie in float32, by its name and size."""
        assert self._gguf is not None
        return self.work / f"{self._gguf.stem}-{self._gguf.stat().st_size}"

    @property
    def base(self) -> Path:
        """The weights that byte-level runs begin with."""
        return self.work / "base.pt"

    def text(self, setting: Setting) -> Text:
        """The setting's sequences."""
        if setting.is_byte_level:
            return source_code(setting.length, setting.held_out)
        assert self.data is not None
        return read_text(self.data, setting.length, setting.held_out)

    def load(self, setting: Setting, device: torch.device) -> nn.Module:
        """The model, the same for every seed: in bfloat16 on a GPU, in float32 elsewhere."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if setting.config is None:
            assert self.model is not None
            return load_model(str(self.model if self._gguf is None else self._plain), dtype, device)
        model = random_model(setting.config)
        if setting.is_byte_level:
            model.load_state_dict(torch.load(self.base))
        return model.to(device, dtype)
