"""Writes the joint graph of a model and a batch, with named inputs, outputs and gradients: a `Capture`.

What the rest of the library sees is `Capture`, a joint forward and backward graph in ATen operators. Tracing is made of
private torch interfaces: they are touched here, in `capture.tracing`, which calls the model, and in `torch_internals`
only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import (
    BackwardTokenAOTInput,
    ForwardTokenAOTInput,
    ForwardTokenAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    SubclassGetAttrAOTInput,
    SubclassSizeAOTInput,
    SubclassStrideAOTInput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_fx.capture.dense_gradients import with_dense_gradients
from chunkft_fx.capture.user_code import naming_the_forward_line, where
from chunkft_fx.errors import UnsupportedGraph
from chunkft_fx.graph.effects import new_token, with_tokens
from chunkft_fx.graph.sub_graphs import attribute, close_all
from chunkft_fx.torch_internals import forget_wishes, is_random, keep_checks_of_matrices


@dataclass
class Capture:
    """One joint graph of the whole model, for one set of input shapes and modes.

    ``graph`` has placeholders in call order (``primals``) followed by the tangents; all other fields
    name its nodes. ``parameters`` maps a primal to the parameter's name (the first of its names when
    weights are tied), ``constants`` a primal that the trace itself created to its value. ``outputs``
    are what the caller gets, in order (a node name or a plain constant); ``mutations`` pairs a
    primal with the node that holds its new value (running statistics of batch norm). ``gradients``
    maps a primal to the node of its gradient, ``tangents`` a tangent to the index of its output.
    ``effects`` names values that nobody reads and that must be computed all the same (see `effects`).
    ``path`` tells the calls that the forward made (see `user_code.path_of`), ``own_derivative`` what has another
    derivative than torch's, and where; nothing if all are torch's.
    """

    graph: fx.Graph
    fake_mode: FakeTensorMode
    primals: tuple[str, ...]
    parameters: dict[str, str]
    constants: dict[str, Any]
    outputs: tuple[Any, ...]
    mutations: tuple[tuple[str, str], ...]
    gradients: dict[str, str]
    tangents: dict[str, int]
    is_random: bool = field(default=False)
    effects: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    own_derivative: str = ""


class OutputName(str):
    """The name of a node among ``Capture.outputs``, to tell it from a constant output."""


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any], names: Mapping[int, str], backend: str) -> Capture:
    """Trace Dynamo's graph into a joint ATen graph.

    ``names`` maps ``id(parameter)`` to its name. ``backend="inductor"`` decomposes operators to the form
    that Inductor expects; ``"eager"`` keeps ATen operators whole. Random operators stay ATen's own in
    both, so that a seed gives the same dropout masks as the plain model.
    """
    keep_checks_of_matrices()
    with_dense_gradients(gm)
    decompositions: dict[Any, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(inductor_config.patch(fallback_random=True))
        if hasattr(
            functorch_config, "backward_pass_autocast"
        ):  # torch asks for backward to be called outside of autocast, so the trace of it must hold no casts
            stack.enter_context(functorch_config.patch(backward_pass_autocast="off"))
        if backend == "inductor":
            decompositions = dict(select_decomp_table())
        with naming_the_forward_line():
            joint = aot_export_joint_with_descriptors(stack, gm, tuple(example_inputs), decompositions=decompositions)
        module, fake_mode = joint.graph_module, joint.fake_mode
    assert fake_mode is not None
    return _read_joint(module, fake_mode, example_inputs, names)


def _read_joint(
    module: fx.GraphModule, fake_mode: FakeTensorMode, inputs: Sequence[Any], names: Mapping[int, str]
) -> Capture:
    graph = module.graph
    forget_wishes(graph)
    constants = _lift_constants(module, fake_mode)
    token, *effects = with_tokens(graph) or (None,)
    if token is not None:
        constants[token] = new_token()
    parameters: dict[str, str] = {}
    tangents: dict[str, int] = {}
    by_index: dict[int, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        description = node.meta.get("desc")
        if node.name in constants:
            continue
        if isinstance(description, PlainAOTInput):
            by_index[description.idx] = node.name
            name = names.get(id(inputs[description.idx]))
            if name is not None:
                parameters[node.name] = name
        elif isinstance(description, TangentAOTInput) and isinstance(description.output, PlainAOTOutput):
            tangents[node.name] = description.output.idx
        elif isinstance(description, ForwardTokenAOTInput):
            constants[node.name] = new_token()
        elif isinstance(description, BackwardTokenAOTInput):
            user = next(iter(node.users))
            raise UnsupportedGraph(
                f"{user.args[1]} has side effects in the backward pass{where(user)}, which could not be kept in order; "
                "move them to the forward pass, or register the operator without effects"
            )
        elif isinstance(description, TangentAOTInput) and isinstance(description.output, InputMutationAOTOutput):
            written = description.output.mutated_input
            place = _where_written(graph, written)
            weight = names.get(id(inputs[written.idx])) if isinstance(written, PlainAOTInput) else None
            if weight is not None:
                raise UnsupportedGraph(
                    f"forward writes the weight {weight}{place}, as max_norm of an embedding does; only an optimizer "
                    "may change it: switch that off, and change the weight after optimizer.step() instead"
                )
            raise UnsupportedGraph(
                f"forward changes an input or a buffer in place{place} in a way that gradients flow through; "
                "return the changed value instead, or detach what is written"
            )
        elif isinstance(description, (SubclassGetAttrAOTInput, SubclassSizeAOTInput, SubclassStrideAOTInput)):
            raise UnsupportedGraph(
                f"an input, an output or a parameter of the model{where(node)} is made of several tensors "
                f"({description!r}), such as a nested or a distributed tensor, which is not supported; pass its parts "
                "as plain tensors"
            )
        else:
            raise UnsupportedGraph(
                f"graph input {node.name}{where(node)} is of a kind that is not supported: {description!r}"
            )
    output = graph.output_node()
    outputs: dict[int, Any] = {}
    mutations: list[tuple[str, str]] = []
    gradients: dict[str, str] = {}
    flat = output.args[0]
    assert isinstance(flat, (tuple, list))
    for value, description in zip(flat, output.meta["desc"], strict=True):
        if isinstance(description, PlainAOTOutput):
            outputs[description.idx] = OutputName(value.name) if isinstance(value, fx.Node) else value
        elif isinstance(description, GradAOTOutput) and isinstance(description.grad_of, PlainAOTInput):
            if isinstance(value, fx.Node):
                gradients[by_index[description.grad_of.idx]] = value.name
        elif isinstance(description, InputMutationAOTOutput) and isinstance(description.mutated_input, PlainAOTInput):
            mutations.append((by_index[description.mutated_input.idx], value.name))
        elif isinstance(description, ForwardTokenAOTOutput):
            effects.append(value.name)
        elif value is not None:
            raise UnsupportedGraph(
                f"an output of the model{where(value)} is of a kind that is not supported: {description!r}; "
                "return tensors that are not views of each other, or clone them"
            )
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["partitioner_tag"] = "is_backward" if node.name in tangents else "is_forward"
        # torch leaves some nodes untagged, such as views in backward, and all of a graph without gradients
        is_backward = any(n.meta["partitioner_tag"] == "is_backward" for n in node.all_input_nodes)
        node.meta.setdefault("partitioner_tag", "is_backward" if is_backward else "is_forward")
    return Capture(
        graph=graph,
        fake_mode=fake_mode,
        primals=tuple(by_index[i] for i in range(len(by_index))),
        parameters=parameters,
        constants=constants,
        outputs=tuple(outputs[i] for i in sorted(outputs)),
        mutations=tuple(mutations),
        gradients=gradients,
        tangents=tangents,
        is_random=any(is_random(node) for node in graph.nodes),
        effects=tuple(effects),
    )


def _where_written(graph: fx.Graph, written: Any) -> str:
    """`where` of the node whose value an input, named by its descriptor, has after the forward."""
    output = graph.output_node()
    for value, description in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
        if isinstance(description, InputMutationAOTOutput) and description.mutated_input == written:
            return where(value)
    return ""


def _lift_constants(module: fx.GraphModule, fake_mode: FakeTensorMode) -> dict[str, Any]:
    """Turn tensors that the trace baked in (``get_attr``) into placeholders, so that regions can share them.

    Operators that take graphs are closed over them first (`graph.sub_graphs`).
    """
    graph = module.graph
    close_all(module)
    constants: dict[str, Any] = {}
    by_target: dict[str, fx.Node] = {}
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        value = attribute(module, node)
        if not isinstance(value, Tensor):
            user = next(iter(node.users))
            raise UnsupportedGraph(
                f"the model uses {user.target} in a way that is not supported: it takes {type(value).__name__} "
                f"{node.target}{where(user)}; write this part of the model without it"
            )
        if str(node.target) not in by_target:
            with graph.inserting_before(first):
                lifted = graph.placeholder(f"constant_{len(by_target)}")
            lifted.meta["val"] = fake_mode.from_tensor(value)
            by_target[str(node.target)] = lifted
            constants[lifted.name] = value
        node.replace_all_uses_with(by_target[str(node.target)])
        graph.erase_node(node)
    return constants
