"""Where a model's weights come from: torchvision's enums and downloads, a file, or a state dict."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from . import checkpoints, hub

WeightsSource = Enum | str | os.PathLike[str] | Mapping[str, Any] | None


def without_legacy(architecture: str, weights: Any, arguments: dict[str, Any]) -> Any:
    """`weights`, or what torchvision's old argument `pretrained` asks for instead.

    arguments: keyword arguments of a constructor, from which `pretrained` is taken. As in
    torchvision it also comes as the first positional argument, True stands for IMAGENET1K_V1, and
    each use warns. Raises TypeError where both are given.
    """
    if "pretrained" in arguments:
        if weights is not None:
            raise TypeError("pretrained and weights are the same argument: give weights only.")
        weights = bool(arguments.pop("pretrained"))
    if isinstance(weights, bool):
        meant = "IMAGENET1K_V1" if weights else None
        warnings.warn(
            f"pretrained={weights} of {architecture} is deprecated, in torchvision since 0.13; "
            f"write weights={meant!r}.",
            UserWarning,
            stacklevel=4,
        )
        return meant
    return weights


def load_weights(
    architecture: str, weights: WeightsSource, progress: bool = True
) -> Mapping[str, Any] | None:
    """The state dict that `weights` stands for, on the CPU, or None for None.

    Args:
        architecture: name of the model's constructor, which is torchvision's too.
        weights: a torchvision weights enum member; the name of one ("IMAGENET1K_V2", "DEFAULT" or
            "ResNet50_Weights.IMAGENET1K_V2"); "timm/NAME", a repository of the Hugging Face hub;
            the path of a file of `torch.save` or safetensors; or a state dict. Files and dicts
            may be checkpoints of a training run, with moving averages and wrappers' keys
            (`resnet_fused.models.checkpoints`).
        progress: whether a download shows its progress.

    torchvision is imported only for its enums and their names; downloads are checked against the
    hash in the file's name. Files load with `weights_only=True`, so they cannot run code.

    Raises ValueError for a name that is neither a file nor a weights entry, TypeError for what is
    none of these, and CheckpointError for a file that is not a state dict or that cannot be
    downloaded.
    """
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        return checkpoints.state_in(weights, "weights")
    if isinstance(weights, Enum):
        return _download(architecture, weights, progress)
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            "weights must be a member of torchvision's enum, a name, a path or a state dict, found "
            f"{type(weights).__qualname__} ({str(weights)[:40]}); of a model, pass "
            "model.state_dict()."
        )
    path = Path(weights).expanduser()
    if path.is_file():
        return checkpoints.read(path)
    name = str(weights)
    if re.fullmatch(r"timm/[\w.-]+", name):
        return hub.load(name, progress)
    is_entry = all(part.isidentifier() for part in name.split(".", 1))
    if isinstance(weights, os.PathLike) or not is_entry:
        raise ValueError(f"weights={name!r}: there is no such file.")
    return _download(architecture, _entry(architecture, name), progress)


def _entries(architecture: str) -> Any:
    """torchvision's enum of weights of that architecture."""
    from torchvision.models import get_model_weights, list_models

    if architecture not in list_models():
        raise ValueError(
            f"there are no published weights of {architecture}; give a path or a state dict."
        )
    return get_model_weights(architecture)


def _entry(architecture: str, name: str) -> Enum:
    try:
        entries = _entries(architecture)
    except ImportError as error:
        raise ValueError(
            f"weights={name!r} is no file, and torchvision, which knows weights by name, "
            "is not installed; run `pip install torchvision` or give a path."
        ) from error
    member = name.removeprefix(f"{entries.__name__}.")
    if member not in entries.__members__:
        raise ValueError(
            f"weights={name!r} is neither a file nor weights of {architecture}; "
            f"known names are {', '.join(entries.__members__)}."
        )
    return entries[member]


def _download(architecture: str, weights: Enum, progress: bool) -> Mapping[str, Any]:
    entries = _entries(architecture)
    if not isinstance(weights, entries):
        raise ValueError(
            f"weights={weights} belong to another model; {architecture} takes {entries.__name__}."
        )
    try:
        return weights.get_state_dict(progress=progress, check_hash=True)
    except Exception as error:  # a network, a disk and a damaged file fail in many ways
        url = weights.value.url
        raise CheckpointError(
            f"weights={weights} cannot be had from {url} ({type(error).__name__}: {error}); "
            f"download that file elsewhere and pass its path as `weights`, or put it into "
            f"{Path(torch.hub.get_dir(), 'checkpoints')}, in place of one that is damaged."
        ) from error
