"""Runs private torch interfaces behind typed functions: all that the library uses of them beside `capture`."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._functorch.partitioners as partitioners
import torch._inductor.config as inductor_config
import torch.utils._python_dispatch as python_dispatch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.descriptors import PlainAOTOutput
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import CompileContext, TracingContext, tracing
from torch._higher_order_ops.effects import _EffectType, _get_effect, _register_effectful_op
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx_inner
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

# torch.autograd.graph.region_activation_memory_budget, since torch 2.13
_BUDGET_WISH = "_region_activation_memory_budget"

# Held while torch's partitioner is adapted.
_PARTITIONING = threading.Lock()

Compiled = Callable[[list[Any]], Sequence[Any]]


def is_torch_compiled(model: Any) -> bool:
    """True for a module that ``torch.compile`` returned, or that was compiled in place."""
    return isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None


def wrapping_ddp() -> nn.Module | None:
    """The DistributedDataParallel module whose forward runs right now."""
    found: nn.Module | None = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return found


def store_of_ranks(prefix: str) -> Any:
    """The key-value store by which the processes of `torch.distributed` found each other, for keys of this prefix."""
    c10d: Any = torch.distributed.distributed_c10d
    return c10d.PrefixStore(prefix, c10d._get_default_store())


def is_sharded(model: nn.Module) -> bool:
    """True for a model that FSDP shards, in either of its forms, or with parameters that are DTensors."""
    names = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    kinds = {type(t).__name__ for p in model.parameters() for t in (p, p.data)}
    return bool(names & {"FSDPModule", "FullyShardedDataParallel"}) or bool(kinds & {"DTensor", "FlatParameter"})


def is_higher_order(target: Any) -> bool:
    """True for an operator that takes graphs as operands, such as ``torch.cond``."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def below_autograd(target: Callable[..., Any], *args: Any) -> Any:
    """Call an operator without its part for autograd, which for higher-order operators traces anew at each call."""
    with torch._C._AutoDispatchBelowAutograd():
        return target(*args)


def as_traced() -> contextlib.AbstractContextManager[Any]:
    """While inside, autocast casts nothing: what it does is in a traced graph already, where the trace had it do so."""
    guard: contextlib.AbstractContextManager[Any] = torch._C._DisableAutocast()
    return guard


def is_called_by(function: Callable[..., Any]) -> bool:
    """Whether the caller of this was called by a Python function."""
    return sys._getframe(2).f_code is function.__code__


def alias_as_parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter over a tensor's memory, as `torch.nn.Parameter` makes it of a plain tensor."""
    made: nn.Parameter = Tensor._make_subclass(nn.Parameter, tensor, True)
    return made


def outside_graphs(function: Callable[..., None]) -> Callable[..., None]:
    """A function at which a trace of Dynamo ends its graph, to run it as it is."""
    made: Callable[..., None] = torch.compiler.disable(function)
    return made


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """While inside, operators do what they do alone: no mode, transform, subclass or trace sees or changes them."""
    with (
        _untraced(),
        python_dispatch._disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        torch.no_grad(),
        as_traced(),
    ):
        yield


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """While inside, `torch.compiler.is_compiling` is false, also in the one thread in which Dynamo traces."""
    if CompileContext.try_get() is None:
        yield
        return
    kept, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = kept


def untraced_because() -> str | None:
    """Why Dynamo would run a function as it is now instead of what was traced of it; None if it would not."""
    stance = torch._dynamo.eval_frame._stance
    if stance.stance not in ("default", "fail_on_recompile") or stance.backend is not None:
        return f"torch.compiler.set_stance({stance.stance!r})"
    if torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE"
    in_mode = getattr(python_dispatch, "any_torch_dispatch_mode_on_stack", python_dispatch.is_in_torch_dispatch_mode)
    if in_mode():
        return "a TorchDispatchMode, such as FlopCounterMode"
    return None


