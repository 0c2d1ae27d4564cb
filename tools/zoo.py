"""Makes tiny models with random weights, one for each family: for tests, and for ``chunkft inspect tiny:NAME``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = Callable[[int, int, int], dict[str, Tensor]]

_VOCAB = 160
_DECODER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": _VOCAB, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class ConvNet(nn.Module):
    """Convolutions with batch norm, pooled and classified; returns the loss and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Linear(256, 10)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (a scalar) and logits ``[batch, 10]`` of ``f32[batch, 3, height, width]`` and ``i64[batch]``."""
        logits = self.classifier(self.features(x).flatten(1))
        return nn.functional.cross_entropy(logits, labels), logits


class Perceptron(nn.Module):
    """Three linear layers; returns the loss and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (a scalar) and logits ``[batch, 10]`` of ``f32[batch, 48]`` and labels ``i64[batch]``."""
        logits = self.layers(x)
        return nn.functional.cross_entropy(logits, labels), logits


def _causal(name: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**(_DECODER | changes))
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model


def _llama(dropout: float) -> nn.Module:
    return _causal("Llama", num_key_value_heads=2, attention_dropout=dropout)


def _qwen3(dropout: float) -> nn.Module:
    return _causal("Qwen3", num_key_value_heads=2, head_dim=16, attention_dropout=dropout)


def _mistral(dropout: float) -> nn.Module:
    return _causal("Mistral", num_key_value_heads=2, attention_dropout=dropout)


def _gpt2(dropout: float) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=_VOCAB, n_positions=128, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _opt(dropout: float) -> nn.Module:
    return _causal("OPT", ffn_dim=128, word_embed_proj_dim=64, dropout=dropout, attention_dropout=dropout)


def _encoder(name: str, dropout: float) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        **_DECODER, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    model: nn.Module = getattr(transformers, f"{name}ForMaskedLM")(config)
    return model


def _t5(dropout: float) -> nn.Module:
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=_VOCAB, dropout_rate=dropout,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _vit(dropout: float) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=8,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


_BUILDERS: dict[str, Callable[[float], nn.Module]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": lambda dropout: _encoder("Bert", dropout),
    "roberta": lambda dropout: _encoder("Roberta", dropout),
    "t5": _t5,
    "vit": _vit,
    "cnn": lambda _: ConvNet(),
    "mlp": lambda _: Perceptron(),
}

FAMILIES = tuple(_BUILDERS)


def tiny(name: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0, seed: int = 0) -> tuple[nn.Module, Batch]:
    """A tiny model of a family in training mode, and ``batch(size, length, seed)`` that makes inputs with labels.

    Raises ``KeyError`` for a name outside ``FAMILIES``; ``dropout`` has no effect on ``cnn`` and ``mlp``.
    """
    torch.manual_seed(seed)
    model = _BUILDERS[name](dropout).to(dtype).train()

    def batch(size: int, length: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, 10, (size,), generator=generator)
        if name == "mlp":
            return {"x": torch.randn(size, 48, generator=generator, dtype=dtype), "labels": classes}
        if name == "cnn":
            return {"x": torch.randn(size, 3, 12, 12, generator=generator, dtype=dtype), "labels": classes}
        if name == "vit":
            return {"pixel_values": torch.randn(size, 3, 64, 64, generator=generator, dtype=dtype), "labels": classes}
        ids = torch.randint(3, _VOCAB, (size, length), generator=generator)
        labels = ids.clone()
        labels[:, :2] = -100
        return {"input_ids": ids, "labels": labels}

    return model, batch
