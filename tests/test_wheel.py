"""What is published: the sdist, and a wheel that runs where no compiler is.

    pytest -m thorough tests/test_wheel.py --wheel dist/resnet_fused-*.whl

takes a wheel that is there; otherwise one is built from the sdist, without CUDA, which takes nvcc
ten minutes and changes nothing here.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from resnet_fused import __version__

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(sys.platform != "linux", reason="the wheels are Linux's"),
]
_PYTHONS = ("cp310", "cp311", "cp312", "cp313", "cp314")


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, **more: str) -> str:
    steered = {k: v for k, v in os.environ.items() if not k.startswith(("RESNET_FUSED_", "CUDA"))}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**steered, "PYTHONPATH": "", "RESNET_FUSED_CUDA": "off", **more}
        if env is None
        else env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=580,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def _need(package: str, oldest: int = 0) -> None:
    """Skips without the package of that version; setuptools is not imported for it, because it
    replaces a distutils that may be loaded."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package}, which builds the package, is not installed")
    if int(version.split(".")[0]) < oldest:
        pytest.skip(f"{package} {version} is older than {oldest}")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("only git knows which files belong to the sources")
    return _run("git", "ls-files", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def sdist(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of the sources, so that nothing is written beside them."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "sources" / name)
    _need("setuptools", 77)
    code = "import build_backend; build_backend.build_sdist('..')"
    _run(sys.executable, "-c", code, cwd=folder / "sources")
    return folder / f"resnet_fused-{__version__}.tar.gz"


@pytest.fixture(scope="module")
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is given, or that pip makes of the sdist."""
    if given := request.config.getoption("--wheel"):
        return Path(given).resolve()
    for package in ("pip", "pybind11", "setuptools"):
        _need(package)
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"building the wheel needs {tool}")
    folder = tmp_path_factory.mktemp("wheel")
    compiler = folder / "c++"  # nothing here asks for speed
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O1\n')
    compiler.chmod(0o755)
    _run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *("-w", folder, request.getfixturevalue("sdist")),
        cwd=folder,
        CXX=str(compiler),
    )
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def repaired(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `auditwheel` tags it, by the command of the release."""
    pytest.importorskip("auditwheel", reason="it says on which systems a wheel runs")
    if shutil.which("patchelf") is None:
        pytest.skip("auditwheel needs patchelf")
    if "manylinux" in wheel.name:
        return wheel
    settings = (ROOT / "pyproject.toml").read_text()
    command = re.search(r'^repair-wheel-command = "(.*)"$', settings, re.MULTILINE)
    assert command is not None
    folder = tmp_path_factory.mktemp("repaired")
    filled = [part.format(dest_dir=folder, wheel=wheel) for part in command[1].split()]
    _run(sys.executable, "-m", *filled, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def test_the_sdist_holds_every_file_of_the_sources(sdist: Path, tracked: list[str]) -> None:
    with tarfile.open(sdist) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made == set(tracked)


def test_the_wheel_is_tagged_and_brings_no_library(repaired: Path) -> None:
    machine = os.uname().machine
    assert re.search(rf"-manylinux_2_\d+_{machine}\.whl$", repaired.name), repaired.name
    with zipfile.ZipFile(repaired) as archive:
        names = archive.namelist()
    libraries = [name for name in names if ".so" in name]
    assert len(libraries) == 1, libraries
    assert re.fullmatch(r"resnet_fused/_C\..*\.so", libraries[0])
    tops = {name.split("/")[0] for name in names}
    assert tops == {"resnet_fused", f"resnet_fused-{__version__}.dist-info"}
    assert not [name for name in names if re.search(r"_C_sim|\.(cpp|cu|cuh|h)$", name)]


def test_it_classifies_a_photograph_without_a_compiler(repaired: Path, tmp_path: Path) -> None:
    """In a new environment with torch and no compiler on PATH, beside torchvision's own answer."""
    models = pytest.importorskip("torchvision.models", reason="prepares the photograph")
    data = pytest.importorskip("skimage.data", reason="ships a photograph")
    image = pytest.importorskip("PIL.Image").fromarray(data.astronaut())
    image.save(tmp_path / "astronaut.png")
    torch.manual_seed(0)
    theirs = models.resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18-f37072fd.pth")
    entry = models.ResNet18_Weights.DEFAULT
    with torch.no_grad():
        best = theirs(entry.transforms()(image)[None]).softmax(1)[0].topk(5).indices.tolist()

    others = tmp_path / "others"  # what is installed here, except for this package
    others.mkdir()
    for path in (p for entry_ in _packages() for p in Path(entry_).glob("*")):
        if "resnet_fused" not in path.name and not (others / path.name).exists():
            (others / path.name).symlink_to(path)
    venv.create(tmp_path / "venv")
    programs = tmp_path / "venv/bin"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{others}\n")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    _run(*pip, "install", "--no-deps", "--no-index", repaired, cwd=tmp_path)

    bare = {"PATH": str(programs), "HOME": str(tmp_path)}
    assert not [
        c for c in ("cc", "c++", "gcc", "g++", "clang") if shutil.which(c, path=bare["PATH"])
    ]
    report = _run(programs / "resnet-fused", "env", cwd=tmp_path, env=bare)
    assert re.search(rf"extension +{re.escape(__version__)}, built by", report), report
    assert str(packages) in report, report
    assert re.search(r"reference +available", report)
    if os.uname().machine == "x86_64":
        assert re.search(r"cpu +available", report), report
    command = ("classify", "astronaut.png", "--arch", "resnet18")
    weights = ("--weights", "resnet18-f37072fd.pth", "--csv", "found.csv")
    printed = _run(programs / "resnet-fused", *command, *weights, cwd=tmp_path, env=bare)
    assert entry.meta["categories"][best[0]] in printed
    rows = (tmp_path / "found.csv").read_text().splitlines()[1:]
    assert [int(row.rsplit(",", 2)[1]) for row in rows] == best


def _packages() -> list[str]:
    """Folders that hold what is installed, those that a .pth file names too."""
    return [p for p in sys.path if p in site.getsitepackages() or Path(p).name == "site-packages"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_release_builds_a_wheel_for_every_python(machine: str) -> None:
    pytest.importorskip("cibuildwheel", reason="it builds the wheels of a release")
    options = ("--platform", "linux", "--archs", machine, "--print-build-identifiers")
    found = _run(sys.executable, "-m", "cibuildwheel", *options, ROOT, cwd=ROOT).split()
    assert found == [f"{python}-manylinux_{machine}" for python in _PYTHONS]
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    assert f"python: [{', '.join(_PYTHONS)}]" in workflow
