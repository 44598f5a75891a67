"""relu?(x · gate (+ residual)): average pool and first linear layer as in the head, the second one
and the sigmoid by PyTorch, which are a few numbers for each image, then one pass.

Memory traffic: x is read twice, the residual once, the result written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Candidates
from . import launching
from .elementwise import gate_add_relu
from .head import head, head_configs
from .launching import Config


def list_squeeze_excite(x: Tensor, reduce: Tensor) -> Candidates:
    """Candidates of op `squeeze_excite`: those of the head that begins it."""
    return launching.candidates(squeeze_excite, head_configs(x, reduce), "triton squeeze_excite")


def squeeze_excite(
    config: Config,
    x: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """See `resnet_fused.reference.ops.squeeze_excite`."""
    hidden = head(config, x, reduce, reduce_bias).relu_()
    gate = torch.sigmoid(F.linear(hidden, expand, expand_bias))
    return gate_add_relu(x, gate, residual, relu)
