"""`fuse(model)`: fused ops for the residual blocks and layers of anybody's network, in place.

Of a module nothing is replaced but its class, by a subclass of it that differs in one method: the
one that calls convolutions and what follows them. It asks at every call whether fused ops may stand
for these modules (`resnet_fused.fusion`), and calls the original method where they may not. So
parameters, buffers, names, hooks, `state_dict`, `repr` and `isinstance` are what they were, copies
and pickles stay fused, and `unfuse` puts the class back. A module in another one's place would
break references to it, and a `forward` in the instance would not survive a copy.

What a class computes cannot be read off its modules. So only methods are replaced whose meaning is
written down here: those of `nn.Sequential`, and of torchvision and timm, which need not be
installed. A method that refers to other names than it did when that was written (`_METHODS`) is
another version of it, and is left alone.
"""

from __future__ import annotations

import copyreg
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from . import fusion, plan, sequence, traced
from .blocks import ResidualBlock
from .models.network import ResidualNetwork
from .ops.checks import check_is_module
from .ops.conv_bn import conv_bn
from .ops.squeeze_excite import squeeze_excite
from .parameters import Gate

# A convolution, and the normalisation behind it if there is one.
Pair = tuple[nn.Module, nn.Module | None]


class Fused:
    """What the class of a fused module adds to the one that it was made of."""

    replaced = "forward"  # the method
    made_of_ops = False  # whether plans may stand for it
    if TYPE_CHECKING:  # TorchScript reads a class's annotations
        original: ClassVar[type[nn.Module]]
        method: ClassVar[Callable[..., Any]]  # as it was
        plain: ClassVar[Callable[..., Any]]  # the same, for TorchScript

    def pairs(self) -> Iterator[Pair]:
        """The convolutions that are called from here."""
        raise NotImplementedError

    def why_not(self, conv: nn.Module, bn: nn.Module | None) -> str | None:
        """Why no op computes one of those pairs, in eval mode and as it is now, or None."""
        return _why_not(conv, bn)

    def calls(self) -> Iterable[nn.Module]:
        """Children whose own modules are called from here where they are an `nn.Sequential`."""
        return ()

    def by_ops(self, x: Tensor) -> Any:
        """The method's result, by fused ops as far as they may stand for the modules; None where
        the original has to compute it."""
        raise NotImplementedError

    def is_plain(self) -> bool:
        """Whether the original method is still the one that is known."""
        return getattr(self.original, self.replaced) is type(self).method

    def run(self, x: Tensor) -> Any:
        """What the method does."""
        if isinstance(x, Proxy):
            traced.fuse(x.tracer.graph)
        elif self.is_plain():
            out = self.by_ops(x)
            if out is not None:
                return out
        module = cast("nn.Module", self)
        return fusion.run_unfused(partial(getattr(self.original, self.replaced), self), module, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, arguments = _new, (self.original,)
            if rest and isinstance(rest[0], dict):  # plans are of one object
                rest[0] = {name: value for name, value in rest[0].items() if name != "_plans"}
        return (make, arguments, *rest)


def _new(original: type[nn.Module]) -> nn.Module:
    """An instance for `copy` and `pickle` to fill, plain where this version of it is not known."""
    known = _known(original)
    kind = original if isinstance(known, str) else _class(original, known.kind)
    return kind.__new__(kind)


class _OneTensor(Fused):
    """With a `forward(x)` that returns a tensor."""

    @traced.annotated
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.plain(x)
        else:
            return self.run(x)


class _InTurn(Fused):
    """Calls its modules one after the other."""

    def modules_in_turn(self) -> Iterable[nn.Module]:
        return cast("nn.Sequential", self)

    def pairs(self) -> Iterator[Pair]:
        return _pairs(self.modules_in_turn())

    def calls(self) -> Iterable[nn.Module]:
        return self.modules_in_turn()

    def by_ops(self, x: Tensor) -> Any:
        return sequence.run(self.modules_in_turn(), x)


class _Sequential(_InTurn):
    """`nn.Sequential`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (its name there)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.plain(input)
        else:
            return self.run(input)


class _ConvNormAct(_InTurn, _OneTensor):
    """timm's convolution, normalisation with activation, and anti-aliasing."""

    def modules_in_turn(self) -> Iterable[nn.Module]:
        return _present(self, "conv", "bn", "aa")


class _SqueezeExcite(_OneTensor):
    """timm's squeeze and excitation."""

    made_of_ops = True

    def pairs(self) -> Iterator[Pair]:
        own = cast("nn.Module", self)._modules
        for name in ("fc1", "fc2"):
            if (conv := own[name]) is not None:
                yield conv, None

    def why_not(self, conv: nn.Module, bn: nn.Module | None) -> str | None:
        found = "belongs to a gate that is more than mean, ReLU and sigmoid between two 1×1 layers"
        return found if self._gate_arguments() is None else None

    def gate_arguments(self) -> Gate | None:
        """What the op takes, or None where the modules have to run."""
        own = cast("Any", self)
        if own.training or not self.is_plain() or not fusion.untouched(own):
            return None
        return self._gate_arguments()

    def _gate_arguments(self) -> Gate | None:
        own: Any = cast("nn.Module", self)._modules
        reduce, expand = fusion.pointwise(own["fc1"]), fusion.pointwise(own["fc2"])
        if (
            reduce is None
            or expand is None
            or cast("Any", self).add_maxpool
            or not fusion.is_identity(own["bn"])
            or not fusion.is_relu(own["act"])
            or not fusion.is_sigmoid(own["gate"])
        ):
            return None
        return Gate(*reduce, *expand)

    def by_ops(self, x: Tensor) -> Tensor | None:
        gate = None if fusion.must_call_modules(x) else self.gate_arguments()
        return None if gate is None else squeeze_excite(x, *gate)


class _Block(_OneTensor, ResidualBlock):
    """torchvision's residual blocks, which mean what ours do."""

    made_of_ops = True

    def layers(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        own: Any = self._modules
        return tuple((own[f"conv{i}"], own[f"bn{i}"]) for i in ("123" if "conv3" in own else "12"))

    def activations(self) -> tuple[nn.Module, ...]:
        return (self.relu,) * len(self.layers())

    def around_last_activation(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """What is called before and behind the activation that the last convolution follows."""
        return [], []

    def behind(self) -> list[nn.Module]:
        """What is called behind the last normalisation, before the addition."""
        return []

    def pairs(self) -> Iterator[Pair]:
        yield from self.layers()
        yield from _pairs(_present(self, "downsample"))

    def calls(self) -> Iterable[nn.Module]:
        return _present(self, "downsample")

    def by_ops(self, x: Tensor) -> Tensor | None:
        """The block as ours; else, where one of its modules is in the way, in parts."""
        before, after = self.around_last_activation()
        behind = self.behind()
        if not before and not after and not behind:
            out = self._forward_fused(x)
            if out is not None or self.training:
                return out
        if fusion.must_call_modules(x):
            return None
        *activations, activation = self.activations()
        modules: list[nn.Module] = []
        for pair, act in zip(self.layers(), activations, strict=False):
            modules += [*pair, act]
        modules[-1:] = [*before, modules[-1], *after]
        modules += self.layers()[-1]
        gate = None
        if (
            len(behind) == 1
            and isinstance(behind[0], _SqueezeExcite)
            and fusion.is_relu(activation)
        ):
            gate = behind[0].gate_arguments()
        if gate is None:
            modules += behind
        out = sequence.run(modules, x)
        shortcut = sequence.run(_present(self, "downsample"), x)
        if gate is not None:
            return squeeze_excite(out, *gate, shortcut, True)
        out += shortcut
        return activation(out)


class _TimmBlock(_Block):
    """timm's residual blocks, which have further modules."""

    def activations(self) -> tuple[nn.Module, ...]:
        own: Any = self._modules
        return tuple(own[f"act{i + 1}"] for i in range(len(self.layers())))

    def around_last_activation(self) -> tuple[list[nn.Module], list[nn.Module]]:
        return _doing(self, "drop_block"), _doing(self, "aa")

    def behind(self) -> list[nn.Module]:
        return _doing(self, "se", "drop_path")


class _RegNetBlock(_OneTensor):
    """timm's RegNet block: the last convolution takes the shortcut with it."""

    def pairs(self) -> Iterator[Pair]:
        return _pairs(cast("Any", self).conv3.children())

    def by_ops(self, x: Tensor) -> Tensor | None:
        block = cast("Any", self)
        conv3, downsample = block.conv3, block.downsample
        if (
            downsample is None
            or fusion.must_call_modules(x)
            or not isinstance(conv3, _ConvNormAct)
            or not conv3.is_plain()
            or not fusion.untouched(cast("nn.Module", conv3))
            or not fusion.is_relu(block.act3)
            or not _does_nothing(block.drop_path)
        ):
            return None
        modules = list(conv3.modules_in_turn())
        layer = fusion.conv_bn(modules[0], modules[1]) if len(modules) == 2 else None
        if layer is None:
            return None
        out = block.se(block.conv2(block.conv1(x)))
        return conv_bn(out, layer, residual=downsample(x), relu=True)


class _Network(Fused):
    """A ResNet: its stem by ops and, without gradients, all of it by a plan."""

    head: tuple[str, ...] = ()

    def stem(self) -> list[nn.Module]:
        return _present(self, "conv1", "bn1", "relu", "act1", "maxpool")

    def stages(self) -> list[nn.Module]:
        return _present(self, "layer1", "layer2", "layer3", "layer4")

    def pairs(self) -> Iterator[Pair]:
        return _pairs(self.stem())

    def calls(self) -> Iterable[nn.Module]:
        return self.stem()

    def call_stem(self, x: Tensor) -> Tensor:
        return sequence.run(self.stem(), x)

    def call_head(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def by_ops(self, x: Tensor) -> Tensor | None:
        if not torch.compiler.is_compiling():
            planned = plan.run(cast("Any", self), x)
            if planned is not None:
                return planned
        x = self.call_stem(x)
        for stage in self.stages():
            x = stage(x)
        return self.call_head(x) if self.head else x

    def plannable_parts(self) -> Iterator[plan.Part]:
        own = self.is_plain() and not plan.shadows(cast("nn.Module", self))
        stem = [m for module in self.stem() for m in module.modules()]
        yield plan.part(self.call_stem, stem, own)
        for stage in self.stages():
            if own and type(stage) is nn.Sequential and fusion.untouched(stage):
                for block in stage:
                    yield plan.part(block, list(block.modules()), own)
            else:
                yield plan.Part(stage, None)
        if self.head:
            yield plan.part(self.call_head, _present(self, *self.head), own)


class _TorchvisionNetwork(_Network):
    replaced = "_forward_impl"
    head = ("avgpool", "fc")

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.plain(x)
        else:
            return self.run(x)

    def call_head(self, x: Tensor) -> Tensor:
        pool, linear = _present(self, *self.head)
        if linear.training:
            return linear(torch.flatten(pool(x), 1))
        return traced.run_head(x, pool, linear)


class _TimmNetwork(_Network):
    replaced = "forward_features"

    def forward_features(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.plain(x)
        else:
            return self.run(x)

    def by_ops(self, x: Tensor) -> Tensor | None:
        return None if cast("Any", self).grad_checkpointing else super().by_ops(x)


class _Backbone(Fused):
    """torchvision's `IntermediateLayerGetter`, which detectors and segmenters are built on."""

    def forward(self, x: Tensor):  # type: ignore[no-untyped-def]  # TorchScript would insist on Any
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.plain(x)
        else:
            return self.run(x)

    def calls(self) -> Iterable[nn.Module]:
        return cast("nn.ModuleDict", self).values()

    def pairs(self) -> Iterator[Pair]:
        return _pairs(self.calls())

    def by_ops(self, x: Tensor) -> OrderedDict[str, Tensor]:
        out: OrderedDict[str, Tensor] = OrderedDict()
        wanted, modules = cast("Any", self).return_layers, list[nn.Module]()
        for name, module in cast("nn.ModuleDict", self).items():
            modules.append(module)
            if name in wanted:
                out[wanted[name]] = x = sequence.run(modules, x)
                modules.clear()
        return out


def _present(module: object, *names: str) -> list[nn.Module]:
    """The children of those names that are there."""
    own = cast("nn.Module", module)._modules
    children = [own.get(name) for name in names]
    return [child for child in children if child is not None]


def _doing(module: object, *names: str) -> list[nn.Module]:
    """Those of them that are no identity."""
    return [child for child in _present(module, *names) if not _does_nothing(child)]


def _pairs(modules: Iterable[nn.Module]) -> Iterator[Pair]:
    flat = list(sequence.flat(modules))
    for module, behind in itertools.zip_longest(flat, flat[1:]):
        if isinstance(module, nn.Conv2d):
            yield module, behind


def _containers(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if type(module) is nn.Sequential:
            yield module
            yield from _containers(module)


def _does_nothing(module: nn.Module) -> bool:
    """Whether `module` is an identity, as timm's stochastic layers are in eval mode."""
    kind = type(module)
    return fusion.is_identity(module) or (
        not module.training
        and kind.__module__ == kind.forward.__module__ == "timm.layers.drop"
        and kind.__name__ in ("DropPath", "DropBlock2d")
        and fusion.untouched(module)
    )


class _Known(NamedTuple):
    """A class's methods, with the names that they refer to in order, and what stands for one."""

    kind: type[Fused]
    methods: dict[str, str]


# By where the class's `forward` is defined.
_METHODS = {
    "torch.nn.modules.container.Sequential": _Known(_Sequential, {"forward": ""}),
    "torchvision.models.resnet.BasicBlock": _Known(
        _Block, {"forward": "conv1 bn1 relu conv2 bn2 downsample"}
    ),
    "torchvision.models.resnet.Bottleneck": _Known(
        _Block, {"forward": "conv1 bn1 relu conv2 bn2 conv3 bn3 downsample"}
    ),
    "torchvision.models.resnet.ResNet": _Known(
        _TorchvisionNetwork,
        {
            "forward": "_forward_impl",
            "_forward_impl": (
                "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool torch flatten fc"
            ),
        },
    ),
    "torchvision.models._utils.IntermediateLayerGetter": _Known(
        _Backbone, {"forward": "OrderedDict items return_layers"}
    ),
    "timm.models.resnet.BasicBlock": _Known(
        _TimmBlock,
        {"forward": "conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path downsample act2"},
    ),
    "timm.models.resnet.Bottleneck": _Known(
        _TimmBlock,
        {
            "forward": (
                "conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path downsample act3"
            )
        },
    ),
    "timm.models.resnet.ResNet": _Known(
        _TimmNetwork,
        {
            "forward": "forward_features forward_head",
            "forward_features": (
                "conv1 bn1 act1 maxpool grad_checkpointing torch jit is_scripting checkpoint_seq "
                "layer1 layer2 layer3 layer4"
            ),
        },
    ),
    "timm.models.regnet.Bottleneck": _Known(
        _RegNetBlock, {"forward": "conv1 conv2 se conv3 downsample drop_path act3"}
    ),
    "timm.layers.squeeze_excite.SEModule": _Known(
        _SqueezeExcite, {"forward": "mean add_maxpool amax fc1 act bn fc2 gate"}
    ),
    "timm.layers.conv_bn_act.ConvNormAct": _Known(_ConvNormAct, {"forward": "conv bn getattr aa"}),
}


# That are made of others: copies and pickles of a module are of the same class.
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _known(original: type[nn.Module]) -> _Known | str:
    """What is known of a class, or why it is left alone."""
    forward = getattr(original, "forward", None)  # a compiled module's class has none
    where = (
        getattr(forward, "__module__", original.__module__),
        getattr(forward, "__qualname__", ""),
    )
    known = _METHODS.get(".".join(where).removesuffix(".forward"))
    if known is None:
        return f"{original.__qualname__}.forward is of {where[0]}, which fuse does not know"
    for name, names in known.methods.items():
        code = getattr(getattr(original, name), "__code__", None)
        if code is None or " ".join(code.co_names) != names:
            return f"{original.__qualname__}.{name} is of another version than fuse knows"
    return known


def _class(original: type[nn.Module], kind: type[Fused]) -> type[nn.Module]:
    """The class that stands for `original`, looking like it: one for each."""
    if original in _CLASSES:
        return _CLASSES[original]
    method = cast("Any", getattr(original, kind.replaced))
    # TorchScript goes by a function's own name, of which there may be one in a class.
    plain = FunctionType(
        method.__code__, method.__globals__, "plain", method.__defaults__, method.__closure__
    )
    plain.__annotations__ = method.__annotations__
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__annotations__": dict(getattr(original, "__annotations__", {})),
        "made_of_ops": kind.made_of_ops,
        "original": original,
        "method": method,
        "plain": plain,
    }
    make = cast("Any", type(original))  # a class's class, which some libraries have their own of
    _CLASSES[original] = make(original.__name__, (kind, original), namespace)
    return _CLASSES[original]


def _why_not(conv: nn.Module, bn: nn.Module | None) -> str | None:
    """Why no op computes the two, in eval mode and as they are now, or None where one does."""
    if type(conv) is not nn.Conv2d:
        return f"is a {type(conv).__qualname__}, not an nn.Conv2d"
    if not fusion.untouched(conv, *([] if bn is None else [bn])):
        return "has hooks or a method of its own, or its normalisation has"
    if conv.bias is not None:
        return "has a bias"
    if fusion.convolution(conv) is None:
        return f"is padded by {conv.padding_mode!r}, {conv.padding!r}"
    if bn is None or not (fusion.is_norm(bn) or fusion.is_group_norm(bn)):
        found = "nothing" if bn is None else type(bn).__qualname__
        return f"no batch or group norm follows but {found}"
    inside = fusion.behind_norm(bn)
    if len(inside) > 1 or not all(map(fusion.is_relu, inside)):
        return f"its normalisation ends with {', '.join(type(m).__qualname__ for m in inside)}"
    if fusion.is_norm(bn) and bn._buffers.get("running_mean") is None:
        return "its normalisation has no running statistics"
    return None


class Unit(NamedTuple):
    """A fused module: its class, and how many of the convolutions it calls are fused."""

    kind: str
    fused: int
    convolutions: int


@dataclass
class Report:
    """What `fuse` did. Convolutions are those of `nn.Conv2d` and its subclasses.

    fused: by name of the module.
    left: why a convolution was not fused, by its name.
    """

    fused: dict[str, Unit] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    convolutions: int = 0

    def __str__(self) -> str:
        done = self.convolutions - len(self.left)
        lines = [f"{done} of {self.convolutions} convolutions fused{', by' * bool(done)}"]
        lines += _by_value({name: unit.kind for name, unit in self.fused.items()})
        if self.left:
            lines += ["left as they are:", *_by_value(self.left)]
        return "\n".join(lines)


def _by_value(values: dict[str, str]) -> Iterator[str]:
    """A line for each value, with how many and which names have it."""
    for value, count in Counter(values.values()).most_common():
        names = [name or "(the model)" for name, other in values.items() if other == value]
        yield f"  {count} × {value}: {', '.join(names[:3])}{', ...' if count > 3 else ''}"


def fuse(model: nn.Module) -> Report:
    """Lets fused ops compute what they can of `model`, in place, and says what that is.

    Residual blocks of torchvision and timm, the stems of their ResNets and of detectors and
    segmenters built on them, and convolution, batch or group norm, ReLU and pooling in an
    `nn.Sequential` run as fused ops: in eval mode or with frozen batch norm, and in training mode,
    but for group norm, wherever the backend trains fused. Nothing else of the model changes, and
    where a fused op could be told from the modules (`resnet_fused.fusion`), these run. Modules that
    are fused already stay so; a model of this package is fused by itself.

    model: any module, of any device, dtype and mode. Fuse it before wrappers that change a
        module's class or compile it (`fully_shard`, `torch.jit.script`).

    Returns a report to print. `unfuse` undoes all of it. Raises TypeError for what is no module.
    """
    check_is_module(model)
    report = Report()
    names = {module: name for name, module in model.named_modules()}
    containers: set[nn.Module] = set()
    reasons: dict[nn.Module, str | None] = {}
    for module, name in names.items():
        if module in containers:
            continue
        ours = _of_ours(module)
        if ours is None:
            known = _fuse(module)
            if isinstance(known, str):
                for child in module.children():
                    reasons.setdefault(child, known)
                continue
            ours = list(known.pairs()), known.calls()
        pairs, calls = ours
        containers.update(_containers(calls))
        why_not = module.why_not if isinstance(module, Fused) else _why_not
        found = {conv: why_not(conv, bn) for conv, bn in pairs}
        reasons.update(found)
        done = sum(reason is None for reason in found.values())
        if done:
            report.fused[name] = Unit(type(module).__qualname__, done, len(found))
        else:
            _unfuse(module)
    for module, name in names.items():
        if isinstance(module, nn.Conv2d):
            report.convolutions += 1
            if (reason := reasons.get(module, "is called by nothing that fuse knows")) is not None:
                report.left[name] = reason
    return report


def unfuse(model: nn.Module) -> None:
    """Gives every module of `model` the class back that it had before `fuse`.

    Raises ValueError where something has made another class of a fused one since (`fully_shard`),
    and TypeError for what is no module.
    """
    check_is_module(model)
    for module in model.modules():
        _unfuse(module)


def _fuse(module: nn.Module) -> Fused | str:
    """The module, with its class changed; or why that stays as it is."""
    if isinstance(module, Fused):
        return module
    original = type(module)
    known = _known(original)
    if isinstance(known, str):
        return known
    for method in known.methods:
        if method in vars(module):
            return f"{original.__qualname__}.{method} was replaced in the instance"
    module.__class__ = _class(original, known.kind)
    return cast("Fused", module)


def _unfuse(module: nn.Module) -> None:
    if not isinstance(module, Fused):
        return
    if "original" not in vars(type(module)):
        raise ValueError(
            f"{type(module).__qualname__} is a class made of a fused one; undo that first."
        )
    cast("Any", module).__class__ = module.original
    vars(module).pop("_plans", None)


def _of_ours(module: nn.Module) -> tuple[list[Pair], Iterable[nn.Module]] | None:
    """What a module of this package, which is fused by itself, has of `Fused.pairs` and `calls`."""
    if isinstance(module, ResidualNetwork):
        return list(_pairs([module.conv1, module.bn1])), [module.conv1]
    if isinstance(module, ResidualBlock) and not isinstance(module, Fused):
        shortcut = _present(module, "downsample")
        return [*module.layers(), *_pairs(shortcut)], shortcut
    return None
