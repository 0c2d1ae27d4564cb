"""Models of published shapes with random bf16 weights, and batches for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Maker = Callable[[int | None], tuple[type[nn.Module], PretrainedConfig]]


def _llama(layers: int, **sizes: int) -> Maker:
    def make(asked: int | None) -> tuple[type[nn.Module], PretrainedConfig]:
        config = LlamaConfig(num_hidden_layers=asked or layers, max_position_embeddings=4096, use_cache=False, **sizes)
        return LlamaForCausalLM, config

    return make


def _gpt2_xl(asked: int | None) -> tuple[type[nn.Module], PretrainedConfig]:
    sizes = {"n_layer": asked or 48, "n_embd": 1600, "n_head": 25, "n_positions": 4096}
    return GPT2LMHeadModel, GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)


def _qwen3_4b(asked: int | None) -> tuple[type[nn.Module], PretrainedConfig]:
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"head_dim": 128, "vocab_size": 151936, "num_hidden_layers": asked or 36, "max_position_embeddings": 4096}
    return Qwen3ForCausalLM, Qwen3Config(use_cache=False, tie_word_embeddings=True, **sizes)


def _qwen2_14b(asked: int | None) -> tuple[type[nn.Module], PretrainedConfig]:
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 8}
    sizes |= {"vocab_size": 152064, "num_hidden_layers": asked or 48, "max_position_embeddings": 4096}
    return Qwen2ForCausalLM, Qwen2Config(use_cache=False, tie_word_embeddings=False, **sizes)


SHAPES: dict[str, Maker] = {
    "llama2-7b": _llama(32),
    "llama3-8b": _llama(32, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
    "llama3-70b": _llama(
        80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    ),
    "llama3-1b": _llama(
        16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, head_dim=64,
    ),
    "gpt2-xl": _gpt2_xl,
    "qwen3-4b": _qwen3_4b,
    "qwen2.5-14b": _qwen2_14b,
    "narrow": _llama(
        32, hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=4, vocab_size=1000,
    ),
}  # fmt: skip


def build(shape: str, device: str, layers: int | None = None) -> nn.Module:
    """A model in training mode, initialised on a GPU as transformers does; ``layers`` changes its depth.

    For ``device="cpu"`` it is then moved to host memory, and the GPU is as if it had never been there.
    """
    kind, config = SHAPES[shape](layers)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = kind(config).train()
    finally:
        torch.set_default_dtype(torch.float32)
    if device == "cpu":
        model = model.cpu()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def batches(vocabulary: int, batch: int, sequence: int, device: str, count: int = 4) -> list[Tensor]:
    """Random token ids ``i64[batch, sequence]``."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (batch, sequence), generator=generator).to(device) for _ in range(count)]
