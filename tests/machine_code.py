"""Reads the machine code in the compiled extension."""

from __future__ import annotations

import re
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest

from resnet_fused.testing import machine_code


def cuobjdump(file: ModuleType | Path, *options: str, folder: Path | None = None) -> str:
    """What `cuobjdump *options` prints about the extension or a file; skips the test where there
    is no cuobjdump. It writes files into `folder`."""
    try:
        return machine_code.cuobjdump(getattr(file, "__file__", file), *options, folder=folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@lru_cache
def _cubins(extension: ModuleType, architecture: str) -> list[bytes]:
    """The extension's files of machine code for one architecture, one for each source."""
    with tempfile.TemporaryDirectory() as folder:
        options = (f"-arch=sm_{architecture}", "--extract-elf", "all")
        cuobjdump(extension, *options, folder=Path(folder))
        return [cubin.read_bytes() for cubin in Path(folder).glob("*.cubin")]


@lru_cache
def _listing(cubin: bytes) -> str:
    """The machine code of a source: some 15 MB for each, which tests of one process read once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return cuobjdump(Path(file.name), "--dump-sass")


def listing(extension: ModuleType, architecture: str, kernel: str = "") -> str:
    """The machine code for one architecture, of the sources that have kernels of that name."""
    name = kernel.encode()
    return "".join(_listing(cubin) for cubin in _cubins(extension, architecture) if name in cubin)


def kernels(extension: ModuleType, symbol: str, *architectures: str) -> list[str]:
    """Listings of the kernels whose mangled name starts with the pattern `symbol`, name first.
    A kernel's own name is in the pattern literally."""
    named = re.search(r"[a-z]\w*_kernel", symbol.replace(r"\w*", "", 1))
    assert named, symbol
    return [
        function
        for architecture in architectures
        for function in listing(extension, architecture, named[0]).split("Function : ")[1:]
        if re.match(symbol, function)
    ]