def is_in_forward_mode() -> bool:
    """Whether values may carry tangents of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def is_operator(target: Any) -> bool:
    """True for the target of a node that is an overload of a registered operator."""
    return isinstance(target, torch._ops.OpOverload)


def is_torchs_own(target: Any) -> bool:
    """True for an overload of an operator that torch itself defines, with its derivative."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims")


def holds_graphs(target: Any) -> bool:
    """True for the target of a node that is an operator on graphs, such as the call of an autograd function."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def writes_memory(target: Any) -> bool:
    """True for an operator that changes an input in place."""
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def returns_view(target: Any) -> bool:
    """True for an operator whose result can share memory with an input."""
    returns = target._schema.returns if isinstance(target, torch._ops.OpOverload) else ()
    return any(r.alias_info is not None for r in returns)


def written_arguments(target: Any) -> frozenset[int]:
    """The positions, in its schema, of the arguments that an operator writes."""
    arguments = enumerate(target._schema.arguments)
    return frozenset(i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their names, defaults too; by their positions if it is no registered operator's."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    known = node.target._schema.arguments
    found = {a.name: node.kwargs.get(a.name, a.default_value if a.has_default_value() else None) for a in known}
    return found | {a.name: value for a, value in zip(known, node.args, strict=False)}


def is_erased(node: fx.Node) -> bool:
    """True for a node that was taken out of its graph."""
    return bool(node._erased)


def version(tensor: Tensor) -> int:
    """How often a tensor was written in place, as autograd counts it."""
    return int(tensor._version)


def storage_key(tensor: Tensor) -> int:
    """A number that strided tensors have in common if they share memory, also fake ones; valid as long as they live."""
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def dynamo_value(node: fx.Node) -> Any:
    """The fake value that Dynamo recorded for a node of the graph that it traced; None if it recorded none."""
    return node.meta.get("example_value")


def dynamo_meta(node: fx.Node, value: Any = None) -> dict[str, Any]:
    """Metadata for a new node of Dynamo's graph: the provenance of ``node``, and the fake value if it is known."""
    meta = {k: v for k, v in node.meta.items() if k != "example_value"}
    return meta if value is None else meta | {"example_value": value}


def hooks_of(parameter: Tensor) -> frozenset[int]:
    """The ids of the hooks on a parameter's gradient: those on its way, and those after accumulation."""
    hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
    return frozenset(key for registered in hooks for key in registered or ())


def accumulates(leaf: Tensor) -> bool:
    """Whether the backward that runs now adds to the gradients of leaves such as this one, which it reaches.

    False in `torch.autograd.grad`, and in a backward with ``inputs`` that do not name it.
    """
    return bool(torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node))


def before_every_optimizer_step(hook: Callable[[Optimizer, Any, Any], None]) -> Callable[[], None]:
    """Call ``hook(optimizer, args, kwargs)`` before each step of any optimizer; returns what ends that."""
    handle = register_optimizer_step_pre_hook(hook)
    end: Callable[[], None] = handle.remove
    return end


def step_without_hooks(optimizer: Optimizer) -> None:
    """An optimizer's step without the hooks that torch calls around those of all optimizers."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):  # as `Optimizer._patch_step_function` marks what it has wrapped
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


class CountedTraffic(python_dispatch.TorchDispatchMode):
    """While inside, adds up in ``nbytes`` what operators read and write of tensors with ``numel`` elements or more."""

    def __init__(self, numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel, self.nbytes = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not returns_view(func) or writes_memory(func):
            moved = [*tree_leaves((args, kwargs)), *tree_leaves(result)]
            if writes_memory(func) and result is None:  # a foreach function, which writes its first list
                moved += tree_leaves(args[0])
            self.nbytes += sum(t.nbytes for t in moved if isinstance(t, Tensor) and t.numel() >= self.numel)
        return result


def flop_formula(packet: Any) -> Callable[..., int] | None:
    """The formula of torch's FLOP counter for an operator (all overloads of one name); None if it has none.

    It takes the operator's arguments, with tensors of plain sizes, and ``out_val=`` the result.
    """
    found: Callable[..., int] | None = flop_registry.get(packet)
    return found


def is_random(node: fx.Node) -> bool:
    """True for an operator that draws from torch's random generators (attention does so only with dropout)."""
    graphs = getattr(node.target, "graphs", {})
    if any(is_random(inner) for module in graphs.values() for inner in module.graph.nodes):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = (
                node.args[position]
                if position < len(node.args)
                else node.kwargs.get("dropout_p", argument.default_value)
            )
            return bool(given != 0.0)
    return True


