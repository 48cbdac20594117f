"""What a function of tensors does, recorded once as a list of operations and replayed without the code that asked for them.

A decoder answers a token by a thousand small operations, and the modules around them take longer than the operations do.
Nothing is compiled and nothing is approximated: the same operations on the same tensors, in the same order. Those that
depend on no input and on nothing that is written to are not repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

UNKNOWN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Composite operators come undivided under inference mode, and without the tags of what they are made of.
UNTAGGED = {torch.ops.aten.where.default, torch.ops.aten.nonzero_numpy.default, torch.ops.aten.repeat_interleave.self_Tensor,
            torch.ops.aten.tensor_split.tensor_indices_or_sections}  # fmt: skip
WRITING = {"add_", "copy_", "index_copy_", "mul_"}
READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__repr__, Tensor.__format__}  # seen by no dispatch


class NotRecordedError(Exception):
    """A step decides by the values of tensors, so that another input would take other operations."""


@dataclass(frozen=True)
class Call:
    """One operation of a step; writes: to an argument."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    writes: bool


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd, and functions that are to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.within = 0  # functions that are one

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run it and keep it; results are kept alive, so that no two have one address."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.lift_fresh.default:  # a constant of the code, new every time: it may be written to
            func = torch.ops.aten.clone.default
        result = func(*args, **kwargs)
        if self.within:
            return result
        if _decides_by_values(func, args, kwargs) or not all(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            raise NotRecordedError(str(func))
        self.calls.append(Call(func, args, kwargs, result, func._schema.is_mutable))
        return result


class _Reading(TorchFunctionMode):
    """Refuses what reads a tensor without an operation."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Pass everything else on."""
        if func in READING and not self.recorder.within:
            raise NotRecordedError(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def _decides_by_values(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether another input could give something of another kind or shape, or the same one something else."""
    if func is torch.ops.aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if torch.Tag.nondeterministic_seeded in func.tags:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        declared = {a.name: a.default_value for a in func._schema.arguments} | given
        # An attention or a dropout that drops nothing draws nothing.
        return bool(declared.get("dropout_p", 1)) and declared.get("train") is not False
    return func in UNTAGGED or bool(UNKNOWN & set(func.tags))


_active = threading.local()  # dispatch modes are a thread's, too


def as_one(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args); while a step is recorded, as one operation. It must depend on its arguments alone and write nothing."""
    recorder = getattr(_active, "recorder", None)
    if recorder is None:
        return function(*args)
    recorder.within += 1
    try:
        result = function(*args)
    finally:
        recorder.within -= 1
    if not recorder.within:
        recorder.calls.append(Call(function, args, {}, result, False))
    return result


@dataclass(frozen=True)
class Recording:
    """What a step did for one input, and what it gave. Every tensor of it is kept, as it was then."""

    calls: list[Call]
    given: Tensor
    result: Tensor

    def replay(self) -> Callable[[Tensor], Tensor]:
        """The same for another tensor of the input's shape, as one plain function.

        Tensors that the step writes to are written to again by every replay; what it counts in Python stays as it is.
        """
        return _replay(self.varying(), self.given, self.result)

    def varying(self) -> list[Call]:
        """The operations whose result is another one the next time."""
        return _varying(self.calls, self.given)


def recorded(step: Callable[[Tensor], Tensor], given: Tensor) -> Recording:
    """What step(given) does. Raises NotRecordedError where the step reads a tensor's value, or gives a result whose shape
    depends on one; it has run in part then."""
    recorder = _active.recorder = _Recorder()
    try:
        with recorder, _Reading(recorder):
            result = step(given)
    finally:
        _active.recorder = None
    return Recording(recorder.calls, given, result)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for part in tree if part is not None for tensor in tensors_in(part)]


def storage_of(tensor: Tensor) -> int:
    """Where the memory begins that a tensor is in."""
    return tensor.untyped_storage().data_ptr()


def _varying(calls: Sequence[Call], given: Tensor) -> list[Call]:
    """Those whose result is another one the next time: of the input, or in memory that is written to."""
    written = {storage_of(t) for call in calls if call.writes for t in tensors_in((written_by(call), call.result))}
    varying, kept = {id(given)}, []
    for call in calls:
        read, made = tensors_in((call.args, call.kwargs)), tensors_in(call.result)
        if call.writes or any(id(t) in varying or storage_of(t) in written for t in (*read, *made)):
            varying |= {id(t) for t in made}
            kept.append(call)
    return kept


def written_by(call: Call) -> list[Any]:
    """The arguments that an operation writes to."""
    declared = call.function._schema.arguments  # type: ignore[attr-defined]
    by_name = dict(zip((argument.name for argument in declared), call.args, strict=False)) | call.kwargs
    return [by_name.get(a.name) for a in declared if a.alias_info is not None and a.alias_info.is_write]


def _replay(calls: Sequence[Call], given: Tensor, result: Tensor) -> Callable[[Tensor], Tensor]:
    """The operations that have to be repeated, as one plain function."""
    graph, constants = fx.Graph(), torch.nn.Module()
    nodes: dict[int, fx.Node] = {id(given): graph.placeholder("given")}

    def node_of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in nodes:
            name = f"constant_{len(nodes)}"
            constants.register_buffer(name, leaf)
            nodes[id(leaf)] = graph.get_attr(name)
        return nodes[id(leaf)]

    plain: dict[Any, Callable[..., Any]] = {}
    writing: set[fx.Node] = set()  # whatever becomes of their results
    for call in calls:
        if not call.writes and any(call.result is t for t in tensors_in(call.args)):
            continue  # a cast to what it is
        if call.function is torch.ops.aten.slice.Tensor and (piece := _narrowed(call)):
            nodes[id(call.result)] = graph.call_function(torch.narrow, (node_of(call.args[0]), *piece))
            continue
        function = plain.get(call.function, call.function)
        if function is call.function:  # written to since, its arguments may not give the same: the next call may tell
            function = plain[call.function] = _plain(call)
        node = graph.call_function(function, tree_map(node_of, call.args), tree_map(node_of, call.kwargs))
        if call.writes:
            writing.add(node)
        if isinstance(call.result, Tensor):
            nodes[id(call.result)] = node
            continue
        for i, part in enumerate(call.result if isinstance(call.result, (tuple, list)) else ()):
            if isinstance(part, Tensor):
                nodes[id(part)] = graph.call_function(_part, (node, i))
    graph.output(node_of(result))
    graph.eliminate_dead_code(lambda node: node in writing or node.is_impure())
    replayed: Callable[[Tensor], Tensor] = fx.GraphModule(constants, graph).forward
    return replayed


def _plain(call: Call) -> Callable[..., Any]:
    """The function of torch's own Python interface that gives the very same: calls of operators by name take three times as long."""
    if not isinstance(call.function, torch._ops.OpOverload):
        return call.function
    name = call.function._schema.name.partition("::")[2]
    if call.writes:  # tried, it would write once more: those that are methods by the same name and arguments are known
        return getattr(Tensor, name) if name in WRITING else call.function
    for place in (torch, torch._C._nn, Tensor):
        found = getattr(place, name, None)
        if found is None:
            continue
        try:
            own = found(*call.args, **call.kwargs)
        except (TypeError, ValueError, IndexError, RuntimeError):  # another signature: the operator itself it is
            continue
        if isinstance(own, Tensor) and isinstance(call.result, Tensor) and _is_same(own, call.result):
            return found
    return call.function


def _narrowed(call: Call) -> tuple[int, int, int] | None:
    """Dimension, start and length of a slice of consecutive entries; None where it has another step."""
    given = [*call.args, *[None, 0, None, None, 1][len(call.args) :]]
    source, dim, start, _, step = given
    if step != 1:
        return None
    n = source.shape[dim]
    first = min(max(start + n if start and start < 0 else start or 0, 0), n)
    return dim, first, call.result.shape[dim]


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def _part(results: Any, i: int) -> Any:
    return results[i]
