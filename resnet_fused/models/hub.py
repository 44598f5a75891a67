"""Weights of the Hugging Face hub, in safetensors, by their name there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from . import checkpoints

_FILE = "model.safetensors"


def load(repository: str, progress: bool) -> Mapping[str, Tensor]:
    """The state dict of a repository such as "timm/resnet50.a1_in1k".

    It is fetched once, into the hub's cache; what was interrupted goes on where it stopped. The
    file's SHA-256, by which that cache names it, is checked at every use.

    Raises CheckpointError where it cannot be had, where it is damaged, and without the package
    huggingface_hub.
    """
    path = _fetch(repository, progress)
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):  # small files are named by another hash
        with open(blob, "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != blob.name:
            raise CheckpointError(
                f"weights={repository!r}: {blob} is damaged, its SHA-256 is {found}; "
                "delete it, and it is fetched again."
            )
    return checkpoints.read(path)


def _fetch(repository: str, progress: bool) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )
    except ImportError as error:
        raise CheckpointError(
            f"weights={repository!r} are on the Hugging Face hub, which needs a package: "
            "pip install huggingface_hub safetensors."
        ) from error
    quiet = not progress and not are_progress_bars_disabled()
    try:
        if quiet:
            disable_progress_bars()
        return Path(hf_hub_download(repository, _FILE))
    except Exception as error:  # no network, no such repository, a full disk
        raise CheckpointError(
            f"weights={repository!r} cannot be had from the Hugging Face hub, and are not in its "
            f"cache ({type(error).__name__}: {error}); on a machine that has a connection, fetch "
            f"https://huggingface.co/{repository}/resolve/main/{_FILE} and pass its path as "
            "`weights`."
        ) from error
    finally:
        if quiet:
            enable_progress_bars()
