"""A tiny configuration of any transformers family, made by rules over the names and values of its own attributes.

No family is named here. A rule sees an attribute's name, its default value, and what was chosen for its neighbours;
sizes agree because every width is the same, every head has the same size, and lists that describe one layer each
keep the same few layers, one of each kind.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WIDTH = 64
HEADS = 4
HEAD_DIM = WIDTH // HEADS
VOCABULARY = 128
IMAGE = 32
POSITIONS = 128
LAYERS = 2
_FIRST_SPECIAL = VOCABULARY - 38

# What the first pattern that is found in a name makes of a number. Larger defaults shrink to it, smaller ones stay.
_RULES: tuple[tuple[str, int], ...] = (
    (r"^(num_labels|num_channels|in_channels|type_vocab_size|chunk_size_feed_forward)$", 10**9),
    (r"vocab_size|codebook_size|num_embeddings$|_vocab$|vocab_size_base$|num_hash_buckets|unk_index", VOCABULARY),
    (r"per_layer_input$|laurel_rank|lora_rank|_rank$|low_rank|lowrank|time_step_rank", 16),
    (r"(first_k_dense_replace|num_dense_layers|mtp_layers|nextn_predict_layers|kv_shared_layers)", 1),
    (r"layers?$|^depth$|_depth$|num_blocks$|^n_layer$|num_res_blocks", LAYERS),
    (r"qk_rope_head_dim|index_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"head_dim|head_size|d_head$|d_kv|dim_head|kv_channels|query_pre_attn_scalar", HEAD_DIM),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|linear_num_value_heads|linear_num_heads", 2 * HEADS),
    (r"linear_num_key_heads|heads?$|^num_heads|^n_head", HEADS),
    (r"shared_experts?$|num_shared", 1),
    (r"experts_per_tok|top_?k$|^moe_k$|topk_group|num_experts_per|n_activated", 2),
    (r"n_group$|num_expert_group|n_groups|num_groups|expert_capacity|conv_pos_embedding_groups", 2),
    (r"experts$|^num_local_experts|n_routed_experts", 4),
    (r"index_topk|index_block_size|mamba_chunk_size|^chunk_size$|context_size", 8),
    (r"^window_size$|mm_tokens_per_image", 4),
    (r"window|attention_chunk|local_attention|^block_size$", 8),
    (r"_period$", 2),
    (r"_offset$", 1),
    (
        r"max_.*position|n_positions|max_seq|^n_ctx|max_length|positions$|max_source|max_target|pos_emb_(height|width)",
        128,
    ),
    (r"image_size|^resolution$|^input_size$", IMAGE),
    (r"patch_size|encoder_stride", 8),
    (r"mel_bins|input_feat_per_channel|feature_projection_input_dim|input_dim$", 16),
    (r"state_size|d_state", 8),
    (r"codevector|num_latents|query_tokens|latent_query|n_latents|num_image_tokens|_seq_length|prompt_length", 16),
    (r"hidden_size|d_model|d_latents|_input_size$|n_embd|embedding_(size|dim)|^dim$|_dim$|width|projection", WIDTH),
    (
        r"intermediate|ffn|d_ff|dff|inner|dim_ff|mlp_dim|channels|num_filters|features|out_dim|_size_mlp|output_size",
        WIDTH,
    ),
)


def tiny_config(kind: type[Any], adjust: Mapping[str, Any] | None = None) -> Any:
    """A tiny instance of a configuration class; ``adjust`` overrides attributes at every level that has them."""
    return kind(**tiny_arguments(kind(), adjust or {}))


def tiny_arguments(config: Any, adjust: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make a tiny version of a configuration."""
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name in vars(config)}
    given = {k: v for k, v in vars(config).items() if k in defaults and not k.startswith("_")}
    layers = _kept_layers(given)
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("dtype", "architectures", "id2label", "label2id", "transformers_version", "num_labels"):
            continue
        if hasattr(value, "to_dict"):
            chosen[name] = _nested(value, adjust)
        elif isinstance(value, (list, tuple)):
            small = _list(name, value, given, layers)
            if small is not None:
                chosen[name] = small
        elif isinstance(value, dict):
            chosen[name] = {k: _entry(k, v) for k, v in value.items()}
        elif (
            isinstance(value, int) and not isinstance(value, bool) and not (defaults[name] is None and not _token(name))
        ):
            chosen[name] = _number(name, value, given, layers)
    chosen |= _absent(given) | _switches(given)
    return chosen | {k: v for k, v in adjust.items() if k in given}


def _nested(config: Any, adjust: Mapping[str, Any]) -> Any:
    return type(config)(**tiny_arguments(config, adjust))


