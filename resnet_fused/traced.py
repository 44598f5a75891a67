"""Networks traced by torch.fx: their graph is torchvision's, the code made from it is fused.

What reads, edits or quantises a graph finds the modules and node names it knows. Only the code that
is generated from it runs each convolution together with what follows it, as far as nothing else
uses what lies between: after `create_feature_extractor(model, ["layer1.0.relu"])` all but that
node's surroundings. Each group asks again at every call whether its modules may be fused.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, PythonCode

from . import fusion, sequence
from .ops.conv_bn import conv_bn
from .ops.conv_bn_projection import conv_bn_projection
from .ops.head import head

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


Forward = TypeVar("Forward", bound=Callable[..., Tensor])


def annotated(forward: Forward) -> Forward:
    """`forward(self, x: Tensor) -> Tensor` with annotations that are types.

    torch.fx writes them into the code it generates, where one that is a string, as
    `from __future__ import annotations` makes them, is a name that nothing defines.
    """
    forward.__annotations__.update({"x": Tensor, "return": Tensor})
    return forward


def fuse(graph: fx.Graph) -> None:
    """Makes code generated from `graph` run fused; the graph itself stays what it is."""
    if type(graph._codegen) is CodeGen:
        graph.set_codegen(FusedCode())


class FusedCode(CodeGen):
    """Generates a graph's plain code for TorchScript and its fused code for everything else."""

    def _gen_python_code(self, nodes: Any, *arguments: Any, **options: Any) -> PythonCode:
        plain = super()._gen_python_code(nodes, *arguments, **options)
        fused_graph = _fused(nodes.graph)
        if fused_graph is None:
            return plain
        fused = super()._gen_python_code(fused_graph.nodes, *arguments, **options)
        start = plain.src.index("def forward(")
        header, _, plain_body = plain.src[start:].partition("\n")
        _, _, fused_body = fused.src[fused.src.index("def forward(") :].partition("\n")
        return dataclasses.replace(
            plain,
            src=(
                f"{plain.src[:start]}{header}\n"
                f"    if torch.jit.is_scripting():\n{_indented(plain_body)}\n"
                f"    else:\n{_indented(fused_body)}\n"
            ),
            globals={**plain.globals, **fused.globals, "torch": torch},
        )


def _indented(body: str) -> str:
    return "\n".join(f"    {line}" if line.strip() else line for line in body.splitlines())


def _may_fuse(x: Tensor | fx.Proxy) -> bool:
    if isinstance(x, fx.Proxy):  # generated code traced again, as unpickling does
        fuse(x.tracer.graph)
        return False
    return not fusion.must_call_modules(x)


def run_conv_bn(
    x: Tensor, conv: nn.Module, bn: nn.Module, relu: nn.Module | None, pool: nn.Module | None
) -> Tensor:
    """pool?(relu?(bn(conv(x)))), fused where it may be."""
    out = sequence.fused(x, conv, bn, relu, pool) if _may_fuse(x) else None
    if out is None:
        out = bn(conv(x))
        out = out if relu is None else relu(out)
        out = out if pool is None else pool(out)
    return out


def run_block_end(
    x: Tensor, conv: nn.Module, bn: nn.Module, shortcut: Tensor, relu: nn.Module
) -> Tensor:
    """relu(bn(conv(x)) + shortcut), fused where it may be."""
    layer = fusion.conv_bn(conv, bn) if _may_fuse(x) else None
    if layer is None or not fusion.is_relu(relu):
        return relu(bn(conv(x)) + shortcut)
    return conv_bn(x, layer, residual=shortcut, relu=True)


def run_projected_block_end(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    shortcut: Tensor,
    projection: nn.Module,
    projection_bn: nn.Module,
    relu: nn.Module,
) -> Tensor:
    """relu(bn(conv(x)) + projection_bn(projection(shortcut))), fused where it may be."""
    main, side = fusion.conv_bn(conv, bn), fusion.conv_bn(projection, projection_bn)
    if not _may_fuse(x) or main is None or side is None or not fusion.is_relu(relu):
        return relu(bn(conv(x)) + projection_bn(projection(shortcut)))
    return conv_bn_projection(x, main, shortcut, side)


