"""Reads the machine code in the compiled extension."""

from __future__ import annotations

from types import ModuleType

import pytest

from resnet_fused.testing import machine_code


def cuobjdump(extension: ModuleType, *options: str) -> str:
    """What `cuobjdump *options` prints about the extension; skips the test where there is none."""
    try:
        return machine_code.cuobjdump(str(extension.__file__), *options)
    except FileNotFoundError as error:
        pytest.skip(str(error))