def _absent(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that some models need although their configuration leaves them open."""
    sizes = {
        "head_dim": HEAD_DIM, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY,
        "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
        "pad_token_id": special_token("pad_token_id"),
    }  # fmt: skip
    return {name: size for name, size in sizes.items() if name in given and given[name] is None}


def _switches(given: Mapping[str, Any]) -> dict[str, Any]:
    """No caches, no random skipping of layers or masking of frames beside dropout."""
    off: dict[str, Any] = {"use_cache": False, "apply_spec_augment": False, "layerdrop": 0.0}
    off |= {n: 0.0 for n in given if n.endswith("layerdrop") or n in ("mask_time_prob", "mask_feature_prob")}
    return {n: v for n, v in off.items() if n in given}


def _token(name: str) -> bool:
    return name.endswith(("token_id", "token_index", "_id", "_index")) and not name.startswith("layer")


def special_token(name: str) -> int:
    """The id of a special token: small ones for padding, begin and end, the rest above all ordinary tokens."""
    small = {"pad": 0, "bos": 1, "eos": 2, "sep": 3, "cls": 4, "unk": 5, "mask": 6, "decoder_start": 1}
    stem = re.sub(r"_(token_)?(id|index)$", "", name)
    if stem in small:
        return small[stem]
    return _FIRST_SPECIAL + sum(i * ord(c) for i, c in enumerate(stem, 3)) % 37


def _number(name: str, value: int, given: Mapping[str, Any], layers: Sequence[int] | None) -> int:
    if name.endswith(("token_id", "token_index")) or re.search(r"(pad|bos|eos|unk|mask|sep|cls)_index$", name):
        return special_token(name) if value >= 0 else value
    if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and layers is not None:
        return len(layers)
    if re.search(r"(^|_)(key_value|kv)_heads$", name):
        return _kv_heads(name, value, given)
    if name == "head_dim" and given.get("qk_rope_head_dim") == value:
        return HEAD_DIM // 2
    if name in ("mamba_d_head", "mamba_head_dim"):
        return HEAD_DIM
    if name == "num_heads" and "expand" in given:
        return 2 * HEADS
    if name == "patch_size" and value <= 8:
        return value
    if name == "embed_dim" and (heads := _list_of_heads(given)):
        return 8 * heads[0]
    for pattern, size in _RULES:
        if re.search(pattern, name):
            return min(value, _image(given) if size == IMAGE else size)
    return value


def _kv_heads(name: str, value: int, given: Mapping[str, Any]) -> int:
    heads = given.get(re.sub(r"(key_value|kv)_heads$", "attention_heads", name), given.get("num_attention_heads"))
    if value <= 1 or not isinstance(heads, int):
        return min(value, HEADS)
    return HEADS if heads == value else HEADS // 2


def _list_of_heads(given: Mapping[str, Any]) -> Sequence[int] | None:
    found = given.get("num_heads")
    return found if isinstance(found, (list, tuple)) else None


def _image(given: Mapping[str, Any]) -> int:
    """Networks that halve the image in each stage need a larger one."""
    staged = any(
        isinstance(v, (list, tuple)) and re.search(r"depths|sizes$|dims$|channels$", n) for n, v in given.items()
    )
    return 2 * IMAGE if staged else IMAGE


def _kept_layers(given: Mapping[str, Any]) -> list[int] | None:
    """One layer of each kind, if there are lists that say something of each layer; at most 4, at least 2."""
    count = next(
        (given[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(given.get(n), int)), None
    )
    if count is None or count < 2:
        return None
    lists = [v for v in given.values() if isinstance(v, (list, tuple)) and len(v) == count]
    if not lists:
        return None
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(repr([v[i] for v in lists]), i)
    kept = sorted(kinds.values())[:4]
    return kept if len(kept) > 1 else [kept[0], *(i for i in range(count) if i != kept[0])][:LAYERS]


def _list(name: str, value: Sequence[Any], given: Mapping[str, Any], layers: Sequence[int] | None) -> Any:
    """A shorter or smaller list; None leaves the default alone."""
    count = next((given[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in given), None)
    if layers is not None and len(value) == count:
        return [value[i] for i in layers]
    if len(value) == 1 and isinstance(value[0], list) and len(value[0]) == 2 and isinstance(value[0][1], int):
        return [[value[0][0], 1]]  # a pattern of layers and how often it comes
    if not value or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return None
    if re.search(r"_(indexes|idxs|indices|layers)$|feature_layers?$", name):
        return [0]
    if name == "depths" or name.endswith("depths"):
        return [min(v, 1) for v in value]
    if name in ("image_size", "patch_size", "input_size"):
        return [_number(name, v, given, layers) for v in value]
    if re.search(r"sizes$|channels$|dims?$", name) and min(value) >= 16:
        factors = [
            f for f in (64, 32, 16, 8, 4, 2) if f <= min(value) // 16 and all(v % (f * HEADS) == 0 for v in value)
        ]
        return [v // factors[0] for v in value] if factors else None
    return None


def _entry(name: str, value: Any) -> Any:
    """A value of a dictionary, such as one that describes rotary embeddings."""
    if isinstance(value, dict):
        return {k: _entry(k, v) for k, v in value.items()}
    if name == "mrope_section" and isinstance(value, (list, tuple)):
        unit = sum(value) / (HEAD_DIM // 2)
        first = [max(1, int(v / unit)) for v in value]
        return [*first[:-1], HEAD_DIM // 2 - sum(first[:-1])]
    if name in ("short_factor", "long_factor") and isinstance(value, (list, tuple)):
        return list(value[: HEAD_DIM // 2])
    return value


def without_dropout(config: Any) -> None:
    """Set every dropout of a configuration and its parts to zero."""
    _each_dropout(config, lambda holder, name: setattr(holder, name, 0.0))


def has_dropout(config: Any) -> bool:
    """Whether a dropout of a configuration or its parts is above zero."""
    found: list[float] = []
    _each_dropout(config, lambda holder, name: found.append(getattr(holder, name)))
    return any(v > 0 for v in found)


def _each_dropout(config: Any, act: Callable[[Any, str], Any]) -> None:
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _each_dropout(value, act)
        elif re.search(r"drop|_pdrop|jitter", name) and isinstance(value, float):
            act(config, name)
