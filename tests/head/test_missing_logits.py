"""Logits that training leaves out: passing them on works, and reading them says how to get them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.operations import convert_to_fp32, send_to_device
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_pt_utils import nested_detach

import chunkft_fx
from chunkft_fx.errors import ChunkFTError, LogitsNotKept
from chunkft_fx.head.missing_logits import MissingLogits
from chunkft_fx.torch_internals import tree_leaves, tree_map

LABELS = torch.zeros(4, dtype=torch.int64)

READS: dict[str, Callable[[Any], Any]] = {
    "method": lambda z: z.argmax(-1),
    "attribute": lambda z: z.shape,
    "index": lambda z: z[:, -1],
    "length": len,
    "iteration": list,
    "arithmetic": lambda z: z * 2.0,
    "reflected arithmetic": lambda z: 1.0 - z,
    "with a tensor": lambda z: torch.ones(3) + z,
    "comparison": lambda z: z == 0,
    "order": lambda z: z > 0,
    "torch function": lambda z: torch.softmax(z, -1),
    "list of them": lambda z: torch.cat([z, z]),
    "loss": lambda z: functional.cross_entropy(z, LABELS),
    "number": float,
    "numpy": np.asarray,
    "call": lambda z: z(),
    "after a move": lambda z: z.detach().cpu().float(),
}


class Both(nn.Module):
    """Returns a loss and its logits, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.embed(ids))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


IDS = torch.arange(12).view(2, 6)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40, use_cache=False)).train()


@pytest.mark.parametrize("name", READS)
def test_reading_says_what_to_change(name: str) -> None:
    with pytest.raises(LogitsNotKept, match="return_logits=True"):
        READS[name](MissingLogits())
    assert issubclass(LogitsNotKept, ChunkFTError)


def test_what_only_passes_them_on_works() -> None:
    z = MissingLogits()
    assert z is not None
    assert not z
    assert z != None  # noqa: E711
    assert z == MissingLogits()
    assert not hasattr(z, "dtype")
    assert "return_logits" in repr(z)
    for same in (z.detach(), z.to("cpu"), z.cpu(), copy.copy(z), copy.deepcopy(z), pickle.loads(pickle.dumps(z))):
        assert isinstance(same, MissingLogits)
    assert isinstance(nested_detach((z,))[0], MissingLogits)
    assert isinstance(send_to_device({"logits": z}, "cpu")["logits"], MissingLogits)
    assert isinstance(convert_to_fp32({"logits": z})["logits"], MissingLogits)
    assert tree_leaves({"a": (z, 1)}) == [z, 1]


def test_a_tuple_of_loss_and_logits() -> None:
    compiled = chunkft_fx.compile(Both(), "1GB", chunks=2, interval=1, backend="eager")
    loss, logits = compiled(IDS, IDS)
    loss.backward()
    with pytest.raises(LogitsNotKept):
        logits.argmax(-1)
    with torch.no_grad():
        assert compiled(IDS, IDS)[1].shape == (2, 6, 20)
    kept = chunkft_fx.compile(Both(), "1GB", chunks=2, interval=1, backend="eager", return_logits=True)
    assert kept(IDS, IDS)[1].shape == (2, 6, 20)


def test_a_model_output_can_be_passed_around(tmp_path: Path) -> None:
    compiled = chunkft_fx.compile(tiny_llama(), "1GB", chunks=2, interval=1, backend="eager")
    output = compiled(input_ids=IDS, labels=IDS)
    assert "return_logits" in str(output)
    assert list(output) == ["loss", "logits"]
    loss, logits = output.to_tuple()
    assert isinstance(logits, MissingLogits)
    mapped = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
    for same in (mapped, copy.deepcopy(mapped), pickle.loads(pickle.dumps(mapped))):
        assert type(same) is type(output)
        assert torch.equal(same.loss, loss)
        with pytest.raises(LogitsNotKept):
            same.logits.argmax(-1)
    torch.save(mapped.to_tuple(), tmp_path / "output.pt")


def test_trainer_trains_evaluates_and_predicts(tmp_path: Path) -> None:
    """Evaluation sees the logits of a model that trains without them."""
    compiled = chunkft_fx.compile(tiny_llama(), "1GB", chunks=2, interval=1, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-3)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", max_grad_norm=0.0, disable_tqdm=True
    )
    trainer = Trainer(
        compiled,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(optimizer, None),
        compute_metrics=metrics,
    )
    trainer.label_names = ["labels"]
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert trainer.predict(rows).predictions.shape == (8, 6, 40)
    assert seen == [(8, 6, 40)] * 2
