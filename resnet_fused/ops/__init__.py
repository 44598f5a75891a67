"""The fused operators: `torch.ops.resnet_fused.*` and their typed Python functions."""

from ..parameters import BatchNorm, Convolution, MaxPool
from .bn_add_relu import bn_add_relu
from .conv_bn import conv_bn
from .conv_bn_projection import conv_bn_projection
from .dispatch import available_backends, use_backend
from .head import head
from .stem import stem

__all__ = [
    "BatchNorm",
    "Convolution",
    "MaxPool",
    "available_backends",
    "bn_add_relu",
    "conv_bn",
    "conv_bn_projection",
    "head",
    "stem",
    "use_backend",
]
