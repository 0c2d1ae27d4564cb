"""Says which gradients of a model's outputs a backward is expected to bring, before the first one came.

What is saved in a forward, and planned for, hangs on it. A wrong guess costs a second forward in the first backward,
and a second plan.
"""

from __future__ import annotations

import operator

from torch import fx

from chunkft_fx.capture.capture import Capture
from chunkft_fx.head import log_probs


def first_guess(capture: Capture) -> frozenset[str]:
    """The tangents of the outputs that losses are made of.

    They are the scalar outputs (a loss) if there are any, else all. A head of log-probabilities (`head.log_probs`) is
    there for trainers that make the loss themselves: then they are the log-probabilities in the place of the scalars
    that come of them. Of what the head tells beside, trainers make metrics.
    """
    by_name = {n.name: n for n in capture.graph.nodes}
    scalars = frozenset(t for t in capture.tangents if by_name[t].meta["val"].ndim == 0)
    made = _made_of_log_probs(capture.graph)
    tokens = frozenset(t for t, i in capture.tangents.items() if by_name[capture.outputs[i]] in made) - scalars
    if tokens:
        return tokens | frozenset(t for t in scalars if by_name[capture.outputs[capture.tangents[t]]] not in made)
    return scalars or frozenset(capture.tangents)


def _made_of_log_probs(graph: fx.Graph) -> set[fx.Node]:
    """Log-probabilities of heads that make them, and all that is computed from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.args[0] if node.target is operator.getitem else None
        is_first = isinstance(source, fx.Node) and source.target is log_probs.forward and node.args[1] == 0
        if is_first or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
