"""Of equal blocks three are traced and the others copied: the capture is the one that tracing the whole model gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.capture import repeats
from chunkft_fx.capture.repeats.fill import fill
from chunkft_fx.capture.repeats.find import without_repeats
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.runtime.session import Session

IDS = torch.randint(3, 160, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 160,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 1, "attention_dropout": 0.2}


def causal(name: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 7, "num_heads": 2, "vocab_size": 160}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 6, "n_head": 2, "vocab_size": 160, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


# With the outputs of blocks among the model's: llama returns the keys and values of each.
FILLED: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: causal("Llama", **GROUPED),
    "qwen3": lambda: causal("Qwen3", head_dim=16, use_cache=False, **GROUPED),
    "gemma2": lambda: causal("Gemma2", head_dim=16, num_hidden_layers=11, use_cache=False, **GROUPED),
    "gpt2": gpt2,
    "opt": lambda: causal("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "t5": t5,
}
FAST = {"llama", "bert"}


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """While inside, notes for each capture that was shortened whether it was filled."""
    filled: list[bool] = []

    def noted(*args: Any) -> bool:
        filled.append(fill(*args))
        return filled[-1]

    with monkeypatch.context() as patch:
        patch.setattr(repeats, "fill", noted)
        yield filled


def called(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, is_whole: bool, **options: Any
) -> tuple[CompiledModule, Any, list[bool]]:
    """A new model, compiled and called once, what it gave, and for each capture that was shortened if it was filled."""
    torch.manual_seed(1)
    model = make().train(options.pop("training", True))
    with watched(monkeypatch) as filled, monkeypatch.context() as patch:
        patch.setattr(repeats, "without_repeats", lambda *args: None if is_whole else without_repeats(*args))
        compiled = chunkft_fx.compile(model, "8GB", chunks=2, backend=options.pop("backend", "eager"), **options)
        torch.manual_seed(2)
        batch = {"x": torch.randn(2, 4, 8)} if isinstance(model, Chain) else {"input_ids": IDS, "labels": IDS}
        return compiled, compiled(**batch), filled


def wiring(session: Session) -> list[Any]:
    """What a capture and its outline say without the names of values: each is called by its region and place."""
    capture, regions = session.capture, session.programs.outline.regions
    known: dict[str, Any] = {p: capture.parameters.get(p, p) for p in capture.primals} | capture.tangents
    known |= dict.fromkeys(capture.constants, "constant")
    for region in regions:
        known |= {name: (region.index, "forward", i) for i, name in enumerate(region.forward)}
        known |= {name: (region.index, "backward", i) for i, name in enumerate(region.values)}
    described: list[Any] = [
        (r.label, r.template.key, *([known[n] for n in names] for names in (r.primals, r.tangents))) for r in regions
    ]
    gradients = [[known[p] for _, p in r.gradients] for r in regions]
    outputs = [known[o] if isinstance(o, str) else o for o in capture.outputs]
    return [described, gradients, outputs, list(capture.gradients), list(capture.tangents.values())]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FILLED])
def test_a_filled_capture_is_that_of_the_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled, whole = (called(FILLED[name], monkeypatch, is_whole) for is_whole in (False, True))
    assert filled[2] == [True]
    (a,), (b,) = filled[0]._training.sessions, whole[0]._training.sessions
    assert wiring(a) == wiring(b)
    a.capture.graph.lint()
    assert len(operations(a)) == len(operations(b))
    assert a.capture.is_random == b.capture.is_random
    for compiled, output, _ in (filled, whole):
        output.loss.backward()
        compiled.activate(0)
    assert torch.equal(filled[1].loss, whole[1].loss)
    for mine, other in zip(tensors(filled[1]), tensors(whole[1]), strict=True):
        assert torch.equal(mine, other)
    gradients = [[s.grad for s in compiled.active_slices()] for compiled, _, _ in (filled, whole)]
    assert all(map(torch.equal, *gradients))


def operations(session: Session) -> list[torch.fx.Node]:
    return [n for n in session.capture.graph.nodes if n.op == "call_function"]


def tensors(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(dict(output)) if isinstance(t, Tensor)]


class Block(nn.Module):
    """A block of a chain; ``change`` is what the test has it do."""

    def __init__(self, change: Callable[[Block, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))
        self.scale: float = 1.0
        self.change = change

    def forward(self, x: Tensor, common: Any) -> Tensor:
        return x + self.change(self, self.second(torch.relu(self.first(x))), common) * self.scale


class Chain(nn.Module):
    """Equal blocks one after another; ``read`` gives the result out of the values before and behind all blocks."""

    def __init__(
        self,
        change: Callable[[Block, Tensor, Any], Tensor] = lambda block, x, common: x,
        read: Callable[[Sequence[Tensor]], Any] = lambda values: values[-1],
        count: int = 8,
    ) -> None:
        super().__init__()
        self.common = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList(Block(change) for _ in range(count))
        self.read = read

    def forward(self, x: Tensor) -> Any:
        values, common = [x], self.common * 2
        for block in self.blocks:
            values.append(block(values[-1], common))
        return self.read(values)


def weighted() -> Chain:
    chain = Chain()
    for i, block in enumerate(chain.blocks):
        vars(block)["scale"] = 1.0 + i
    return chain


def counted(block: Block, x: Tensor, common: Any) -> Tensor:
    block.seen.add_(1)
    return x


ALIKE: dict[str, Callable[[], Chain]] = {
    "plain": Chain,
    "random": lambda: Chain(lambda block, x, common: torch.dropout(x, 0.5, True)),
    "sharing what is trained": lambda: Chain(lambda block, x, common: x * common),
    "with a constant each": lambda: Chain(lambda block, x, common: x * torch.tensor([1.0] * 8)),
}
# Nothing of these may be copied from each other as if blocks were equal.
UNLIKE: dict[str, Callable[[], Chain]] = {
    "a number each": weighted,
    "summed up": lambda: Chain(read=lambda values: sum(values[1:], values[0])),
    # the gradient of each comes from two sides, and is summed in the block behind it
    "all returned": lambda: Chain(read=tuple),
    "first read by all": lambda: Chain(read=lambda values: values[-1] + values[3]),
    "written buffers": lambda: Chain(counted),
    "sizes of data": lambda: Chain(lambda block, x, common: x + x[x > 0].sum()),
    "too few": functools.partial(Chain, count=4),
}


def results(chain: Callable[[], Chain], monkeypatch: pytest.MonkeyPatch, is_whole: bool) -> tuple[Any, list[bool]]:
    compiled, output, filled = called(chain, monkeypatch, is_whole)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    total = sum((o.square().sum() for o in outputs), torch.zeros(()))
    total.backward()
    buffers = [b.clone() for b in compiled.buffers()]
    gradients = [s.grad for s in compiled.active_slices() if s.grad is not None]
    return [wiring(compiled._training.sessions[0]), [*outputs, *gradients, *buffers]], filled


@pytest.mark.parametrize("name", [*ALIKE, *UNLIKE])
def test_only_equal_blocks_are_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = (ALIKE | UNLIKE)[name]
    (filled, flags), (whole, _) = (results(make, monkeypatch, is_whole) for is_whole in (False, True))
    assert (True in flags) == (name in ALIKE)
    assert filled[0] == whole[0]
    assert len(filled[1]) == len(whole[1])
    assert all(map(torch.equal, filled[1], whole[1]))


@pytest.mark.parametrize(("strange", "first"), [(None, "blocks.0"), (0, "blocks.1")])
def test_only_what_it_reads_may_tell_the_first_block_from_the_others(
    strange: int | None, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Entered(Chain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x * self.common)

    def make() -> Chain:
        chain = Entered()
        if strange is not None:
            vars(chain.blocks[strange])["scale"] = 2.0
        return chain

    found: list[str] = []
    plain = fill

    def noted(capture: Any, parts: Any, blocks: Sequence[str]) -> bool:
        found.extend(parts.first.blocks)
        return plain(capture, parts, blocks)

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "fill", noted)
        filled, flags = results(make, monkeypatch, False)
    whole, _ = results(make, monkeypatch, True)
    assert (found, flags) == ([first], [True])
    assert filled[0] == whole[0]
    assert all(map(torch.equal, filled[1], whole[1]))


def test_a_block_of_another_shape_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on one side of it are still equal to each other."""

    def make() -> Chain:
        chain = Chain(count=9)
        chain.blocks[7].first, chain.blocks[7].second = nn.Linear(8, 5), nn.Linear(5, 8)
        return chain

    (filled, flags), (whole, _) = (results(make, monkeypatch, is_whole) for is_whole in (False, True))
    assert flags == [True]
    assert filled[0] == whole[0]
    assert len(filled[1]) == len(whole[1])
    assert all(map(torch.equal, filled[1], whole[1]))


def test_a_frozen_block_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Chain:
        chain = Chain(count=9)
        chain.blocks[0].requires_grad_(False)
        chain.blocks[1].requires_grad_(False)
        return chain

    (filled, flags), (whole, _) = (results(make, monkeypatch, is_whole) for is_whole in (False, True))
    assert flags == [True]
    assert filled[0] == whole[0]
    assert len(filled[1]) == len(whole[1])
    assert all(map(torch.equal, filled[1], whole[1]))


def test_blocks_are_copied_in_evaluation_and_for_lengths_that_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, _, _ = called(Chain, monkeypatch, False)
    plain = compiled._training.plain
    with watched(monkeypatch) as filled:
        for length in (5, 6, 9):
            x = torch.randn(2, length, 8)
            assert torch.equal(compiled(x=x), plain(x))
        with torch.no_grad():
            assert torch.equal(compiled(x=x), plain(x))
    assert len(filled) == 2
    assert all(filled)
