"""The compiled parts of the package, imported when a backend first needs them, and what they take.

Sources that are imported from a checkout find them in an installation of the same interface too:
`pip install .` puts them there, and in the checkout's own folder Python takes the sources.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import BackendUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

# Address, number of the type, sizes, strides in elements, and the tensor, which it keeps alive.
TensorArg = tuple[int, int, tuple[int, ...], tuple[int, ...], Any]
# As csrc/bindings/tensor_arg.h numbers them.
_TYPES = {
    "float32": 0,
    "float16": 1,
    "bfloat16": 2,
    "float64": 3,
    "uint8": 4,
    "int8": 5,
    "int32": 6,
    "float8_e4m3fn": 7,
}
_BINDINGS = Path(__file__).resolve().parent.parent / "csrc" / "bindings"
_INSTALL = {"_C": "pip install .", "_C_sim": "RESNET_FUSED_HOST_SIM=on pip install ."}


@functools.cache
def _load(name: str) -> ModuleType | str:
    import torch  # noqa: F401  (first, so that the extension shares the OpenMP pool torch brings)

    title = f"the compiled extension {__package__}.{name}"
    try:
        module = _import(f"{__package__}.{name}")
    except ImportError as error:
        return (
            f"{title} cannot be loaded ({error}); it was built on another system, so reinstall "
            f"the package here with `{_INSTALL[name]} --force-reinstall --no-deps`"
        )
    if module is None:
        if _left_out():
            return (
                f"{title} was left out when the package was installed (RESNET_FUSED_EXTENSION=off);"
                f" build it with `RESNET_FUSED_EXTENSION=on {_INSTALL[name]}`"
            )
        return f"{title} is not built for this Python; install it with `{_INSTALL[name]}`"
    wanted = _interface()
    if wanted is None or getattr(module, "INTERFACE", None) == wanted:
        return module
    return (
        f"{title} in {module.__file__} was built from other bindings than those in {_BINDINGS}; "
        f"build it anew with `{_INSTALL[name]}`, or with `pip install -e .` if it lies in a source "
        "tree"
    )


def _interface() -> str | None:
    """What an extension for these sources calls itself: the hash of its bindings' sources, as
    CMakeLists.txt computes it. None in an installation, whose parts were built together."""
    files = sorted(f for f in _BINDINGS.glob("*") if f.suffix in (".cpp", ".h"))
    if not files:
        return None
    hashes = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _import(name: str) -> ModuleType | None:
    """The module beside this file, or else of a package of our name elsewhere on the path."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    spec = PathFinder.find_spec(name, [str(Path(entry, str(__package__))) for entry in sys.path])
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _left_out() -> bool:
    """Whether what is installed was built with RESNET_FUSED_EXTENSION=off: a wheel says so."""
    try:
        wheel = metadata.distribution(str(__package__)).read_text("WHEEL")
    except metadata.PackageNotFoundError:
        return False
    return wheel is not None and "Root-Is-Purelib: true" in wheel


def load(name: str = "_C") -> ModuleType:
    """The extension module; BackendUnavailableError, with cause and fix, if it cannot be had."""
    found = _load(name)
    if isinstance(found, str):
        raise BackendUnavailableError(f"{found}.")
    return found


def available(name: str = "_C") -> str | None:
    """Why the extension cannot be loaded, with the fix, or None when it can."""
    found = _load(name)
    return found if isinstance(found, str) else None


@functools.cache
def types() -> dict[object, int]:
    """The types of tensors that the extension takes, and their numbers there."""
    import torch

    return {getattr(torch, name): number for name, number in _TYPES.items()}


def tensor_arg(tensor: Tensor) -> TensorArg:
    """A tensor as every function of the extension takes it."""
    return tensor.data_ptr(), types()[tensor.dtype], tensor.shape, tensor.stride(), tensor


def optional_tensor_arg(tensor: Tensor | None) -> TensorArg | None:
    return None if tensor is None else tensor_arg(tensor)
