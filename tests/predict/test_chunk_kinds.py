"""Kinds of chunks: what is looked at of a sweep says what every step of it needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.cuts import cut
from chunkft_fx.plan.policy import Policy
from chunkft_fx.planning.planner import parameter_specs
from chunkft_fx.predict.chunk_kinds import Example, Kinds, sweep_peak
from chunkft_fx.predict.predictor import Predictor
from chunkft_fx.predict.step_memory import Moment
from tests.planning.test_heavy_chunk import BATCH, Scaled
from tests.support.changing_batches import Text, text


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """With one weight for the embedding and the head, and the keys of several heads in one."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
        vocab_size=96, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.arange(24)[None] % 96
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


MODELS = {
    "heavy": lambda: (Scaled(5, 8), BATCH),
    "text": lambda: (Text(), text(2, 8)),
    "llama": _llama,
}


@pytest.fixture(scope="module", params=MODELS)
def predicted(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Predictor, Kinds]]:
    model, batch = MODELS[request.param]()
    module = chunkft_fx.compile(model.train(), "1GB", chunks=1, backend="eager")
    module(**batch)
    session = module._training.sessions[-1]
    yield model, Predictor(session.programs), Kinds(session.programs.outline.regions, session.capture.parameters)
    del module  # which sessions hold weakly


@pytest.mark.parametrize("count", [3, 17])
@pytest.mark.parametrize("handling", ["save", "recompute", "offload half"])
def test_the_steps_that_are_looked_at_tell_what_all_need(
    predicted: tuple[nn.Module, Predictor, Kinds], count: int, handling: str
) -> None:
    """Of chunks of one kind the lowest needs most, and no chunk needs more than those that it was joined with."""
    model, predictor, kinds = predicted
    half = len(predictor.uses()) // 2
    saving = {"save": Policy(0), "recompute": Policy(2 * half + 2), "offload half": Policy(half, half)}[handling]
    chunks = cut(parameter_specs(model), count)
    each = [predictor.peak(chunk, saving).nbytes for chunk in chunks]
    chunk, most = predictor.sweep_peak(chunks, saving)
    assert most.nbytes == max(each) == each[chunks.index(chunk)]
    for enough in (max(each) - 1, max(each) * 2):
        bound = predictor.sweep_peak(chunks, saving, enough)[1].nbytes
        assert max(each) <= bound <= max(enough, max(each))
    by_regions: dict[object, list[Example]] = {}
    for example in kinds.examples(chunks, saving):
        by_regions.setdefault(example.kind.regions, []).append(example)
    for group in by_regions.values():
        joined = predictor.peak(kinds.joined(group), saving).nbytes
        assert joined >= max(predictor.peak(e.chunk, saving).nbytes for e in group)
        for e in group:
            alike = [n for c, n in zip(chunks, each, strict=True) if kinds.examples([c], saving)[0].kind == e.kind]
            assert max(alike) == predictor.peak(e.chunk, saving).nbytes


def test_where_a_length_decides_who_computes_each_kind_is_looked_at(
    predicted: tuple[nn.Module, Predictor, Kinds],
) -> None:
    """Memory need not grow with the length then."""
    model, _, kinds = predicted
    chunks = cut(parameter_specs(model), 17)
    examples = [e.chunk for e in kinds.examples(chunks, Policy(0))]
    asked: list[Chunk] = []

    def peak(chunk: Chunk) -> Moment:
        asked.append(chunk)
        return Moment("", {"": 2 if chunk == examples[-1] else 1})

    assert sweep_peak(kinds, chunks, Policy(0), peak, can_join=False)[1].nbytes == 2
    assert {*asked} == {*examples, chunks[0]}
