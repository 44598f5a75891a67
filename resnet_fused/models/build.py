"""How every constructor builds its network and loads its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from ..blocks import BasicBlock, Bottleneck
from .checkpoints import adapt
from .features import FeatureNetwork
from .network import ResidualNetwork
from .weights import WeightsSource, load_weights, without_legacy

_Network = TypeVar("_Network", bound=ResidualNetwork)


def build(
    network: Callable[..., _Network],
    name: str,
    block: type[BasicBlock | Bottleneck],
    layers: Sequence[int],
    weights: WeightsSource,
    progress: bool,
    **kwargs: Any,
) -> _Network:
    """Builds a network and loads its weights.

    Every constructor of a network takes the same arguments:
        weights: None for random ones; a torchvision weights enum member or its name, where
            torchvision has the network (the file is downloaded and its hash checked); "timm/NAME",
            a repository of the Hugging Face hub; the path of a checkpoint; or a state dict.
            `num_classes` and `in_chans` follow the weights unless they are given.
            torchvision's old `pretrained=True` is accepted, with its warning.
        progress: whether a download shows its progress.
        adapt_weights: where other `num_classes` or `in_chans` are given than the weights have, make
            the first layer from theirs and leave the classifier random, as timm does; otherwise
            this is an error.
        features_only: return a `FeatureNetwork` of it instead, without the classifier, whose
            forward gives a list of the results on the way. Weights need no classifier then.
        out_indices: with `features_only`, which of them (`ResidualNetwork.features`); all if None.
        **kwargs: arguments of the network's class.

    Raises ValueError for unknown names and arguments that do not apply, CheckpointError for files
    that cannot be read and RuntimeError (from `load_state_dict`) for weights of another network.
    """
    if not block.has_shortcut:
        for argument in {"shortcut", "zero_init_residual", "avg_down"} & set(kwargs):
            raise ValueError(f"{argument} does not apply to {name}: it has no shortcuts.")
    features_only = kwargs.pop("features_only", False)
    out_indices = kwargs.pop("out_indices", None)
    if out_indices is not None and not features_only:
        raise ValueError(
            f"out_indices={out_indices!r} needs features_only=True; or call model.features."
        )
    weights = without_legacy(name, weights, kwargs)
    state = load_weights(name, weights, progress)
    if state is not None and "fc.weight" in state:
        kwargs.setdefault("num_classes", state["fc.weight"].shape[0])
    first = next((key for key in ("conv1.weight", "conv1.0.weight") if key in (state or ())), None)
    if state is not None and first is not None and (channels := state[first].shape[1]) != 3:
        kwargs.setdefault("in_chans", channels)
    adapts = kwargs.pop("adapt_weights", False)
    model = network(block, layers, **kwargs)
    whole = model.state_dict()
    if features_only:
        model = cast("_Network", FeatureNetwork(model, out_indices))
    if state is not None:
        if adapts and first is not None:
            state = adapt(state, first, whole)
        left_out = whole.keys() - model.state_dict().keys()
        model.load_state_dict({key: state[key] for key in state if key not in left_out})
    return model
