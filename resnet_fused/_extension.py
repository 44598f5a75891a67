"""The compiled part of the package, imported when a backend first needs it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from .errors import BackendUnavailableError

_NAME = f"{__package__}._C"
# The calls that this Python code makes into the extension, as a number: raised here and in
# csrc/bindings/module.cpp with every change of a bound function's name, arguments or meaning.
INTERFACE = 9


@functools.cache
def _load() -> ModuleType | str:
    import torch  # noqa: F401  (first, so that the extension shares the OpenMP pool torch brings)

    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        return (
            "the compiled extension resnet_fused._C is not built for this Python; install the "
            "package with `pip install .`, or in a source tree run `pip install -e .`"
        )
    except ImportError as error:
        return (
            f"the compiled extension resnet_fused._C cannot be loaded ({error}); it was built on "
            "another system, so reinstall the package here with "
            "`pip install --force-reinstall --no-deps .`"
        )
    found = getattr(module, "INTERFACE", 1)
    if found == INTERFACE:
        return module
    return (
        f"the compiled extension resnet_fused._C has interface {found}, and this Python code needs "
        f"{INTERFACE}; it was built from other sources, so build it anew with `pip install .`, or "
        "in a source tree with `pip install -e .`"
    )


def load() -> ModuleType:
    """The extension module; BackendUnavailableError, with cause and fix, if it cannot be had."""
    found = _load()
    if isinstance(found, str):
        raise BackendUnavailableError(f"{found}.")
    return found


def available() -> str | None:
    """Why the extension cannot be loaded, with the fix, or None when it can."""
    found = _load()
    return found if isinstance(found, str) else None
