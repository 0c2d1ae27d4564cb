"""Writes the pieces of a step that covers all parameters: what each has, what it moves, and where in the program."""

from __future__ import annotations

from typing import Any

from torch import fx

from chunkft_fx.bytes import format_bytes
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.pieces import moving_nbytes
from chunkft_fx.plan.table import plain_table, slices_text, text
from chunkft_fx.predict.step_memory import moment_label

HEADS = {
    ops.update: "pieces: updated and written back by the program behind these calls, with what moves each way for that",
    ops.keep: "pieces: gradients leave for host memory behind these calls; states move each way at the step",
    None: "pieces: updated one after another at the optimizer's step, with what moves each way for that",
}


def places(module: fx.GraphModule) -> dict[int, dict[Any, str]]:
    """By piece, for the target of each of its nodes the call of the program behind which it stands."""
    found: dict[int, dict[Any, str]] = {}
    behind = ""
    for node in module.graph.nodes:
        if node.op == "call_module":
            call: Any = module.get_submodule(str(node.target))
            behind = moment_label(call.region, call.is_backward)
        elif node.target in ops.PIECE_NODES:
            number: Any = node.args[1] if node.target in ops.TAKERS else node.args[0]
            found.setdefault(number, {})[node.target] = behind
    return found


def table(compiled: CompiledModule) -> str:
    """A line a piece: slices, elements, bytes that move each way for its update, and where its nodes stand."""
    policy, placed = compiled.plan.policy, places(compiled.program.module)
    taker = next((t for nodes in placed.values() for t in ops.TAKERS if t in nodes), None)
    shown = (ops.fetch_states, taker) if taker is not None else ()
    titles = ["fetched behind", "updated behind" if taker is ops.update else "kept behind"] if shown else []
    found = plain_table("piece", "slices", "elements", "each way", *titles)
    parameters = dict(compiled.named_parameters())
    for i, piece in enumerate(policy.pieces):
        moved = format_bytes(moving_nbytes(piece, parameters, policy.streamed))
        where = [placed.get(i, {}).get(target, "") for target in shown]
        found.add_row(str(i), slices_text(piece), f"{piece.numel:,}", moved, *where)
    return text([HEADS[taker]], found)
