"""Errors of our own. Bad arguments raise the built-in `ValueError` and `TypeError`."""

from __future__ import annotations


class ResnetFusedError(Exception):
    """Base of every error that only this package raises."""


class BackendUnavailableError(ResnetFusedError, RuntimeError):
    """A backend was asked for that this machine, build or tensor cannot use.

    The message names the backend, what is missing, and what to do about it.
    """


class CheckpointError(ResnetFusedError, ValueError):
    """A weights file cannot be downloaded, or not be read as a state dict."""


class FrozenModelError(ResnetFusedError, RuntimeError):
    """A network of `resnet_fused.freeze` was to be changed, or was found to be."""
