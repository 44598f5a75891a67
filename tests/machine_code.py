"""Reads the machine code in the compiled extension."""

from __future__ import annotations

import re
from functools import lru_cache
from types import ModuleType

import pytest

from resnet_fused.testing import machine_code


def cuobjdump(extension: ModuleType, *options: str) -> str:
    """What `cuobjdump *options` prints about the extension; skips the test where there is none."""
    try:
        return machine_code.cuobjdump(str(extension.__file__), *options)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@lru_cache
def listing(extension: ModuleType, architecture: str) -> str:
    """The machine code for one architecture: 100 MB, which tests of one process read once."""
    return cuobjdump(extension, "--dump-sass", f"-arch=sm_{architecture}")


def kernels(extension: ModuleType, symbol: str, *architectures: str) -> list[str]:
    """Listings of the kernels whose mangled name starts with the pattern `symbol`, name first."""
    return [
        function
        for architecture in architectures
        for function in listing(extension, architecture).split("Function : ")[1:]
        if re.match(symbol, function)
    ]