def run_head(x: Tensor, pool: nn.Module, linear: nn.Module) -> Tensor:
    """linear(flatten(pool(x), 1)), fused where it may be."""
    arguments = fusion.head(pool, linear) if _may_fuse(x) else None
    return linear(torch.flatten(pool(x), 1)) if arguments is None else head(x, *arguments)


class _Call(NamedTuple):
    """A call that stands for several nodes, the last of which has the call's value."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]  # modules by the nodes that call them
    members: tuple[fx.Node, ...]


def _fused(graph: fx.Graph) -> fx.Graph | None:
    """A copy of `graph` with groups of its nodes as one call each, or None if there are none."""
    owner = graph.owning_module
    if owner is None:
        return None
    copy = fx.Graph(owner)
    output = copy.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    copy.output(output[0], output[1].type)
    matcher, replaced = _Matcher(owner), set[fx.Node]()
    for node in list(copy.nodes):
        call = None if node in replaced else matcher.match(node)
        if call is None:
            continue
        *others, last = call.members
        with copy.inserting_before(last):
            arguments = tuple(
                copy.get_attr(str(a.target)) if a in call.members else a for a in call.arguments
            )
            last.replace_all_uses_with(copy.call_function(call.function, arguments))
        for member in (last, *reversed(others)):
            copy.erase_node(member)
        replaced.update(call.members)
    return copy if replaced else None


class _Matcher:
    """Finds what a node begins that one fused op computes."""

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner

    def match(self, node: fx.Node) -> _Call | None:
        """The call for the group that begins at `node`, or None."""
        if self._is(node, nn.Conv2d):
            return self._convolution(node)
        if self._is(node, nn.AdaptiveAvgPool2d):
            return self._head(node)
        return None

    def _convolution(self, conv: fx.Node) -> _Call | None:
        x = conv.args[0]
        bn = self._next(conv, *_NORMS)
        if bn is None:
            return None
        add = _only_user(bn)
        if add is not None and add.target is operator.add:
            return self._block_end(conv, bn, add) or _Call(
                run_conv_bn, (x, conv, bn, None, None), (conv, bn)
            )
        relu = self._next(bn, nn.ReLU)
        pool = None if relu is None else self._next(relu, nn.MaxPool2d)
        members = tuple(node for node in (conv, bn, relu, pool) if node is not None)
        return _Call(run_conv_bn, (x, conv, bn, relu, pool), members)

    def _block_end(self, conv: fx.Node, bn: fx.Node, add: fx.Node) -> _Call | None:
        """A block's last convolution; None for its projection, which goes with that one."""
        first, shortcut = add.args
        relu = self._next(add, nn.ReLU)
        if relu is None or first is not bn or not isinstance(shortcut, fx.Node):
            return None
        x = conv.args[0]
        if self._is(shortcut, *_NORMS) and _only_user(shortcut) is add:
            projection = shortcut.args[0]
            if self._is(projection, nn.Conv2d) and _only_user(projection) is shortcut:
                return _Call(
                    run_projected_block_end,
                    (x, conv, bn, projection.args[0], projection, shortcut, relu),
                    (conv, bn, projection, shortcut, add, relu),
                )
        return _Call(run_block_end, (x, conv, bn, shortcut, relu), (conv, bn, add, relu))

    def _head(self, pool: fx.Node) -> _Call | None:
        flatten = _only_user(pool)
        if flatten is None or flatten.target is not torch.flatten or flatten.args[1:] != (1,):
            return None
        linear = self._next(flatten, nn.Linear)
        if linear is None:
            return None
        return _Call(run_head, (pool.args[0], pool, linear), (pool, flatten, linear))

    def _is(self, node: Any, *kinds: type[nn.Module]) -> TypeGuard[fx.Node]:
        """Whether `node` calls a module of those kinds on one argument."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return False
        return (
            len(node.args) == 1
            and not node.kwargs
            and isinstance(self._owner.get_submodule(str(node.target)), kinds)
        )

    def _next(self, node: fx.Node, *kinds: type[nn.Module]) -> fx.Node | None:
        """The only user of `node`, if it calls a module of those kinds."""
        user = _only_user(node)
        return user if self._is(user, *kinds) else None


def _only_user(node: Any) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
