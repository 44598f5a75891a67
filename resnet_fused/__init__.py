"""Fused ResNets, drop-in for torchvision's: conv + BN + ReLU + shortcut as single kernels.

    import resnet_fused
    model = resnet_fused.resnet50(weights="DEFAULT").eval()

Importing compiles nothing, looks for no GPU and needs no extension: backends load when first used.
"""

from ._version import __version__ as __version__

try:
    import torch  # noqa: F401
except ImportError as _error:  # `python -m resnet_fused.env` has to say so
    _reason = _error

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(name)
        raise ImportError(f"resnet_fused needs PyTorch, which cannot be imported: {_reason}")
else:
    from . import complexity, models, ops, quantization
    from .blocks import BasicBlock, Bottleneck, PaddedIdentity, PlainBlock
    from .errors import (
        BackendUnavailableError,
        CheckpointError,
        FrozenModelError,
        ResnetFusedError,
    )
    from .frozen import freeze
    from .fuse import fuse, unfuse
    from .models import (
        ResNet,
        cifar,
        plain18,
        plain34,
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        resnext101_64x4d,
        wide_resnet50_2,
        wide_resnet101_2,
    )
    from .ops import available_backends, use_backend
    from .plan import graphed, graphed_step
    from .quantization import quantize
    from .responses import record_responses
    from .streams import throughput
    from .training import freeze_batch_norm, kept_activation_bytes

__all__ = [
    "BackendUnavailableError",
    "BasicBlock",
    "Bottleneck",
    "CheckpointError",
    "FrozenModelError",
    "PaddedIdentity",
    "PlainBlock",
    "ResNet",
    "ResnetFusedError",
    "available_backends",
    "cifar",
    "complexity",
    "freeze",
    "freeze_batch_norm",
    "fuse",
    "graphed",
    "graphed_step",
    "kept_activation_bytes",
    "models",
    "ops",
    "plain18",
    "plain34",
    "quantization",
    "quantize",
    "record_responses",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "throughput",
    "unfuse",
    "use_backend",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