def settings_text() -> str:
    """All settings of torch's partitioner and of Inductor that change what they make of a graph, as a digest."""
    return f"{functorch_config.get_hash().hex()} {inductor_config.get_hash().hex()}"


def partition(
    module: fx.GraphModule, num_forward_outputs: int, recompute: bool
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a region's joint graph with torch's min-cut partitioner; ``module`` is consumed.

    ``recompute`` keeps only the region's inputs (and what random operators drew, and nodes with ``meta["save"]``)
    for backward; nodes with ``meta["must_recompute"]`` are kept in no case. The
    saved values come last among the forward's outputs, and first, under the same names, among the
    backward's placeholders.
    """
    graph = module.graph
    output = graph.output_node()
    values = output.args[0]
    assert isinstance(values, (tuple, list))
    output.meta["desc"] = [PlainAOTOutput(i) for i in range(len(values))]
    budget = 1.0
    if recompute and not any(_must_save(node) for node in graph.nodes):
        budget = 0.0
    elif recompute:
        # A recomputed random operator would draw again: save what it drew, recompute all the rest.
        for node in graph.nodes:
            if node.op == "call_function" and node.meta["partitioner_tag"] == "is_forward":
                node.meta = dict(node.meta)
                saved = _must_save(node)
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE
    for node in graph.nodes:
        if node.meta.get("must_recompute") and node.meta["partitioner_tag"] == "is_forward":
            node.meta = dict(node.meta, recompute=CheckpointPolicy.MUST_RECOMPUTE)
    # Weights are alive anyway: save them rather than a view of them, which would hide that it is a weight.
    primals = [node for node in graph.find_nodes(op="placeholder") if node.meta["partitioner_tag"] == "is_forward"]
    weights = [i for i, node in enumerate(primals) if node.meta.get("is_parameter")]
    settings = functorch_config.patch(activation_memory_budget=budget, recompute_views=True)
    # without code for graphs that nobody runs: torch keeps the text of all code that it generates for good
    with _PARTITIONING, settings, _adapted_partitioner(), _use_lazy_graph_module(True):
        return partitioners.min_cut_rematerialization_partition(
            module, None, num_fwd_outputs=num_forward_outputs, static_lifetime_input_indices=weights
        )


@contextlib.contextmanager
def _adapted_partitioner() -> Iterator[None]:
    """Keep torch's partitioner from two things; for one thread at a time.

    It would give recomputed random operators their old generator states as further inputs. What draws is saved here.
    Left are operators that could draw but do not, such as attention without dropout, which torch 2.13 and before count
    as random. And it would generate code for backward graphs each time that it changes them.
    """
    reorder = partitioners.reordering_to_mimic_autograd_engine
    before = {"has_recomputable_rng_ops": partitioners.has_recomputable_rng_ops, reorder.__name__: reorder}
    ours = {"has_recomputable_rng_ops": _never, reorder.__name__: functools.partial(_without_code, reorder)}
    vars(partitioners).update(ours)
    try:
        yield
    finally:
        vars(partitioners).update(before)


def _without_code(rewrite: Callable[[fx.GraphModule], fx.GraphModule], module: fx.GraphModule) -> fx.GraphModule:
    """What ``rewrite`` makes of a module, with code that is generated when it is asked for.

    Other threads get code as always: what is changed meanwhile belongs to all.
    """
    ours, generate = threading.get_ident(), fx.GraphModule.recompile

    def recompile(self: fx.GraphModule) -> Any:
        return None if threading.get_ident() == ours else generate(self)

    fx.GraphModule.recompile = recompile  # type: ignore[method-assign]
    try:
        made = rewrite(module)
    finally:
        fx.GraphModule.recompile = generate  # type: ignore[method-assign]
    return made if isinstance(made, _LazyGraphModule) else _LazyGraphModule(made, made.graph)


def _never(fx_g: fx.GraphModule) -> bool:
    return False


def forget_wishes(graph: fx.Graph) -> None:
    """Drop what the model asked of torch's partitioner (checkpointing, budgets): the plan decides instead."""
    for node in graph.nodes:
        for key in ("recompute", "ac_graph_id", "has_backward_hook", "memory_budget"):
            node.meta.pop(key, None)
        custom = node.meta.get("custom")
        if isinstance(custom, dict) and _BUDGET_WISH in custom:
            node.meta["custom"] = {k: v for k, v in custom.items() if k != _BUDGET_WISH}


def _must_save(node: fx.Node) -> bool:
    """True for what cannot be computed again (draws, effects), or must not be because it is dear (``meta["save"]``)."""
    source = node.all_input_nodes[0] if node.target is operator.getitem else node
    return is_random(source) or bool(node.meta.get("save")) or source.target is torch.ops.higher_order.with_effects


def start_workers() -> None:
    """Have Inductor start the processes that compile Triton's kernels, unless they run or it was told to have none.

    They take some seconds to come; until then kernels are compiled one after another, in this process.
    """
    AsyncCompile.wakeup()


def compile_graph(module: fx.GraphModule, fake_mode: FakeTensorMode, is_backward: bool) -> Compiled:
    """Compile one partitioned graph with Inductor; the result takes a list of inputs, which it empties."""
    output = module.graph.output_node()
    values = output.args[0]
    assert isinstance(values, (tuple, list))
    # Regions are compiled apart, so every output must have exactly the strides it was traced with.
    output.meta["user_visible_output_idxs"] = [i for i, v in enumerate(values) if isinstance(v, fx.Node)]
    fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    with inductor_config.patch(fallback_random=True), tracing(TracingContext(fake_mode)), fake_mode:
        compiled: Compiled = compile_fx_inner(module, fakes, is_backward=is_backward)
    return compiled


def cache_hits() -> int:
    """How many graphs Inductor found in its cache, so far in this process, instead of compiling them."""
    return int(counters["inductor"]["fxgraph_cache_hit"])


def keep_checks_of_matrices() -> None:
    """Have traces keep the check that a matrix can be inverted: torch 2.11 drops it, since no value needs it."""
    if _get_effect(torch.ops.aten._linalg_check_errors.default) is None:
        _register_effectful_op("aten::_linalg_check_errors", _EffectType.ORDERED)


def graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A module whose Python code is generated when it is called or shown: most graphs made while planning never are."""
    return _LazyGraphModule(root, graph)


def keeps_graph() -> bool:
    """True inside a backward pass that was started with ``retain_graph=True``."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


@contextlib.contextmanager
def fake_mode_of(values: Iterable[Any]) -> Iterator[None]:
    """The fake mode of the first fake tensor among ``values``, if there is one.

    Running an operator on fake values must not narrow down the sizes that the capture holds for, so
    guards are suppressed.
    """
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
        if mode is not None and mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
            # an operator whose result's size depends on data makes a new symbol, which nobody asks about
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield


def set_allocator(settings: str) -> None:
    """Change settings of the running process's device allocator, written as in ``PYTORCH_ALLOC_CONF``."""
    torch._C._accelerator_setAllocatorSettings(settings)


def release_workspaces() -> None:
    """Give back the device memory that cuBLAS holds for every thread that multiplied; the next product takes it anew.

    No product may be under way.
    """
    torch._C._cuda_clearCublasWorkspaces()


def release_idle_pinned() -> None:
    """Give the pinned host memory that nobody uses any more, and torch keeps, back to the system."""
    torch._C._host_emptyCache()
