"""The plain PyTorch meaning of every op (`ops`), block and model (`modules`)."""

from . import modules, ops

__all__ = ["modules", "ops"]
