"""Reads the machine code in the compiled extension, with the cuobjdump of triton's wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


def cuobjdump(extension: ModuleType, *options: str) -> str:
    """What `cuobjdump *options` prints about the extension; skips the test where there is none."""
    folders = [os.environ.get("PATH", "")]
    try:
        import triton
    except ImportError:
        pass
    else:
        folders.insert(0, str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    program = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if program is None:
        pytest.skip("no cuobjdump, neither in triton's package nor in PATH")
    command = [program, *options, str(extension.__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
