"""Layer responses of fused models: what each convolution gives after batch norm (paper, Fig. 7)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import ResidualBlock
from .models.network import ResidualNetwork


@contextlib.contextmanager
def record_responses(
    model: nn.Module, measure: Callable[[Tensor], Any] = torch.clone
) -> Iterator[dict[str, list[Any]]]:
    """Records every layer's response: after batch norm, before addition and ReLU.

        with record_responses(model.eval(), torch.std) as responses:
            model(images)
        responses["layer1.0.conv1"]  # one measurement for each forward

    Each convolution still runs fused with its normalisation; ReLU and addition follow apart. In
    training mode with batch statistics the modules run one by one. Projections are no layers here.

    Args:
        model: a network of this package, or any module that holds its blocks.
        measure: what to keep of a response (N, K, P, Q); it may not keep the tensor itself, which
            is overwritten, so the default copies it. Runs without gradients.

    Raises ValueError for a model without blocks of this package or recorded already.

    Yields a dict from the convolution's name to a list, in the order in which layers run.
    """
    found: dict[str, list[Any]] = {}
    taps: list[ResidualBlock | ResidualNetwork] = []
    prefixes = {module: name for name, module in model.named_modules()}

    def record(names: list[str], index: int, response: Tensor) -> None:
        with torch.no_grad():
            found.setdefault(names[index], []).append(measure(response.detach()))

    try:
        for module, prefix in prefixes.items():
            if isinstance(module, ResidualNetwork):
                convolutions: list[nn.Module] = [module.conv1]
            elif isinstance(module, ResidualBlock):
                convolutions = [conv for conv, _ in module.layers()]
            else:
                continue
            if module.on_response is not None:
                raise ValueError(f"{prefix or 'the model'} is being recorded already.")
            names = [prefixes[conv] for conv in convolutions]
            module.on_response = partial(record, names)
            taps.append(module)
        if not taps:
            raise ValueError("model holds no network or block of resnet_fused to record.")
        yield found
    finally:
        for tap in taps:
            del tap.on_response  # back to the class's None
