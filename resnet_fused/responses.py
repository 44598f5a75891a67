"""Layer responses of models: what each convolution gives after batch norm (paper, Fig. 7)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import ResidualBlock
from .models.network import ResidualNetwork
from .ops.checks import check_is_module


@contextlib.contextmanager
def record_responses(
    model: nn.Module, measure: Callable[[Tensor], Any] = torch.clone
) -> Iterator[dict[str, list[Any]]]:
    """Records every layer's response: after batch norm, before addition and ReLU.

        with record_responses(model.eval(), torch.std) as responses:
            model(images)
        responses["layer1.0.conv1"]  # one measurement for each forward

    It hooks on to the normalisations, so their blocks run module by module. Projections are no
    layers here.

    Args:
        model: a network of this package, or any module that holds its blocks.
        measure: what to keep of a response (N, K, P, Q); it may not keep the tensor itself, which
            is overwritten, so the default copies it. Runs without gradients.

    Raises ValueError for a model without blocks of this package, TypeError for what is no module.

    Yields a dict from the convolution's name to a list, in the order in which layers run.
    """
    check_is_module(model)
    found: dict[str, list[Any]] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(name: str, norm: nn.Module, inputs: Any, response: Tensor) -> None:
        with torch.no_grad():
            found.setdefault(name, []).append(measure(response.detach()))

    pairs: list[tuple[nn.Module, nn.Module]] = []
    for module in names:
        if isinstance(module, ResidualNetwork):
            pairs.append((module.conv1, module.bn1))
        elif isinstance(module, ResidualBlock):
            pairs += module.layers()
    if not pairs:
        raise ValueError("model holds no network or block of resnet_fused to record.")
    hooks = [norm.register_forward_hook(partial(record, names[conv])) for conv, norm in pairs]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
