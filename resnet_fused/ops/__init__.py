"""The fused operators: `torch.ops.resnet_fused.*` and their typed Python functions."""

from ..parameters import (
    BatchNorm,
    ConvBn,
    Convolution,
    GroupNorm,
    ImageQuantization,
    Layer,
    MaxPool,
    Normalization,
    QuantizedLayer,
    QuantizedShortcut,
)
from .block_training import residual_block_training
from .bn_add_relu import bn_add_relu
from .bottleneck import bottleneck
from .conv import conv
from .conv_bn import conv_bn
from .conv_bn_projection import conv_bn_projection
from .dispatch import available_backends, use_backend
from .group_norm_add_relu import group_norm_add_relu
from .head import head
from .image_stem import image_stem
from .quantized_conv import quantized_conv
from .quantized_head import quantized_head
from .quantized_images import quantized_images
from .quantized_stem import quantized_stem
from .squeeze_excite import squeeze_excite
from .stem import stem
from .stem_training import stem_training
from .sync_batch_norm import sync_batch_norm
from .training_choice import training_backend

__all__ = [
    "BatchNorm",
    "ConvBn",
    "Convolution",
    "GroupNorm",
    "ImageQuantization",
    "Layer",
    "MaxPool",
    "Normalization",
    "QuantizedLayer",
    "QuantizedShortcut",
    "available_backends",
    "bn_add_relu",
    "bottleneck",
    "conv",
    "conv_bn",
    "conv_bn_projection",
    "group_norm_add_relu",
    "head",
    "image_stem",
    "quantized_conv",
    "quantized_head",
    "quantized_images",
    "quantized_stem",
    "residual_block_training",
    "squeeze_excite",
    "stem",
    "stem_training",
    "sync_batch_norm",
    "training_backend",
    "use_backend",
]
