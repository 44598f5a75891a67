"""A quantised network: frozen, a plain state dict, replayed as a plan like a float network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import plan
from ..errors import CheckpointError
from ..ops.checks import check_is_tensor
from ..ops.registry import autocasts
from ..reference.quantized import FLOAT8
from .layers import Frozen, Geometry, Head, HigherPrecisionConv, Images, InputKind, QuantizedConv

if TYPE_CHECKING:
    from .report import Report


class Block(nn.Sequential):
    """Layers in a row, the last of which takes the block's input with it if it has a shortcut."""

    made_of_ops = True

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> the last layer's result."""
        *inner, last = self._modules.values()
        assert last is not None
        out = x
        for layer in inner:
            assert layer is not None
            out = layer(out)
        geometry: Any = last.geometry
        return last(out, x) if geometry.takes_shortcut() else last(out)


class Network(nn.Module):
    """Input, stem, blocks and head of whatever kind of layer."""

    def __init__(
        self,
        images: nn.Module,
        stem: Iterable[nn.Module],
        blocks: Iterable[Iterable[nn.Module]],
        classifier: nn.Module,
    ) -> None:
        super().__init__()
        self.images = images
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.ModuleList(Block(*block) for block in blocks)
        self.head = classifier

    def layers(self) -> Iterator[nn.Module]:
        """Every layer, from the input to the output; the last one is the head."""
        yield from self.stem
        for block in self.blocks:
            yield from block.children()
        yield self.head

    def run(self, x: Tensor) -> Tensor:
        """Logits of what `images` gave."""
        for layer in self.stem:
            x = layer(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class QuantizedNetwork(Network):
    """What `resnet_fused.quantize` makes: a network of integers, or of fp8, for inference only.

    It has no parameters, refuses training and gradients, and is as it was when it was saved:
    `torch.save(network.state_dict(), path)` or safetensors' `save_file`, and
    `QuantizedNetwork.from_state_dict`. `to` moves it to a device and no more.

    report: what `quantize` found out; None for a network from a state dict.
    """

    # In a slot, not among the attributes, as a float network's.
    __slots__ = ("_plans",)
    if TYPE_CHECKING:
        _plans: plan.Plans
    report: Report | None = None

    def __init__(
        self,
        images: Images,
        stem: Iterable[Frozen],
        blocks: Iterable[Iterable[Frozen]],
        classifier: Head,
    ) -> None:
        super().__init__(images, stem, blocks, classifier)
        super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """int8 or float8_e4m3fn."""
        geometry: Any = next(iter(self.stem)).geometry
        return FLOAT8 if geometry.dtype == FLOAT8 else torch.int8

    def forward(self, x: Tensor) -> Tensor:
        """float32 logits (N, classes) of images x (N, C, H, W).

        x: normalised as for the float network, in any floating dtype; or uint8 from 0 to 255 where
            it was quantised with `normalization`. Any memory layout, and any H, W that leave at
            least one pixel. Raises RuntimeError where x requires gradients.
        """
        check_is_tensor(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a quantised network has no gradients; call it on x.detach(), or fine-tune with "
                "resnet_fused.quantization.prepare_qat."
            )
        if autocasts(x.device.type):  # which would round what stays float32
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        with torch.no_grad():
            x = self.images(x)
            if not torch.compiler.is_compiling() and (planned := plan.run(self, x)) is not None:
                return planned
            return self.run(x)

    def train(self, mode: bool = True) -> QuantizedNetwork:
        """Stays in eval mode; RuntimeError where another is asked for."""
        if mode:
            raise RuntimeError(
                "a quantised network cannot be trained: its weights are integers or fp8 and batch "
                "norm is folded into them. Fine-tune with resnet_fused.quantization.prepare_qat "
                "and convert that."
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedNetwork:
        kinds = torch.float32, self.dtype
        if any(fn(torch.zeros(1, dtype=kind)).dtype != kind for kind in kinds):
            raise TypeError(
                f"a quantised network stays {str(self.dtype)[6:]} with float32 scales; only its "
                "device can change."
            )
        super()._apply(fn, recurse)
        return self

    def stages(self) -> Iterator[nn.Module]:
        yield self.stem
        yield self.blocks

    def plannable_parts(self) -> Iterator[plan.Part]:
        """The stem, every block and the head."""
        own = not plan.shadows(self) and type(self).run is Network.run
        for part in itertools.chain(self.stem, self.blocks, [self.head]):
            yield plan.part(part, list(part.modules()), own)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def extra_repr(self) -> str:
        return f"{str(self.dtype)[6:]}, frozen: inference only, neither trained nor differentiated"

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> QuantizedNetwork:
        """The network that `state` was taken from.

        state: what `state_dict()` gave, also through a file of `torch.save` or safetensors. Raises
        CheckpointError for a state dict of another kind.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            place, _, name = key.rpartition(".")
            parts.setdefault(place, {})[name] = tensor
        try:
            stem: list[Frozen] = [_layer(part) for part in _row(parts, "stem")]
            blocks: list[list[Frozen]] = []
            while row := _row(parts, f"blocks.{len(blocks)}"):
                blocks.append([_layer(part) for part in row])
            images = Images(parts["images"], InputKind.decode(parts["images"]["_extra_state"]))
            network = cls(images, stem, blocks, Head(parts["head"]))
            network.load_state_dict(state)
            _check_complete(network)
        except (AttributeError, KeyError, RuntimeError, StopIteration) as error:
            raise CheckpointError(
                f"this is no state dict of a quantised network ({type(error).__name__}: {error}); "
                "resnet_fused.quantize makes one of a float network."
            ) from error
        return network


def _row(parts: Mapping[str, dict[str, Tensor]], place: str) -> list[dict[str, Tensor]]:
    """The parts `place`.0, `place`.1, and so on."""
    found = (parts.get(f"{place}.{i}") for i in itertools.count())
    return list(itertools.takewhile(lambda part: part is not None, found))  # type: ignore[arg-type]


def _check_complete(network: QuantizedNetwork) -> None:
    """KeyError for a tensor that not every network has, where this one has to."""
    frozen = {name: part for name, part in network.named_modules() if isinstance(part, Frozen)}
    needed = [(place, name) for place, part in frozen.items() for name in part.needed()]
    images: Any = frozen["images"]
    if isinstance(frozen["stem.0"], QuantizedConv) and images.zero is not None:
        needed += [("stem.0", "padding_value")] * bool(images.zero.any())
    for place, name in needed:
        if getattr(frozen[place], name) is None:
            raise KeyError(f"{place}.{name}")


def _layer(tensors: Mapping[str, Tensor]) -> QuantizedConv | HigherPrecisionConv:
    kind = HigherPrecisionConv if tensors["weight"].dtype == torch.float32 else QuantizedConv
    return kind(tensors, Geometry.decode(tensors["_extra_state"]))
