"""Reads weights from what holds them: training checkpoints, wrapped models, safetensors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

# Where a checkpoint of a training run keeps the model, the first one that is there: moving averages
# before the weights that they average (timm, torchvision), as timm does.
_STATES = ("state_dict_ema", "model_ema", "state_dict", "model")
# Modules around the network's own: DataParallel and AveragedModel; torch.compile.
_WRAPPERS = ("module", "_orig_mod")
_COUNTER = "n_averaged"  # of AveragedModel


def read(path: Path) -> Mapping[str, Tensor]:
    """The network's state dict in a file of `torch.save` or, by its name, of safetensors.

    Raises CheckpointError for a file that cannot be read or holds none.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            # Of argparse, which training scripts save their arguments as, only a bare namespace.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise CheckpointError(f"{path} needs safetensors: pip install safetensors.") from error
    except Exception as error:  # torch raises many kinds, from EOFError to UnpicklingError
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}); "
            "it may be incomplete, or hold more than tensors: save model.state_dict() only."
        ) from error
    return state_in(found, str(path))


def state_in(checkpoint: Any, name: str) -> Mapping[str, Tensor]:
    """The network's state dict in `checkpoint`, under its own keys.

    That is `checkpoint` itself, or what it holds under one of `_STATES`. Wrappers' parts are taken
    out of the keys, and so is what stands before all of them (a Lightning module's `model.`).

    Raises CheckpointError, naming `name`, where there is none.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        found = (checkpoint.get(key) for key in _STATES)
        state = next((state for state in found if isinstance(state, Mapping)), checkpoint)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        held = type(state).__name__
        if isinstance(state, Mapping):
            other = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
            held = f"{held} with {', '.join(other[:3])}"
        raise CheckpointError(
            f"{name} holds no state dict of tensors but {held}; "
            "save model.state_dict(), or load the file and pass the right part of it."
        )
    keys = {key: key.split(".") for key in state if key != _COUNTER}
    keys = {key: [part for part in parts if part not in _WRAPPERS] for key, parts in keys.items()}
    while keys and all(len(parts) > 2 for parts in keys.values()):
        if len({parts[0] for parts in keys.values()}) > 1:
            break
        keys = {key: parts[1:] for key, parts in keys.items()}
    return {".".join(parts): state[key] for key, parts in keys.items()}


def adapt(
    state: Mapping[str, Tensor], conv: str, shapes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`state` for a network whose tensors are `shapes`: its first layer for other channels, and no
    classifier where that has other classes.

    conv: the key of the first convolution's weight. Its input channels are repeated in turn, and
    scaled so that a constant image gives what it gave (one channel: their sum), as in timm.
    """
    adapted = dict(state)
    weight, wanted = adapted[conv], shapes[conv].shape[1]
    have = weight.shape[1]
    if wanted == 1:
        adapted[conv] = weight.sum(1, keepdim=True)
    elif wanted != have:
        repeated = weight.repeat(1, -(-wanted // have), 1, 1)[:, :wanted]
        adapted[conv] = repeated * (have / wanted)
    for key in ("fc.weight", "fc.bias"):
        if key in adapted and adapted[key].shape != shapes[key].shape:
            adapted[key] = shapes[key]
    return adapted
