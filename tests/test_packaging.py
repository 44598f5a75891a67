"""The package as users get it: built from a copy of the source tree by pip, used from elsewhere."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from resnet_fused import __version__, _extension, settings
from resnet_fused import env as environment

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "build_backend.py",
    "csrc",
    "pyproject.toml",
    "resnet_fused",
    "setup.py",
)
# What every Linux with glibc has, and the C++ and OpenMP runtimes of the compiler (torch brings
# the latter too).
ALLOWED_LIBRARIES = r"lib(stdc\+\+|gcc_s|gomp|omp|c|m|dl|rt|pthread)\.so\.\d+|ld-linux.*\.so\.\d+"

Environment = dict[str, str]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these builds are Linux's")


def _missing_tools() -> list[str]:
    modules = [m for m in ("pip", "pybind11", "setuptools") if importlib.util.find_spec(m) is None]
    return modules + [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]


needs_tools = pytest.mark.skipif(
    bool(_missing_tools()), reason=f"builds without isolation need {', '.join(_missing_tools())}"
)


def run(*command: str | Path, cwd: Path, env: Environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build needs, with nothing built in it."""
    folder = tmp_path / "source"
    folder.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def plain() -> Environment:
    """The environment without anything that steers the build or the import of the package."""
    steering = ("RESNET_FUSED_", "CUDA", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return kept


@pytest.fixture
def without_nvcc(plain: Environment, tmp_path: Path) -> Environment:
    """The same on a machine that has no CUDA compiler."""
    if any((Path(p) / "nvidia/cu13/bin/nvcc").exists() for p in sys.path):
        pytest.skip("this Python environment itself holds nvcc")
    folders = []
    for number, folder in enumerate(plain["PATH"].split(os.pathsep)):
        if (Path(folder) / "nvcc").exists():
            stand_in = tmp_path / f"bin{number}"
            stand_in.mkdir()
            for program in Path(folder).iterdir():
                if program.name != "nvcc":
                    (stand_in / program.name).symlink_to(program)
            folder = str(stand_in)
        folders.append(folder)
    masked = {**plain, "PATH": os.pathsep.join(folders)}
    assert shutil.which("nvcc", path=masked["PATH"]) is None
    return masked


def unoptimised(env: Environment, folder: Path) -> Environment:
    """The same, where C++ is not optimised: these builds are looked at and hardly run. CUDA code
    is, because ptxas needs that to fit some kernels' registers."""
    cxx = plant(
        folder / "unoptimised", "c++", f'exec {shutil.which("c++", path=env["PATH"])} "$@" -O0'
    )
    return {**env, "CXX": str(cxx)}


def build_wheel(source: Path, env: Environment) -> subprocess.CompletedProcess[str]:
    """`pip wheel` with what is installed here, and no way to fetch anything."""
    return run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"),
        *("--no-index", "-w", source.parent / "wheels", "."),
        cwd=source,
        env=env,
    )


def unpack(source: Path, result: subprocess.CompletedProcess[str]) -> Path:
    """The folder that the freshly built wheel installs, to put on PYTHONPATH."""
    assert result.returncode == 0, result.stdout
    (wheel,) = (source.parent / "wheels").glob("resnet_fused-*.whl")
    installed = source.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    return installed


@pytest.fixture
def uninstalled(tmp_path: Path) -> Path:
    """A Python that has all that is installed here, except for this package."""
    others = tmp_path / "others"
    others.mkdir()
    for path in (p for entry in site.getsitepackages() for p in Path(entry).glob("*")):
        if "resnet_fused" not in path.name and not (others / path.name).exists():
            (others / path.name).symlink_to(path)
    venv.create(tmp_path / "venv")
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{others}\n")
    return tmp_path / "venv/bin/python"


@pytest.fixture
def python(uninstalled: Path) -> Callable[..., str]:
    """What that Python says in an empty folder, with the given one on its path."""

    def ask(installed: Path, env: Environment, *arguments: str) -> str:
        elsewhere = installed.parent / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        env = {**env, "PYTHONPATH": str(installed)}
        result = run(uninstalled, *arguments, cwd=elsewhere, env=env)
        assert result.returncode == 0, result.stdout
        return result.stdout

    return ask


def plant(folder: Path, name: str, script: str) -> Path:
    """An executable shell script of that name."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def dynamic_section(module: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    return run("readelf", "-d", module, cwd=module.parent, env=dict(os.environ)).stdout


def assert_links_only_the_system(module: Path) -> None:
    section = dynamic_section(module)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
    assert needed
    assert [name for name in needed if not re.fullmatch(ALLOWED_LIBRARIES, name)] == []
    assert "RPATH" not in section
    assert "RUNPATH" not in section


# Builds


@pytest.mark.thorough
@pytest.mark.network
def test_off_builds_a_whole_package_with_nothing_installed(source, plain, python, tmp_path):
    """pip brings the build's own tools; neither torch nor numpy is among them."""
    log = tmp_path / "compiled"
    cxx = plant(tmp_path / "bin", "own-cxx", f'echo "$@" >> {log}; exec c++ "$@" -O0')
    result = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps"),
        *("-w", source.parent / "wheels", "."),
        cwd=source,
        env={**plain, "RESNET_FUSED_CUDA": "off", "CXX": f"{cxx} -g0"},
    )
    installed = unpack(source, result)
    assert not re.search(r"Collecting (torch|numpy|triton|nvidia)", result.stdout)
    assert re.search(r"-g0 .*module\.cpp", log.read_text()), "CXX is what compiles, options and all"
    (module,) = (installed / "resnet_fused").glob("_C*.so")
    assert_links_only_the_system(module)

    files = {p.relative_to(installed) for p in (installed / "resnet_fused").rglob("*.py")}
    assert files == {p.relative_to(source) for p in (source / "resnet_fused").rglob("*.py")}
    tops = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert tops == {"resnet_fused"}

    report = python(installed, plain, "-m", "resnet_fused.env")
    assert "built by" in report
    assert re.search(r"reference +available", report)
    version = (
        "from resnet_fused import _extension; print(_extension.load().build_info()['version'])"
    )
    assert python(installed, plain, "-c", version).strip() == __version__
    assert "left out: RESNET_FUSED_CUDA=off when it was built" in report
    asked = (
        "import resnet_fused\n"
        "try: resnet_fused.use_backend('cuda')\n"
        "except resnet_fused.errors.BackendUnavailableError as error: print(error)"
    )
    assert "RESNET_FUSED_CUDA=on" in python(installed, plain, "-c", asked)


@needs_tools
def test_auto_without_compiler_leaves_cuda_out_and_says_so(source, without_nvcc, tmp_path):
    """What CMake is asked for; by RESNET_FUSED_CUDA=off, above, it is asked the same."""
    asked = tmp_path / "asked.txt"
    folder = plant(tmp_path / "bin", "cmake", f'printf "%s\\n" "$@" >> {asked}; exit 1').parent
    result = build_wheel(source, {**without_nvcc, "PATH": f"{folder}:{without_nvcc['PATH']}"})
    reason = "no CUDA compiler was found in CUDACXX, CUDA_HOME or PATH when it was built"
    assert f"resnet_fused {__version__} builds for CPU, without CUDA: {reason}" in result.stdout
    options = asked.read_text().splitlines()
    assert {"-DRESNET_FUSED_CUDA=OFF", f"-DRESNET_FUSED_CUDA_NOTE={reason}"} <= set(options)


@needs_tools
def test_on_without_compiler_fails_and_says_what_to_do(source, without_nvcc):
    result = build_wheel(source, {**without_nvcc, "RESNET_FUSED_CUDA": "on"})
    assert result.returncode != 0
    assert "RESNET_FUSED_CUDA=on, but no CUDA compiler was found" in result.stdout
    for remedy in ("CUDACXX", "--no-build-isolation", "RESNET_FUSED_CUDA=off"):
        assert remedy in result.stdout


@needs_tools
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in PATH")
def test_on_builds_the_architectures_asked_for(source, plain, python, tmp_path):
    # The default's are seen where it is installed; here, that it does without what is sm_90a's.
    steered = {**plain, "RESNET_FUSED_CUDA": "on", "RESNET_FUSED_CUDA_ARCHS": "86"}
    result = build_wheel(source, unoptimised(steered, tmp_path))
    installed = unpack(source, result)
    assert re.search(r"CUDA \d+\.\d+\.\d+: sm_86; PTX 86", result.stdout)
    report = python(installed, plain, "-m", "resnet_fused.env")
    assert re.search(r"nvcc \d+\.\d+\.\d+; sm_86; PTX 86", report)
    (module,) = (installed / "resnet_fused").glob("_C*.so")
    assert_links_only_the_system(module)


@needs_tools
@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"RESNET_FUSED_CUDA": "maybe"}, "'maybe' is not understood; set it to auto, on or off"),
        ({"RESNET_FUSED_HOST_SIM": "maybe"}, "'maybe' is not understood; set it to off or on"),
        ({"RESNET_FUSED_EXTENSION": "maybe"}, "'maybe' is not understood; set it to on or off"),
        ({"CXX": "/nowhere/c++ -g"}, "CXX='/nowhere/c++ -g' is no program"),
        ({"CUDACXX": "/nowhere/nvcc"}, "CUDACXX='/nowhere/nvcc' is no program"),
        ({"CUDACXX": "false"}, "Point CUDACXX at a working nvcc"),
    ],
    ids=["CUDA", "simulator", "extension", "missing CXX", "missing nvcc", "broken nvcc"],
)
def test_bad_settings_stop_the_build(source, plain, steering, message):
    result = build_wheel(source, {**plain, **steering})
    assert result.returncode != 0
    assert message in result.stdout


@needs_tools
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in PATH")
@pytest.mark.parametrize("architectures", ["80;sm_90", "12", "80;9999a", ";"])
def test_unknown_architectures_stop_the_build(source, plain, architectures):
    result = build_wheel(source, {**plain, "RESNET_FUSED_CUDA_ARCHS": architectures})
    assert result.returncode != 0
    assert f"RESNET_FUSED_CUDA_ARCHS='{architectures}'" in result.stdout
    assert 'write them like "80;90a"' in result.stdout


# A machine that cannot compile

REFUSES = "echo \"probe.cpp:2: error: unrecognized option '-std=c++17'\" >&2; exit 1"
OUTDATED = r"needs GCC 10 or Clang 12, or newer, where \S+ gives up \(.*unrecognized option.*\): "
WITHOUT = "or set RESNET_FUSED_EXTENSION=off to install without the compiled extension"


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({"apt-get": ""}, r"needs a C\+\+ compiler, .*: run `apt-get install g\+\+`, "),
        ({"dnf": ""}, r"needs a C\+\+ compiler, .*: run `dnf install gcc-c\+\+`, "),
        ({}, r"compiler, .*: run `apt-get install g\+\+` or run `dnf install gcc-c\+\+`, "),
        (
            {"apt-get": "", "c++": REFUSES},
            OUTDATED + r"run `apt.* g\+\+-10` and set CXX=g\S+, ",
        ),
        (
            {"dnf": "", "clang++": REFUSES},
            OUTDATED + r"run `dnf .*-gcc-c\+\+` and set CXX=/\S+, ",
        ),
    ],
    ids=["none, apt-get", "none, dnf", "none", "too old, apt-get", "too old, dnf"],
)
@pytest.mark.parametrize("isolation", [True, False])
def test_without_a_compiler_one_sentence_comes_before_any_download(
    source, plain, tmp_path, programs, said, isolation
):
    """Without an index pip fails at the first thing that it would have to fetch."""
    for name, script in programs.items():
        plant(tmp_path / "bin", name, script)
    options = ["--no-index"] if isolation else ["--no-index", "--no-build-isolation"]
    result = run(
        *(sys.executable, "-m", "pip", "install", *options),
        *("--target", tmp_path / "installed", "."),
        cwd=source,
        env={**plain, "PATH": str(tmp_path / "bin")},
    )
    assert result.returncode != 0
    (sentence,) = (line for line in result.stdout.splitlines() if "Building resnet_fused" in line)
    assert re.search(said + WITHOUT, sentence), sentence
    assert "Traceback" not in result.stdout
    assert "Collecting" not in result.stdout


def test_missing_headers_are_asked_for_together_with_a_compiler(source, plain, tmp_path):
    plant(tmp_path / "bin", "apt-get", "")
    code = (
        "import sysconfig\n"
        "sysconfig.get_path = lambda name: '/nowhere/include'\n"
        "import build_backend; build_backend.get_requires_for_build_editable()"
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    headers = r"Python's headers, of which /nowhere/include/Python\.h is missing"
    for path, said in (
        (plain["PATH"], rf"needs {headers}: run `.* install python{version}-dev(el)?`"),
        (tmp_path / "bin", rf"needs a C\+\+ .* and {headers}: run `.* g\+\+ python{version}-dev`"),
    ):
        result = run(sys.executable, "-c", code, cwd=source, env={**plain, "PATH": str(path)})
        assert result.returncode == 1
        assert re.search(said, result.stdout), result.stdout


def test_a_package_without_the_extension_needs_no_compiler(source, plain, python, tmp_path):
    steered = {**plain, "RESNET_FUSED_EXTENSION": "off", "PATH": str(tmp_path)}
    installed = unpack(source, build_wheel(source, steered))
    assert not list(installed.rglob("*.so"))
    assert (installed / "resnet_fused/py.typed").exists()
    (wheel,) = source.parent.glob("wheels/*.whl")
    assert wheel.name.split("-")[1] == __version__
    report = python(installed, plain, "-m", "resnet_fused.env")
    reason = r"was left out when the package was installed \(RESNET_FUSED_EXTENSION=off\)"
    assert re.search(rf"extension +not usable: .*{reason}; build it with `.*=on pip", report)
    assert re.search(rf"cpu +unavailable: .*{reason}", report)
    assert re.search(r"reference +available", report)


# What the build asks pip for


@pytest.fixture
def required(source: Path) -> Callable[[Environment], list[str]]:
    def ask(env: Environment) -> list[str]:
        code = "import build_backend; print(build_backend.get_requires_for_build_wheel())"
        result = run(sys.executable, "-c", code, cwd=source, env=env)
        assert result.returncode == 0, result.stdout
        return ast.literal_eval(result.stdout.splitlines()[-1])

    return ask


@needs_tools
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_compiler_comes_from_pypi_where_there_is_none(required, without_nvcc, mode):
    wheels = required({**without_nvcc, "RESNET_FUSED_CUDA": mode})
    wheels = [wheel for wheel in wheels if "==" in wheel]
    names = {name for name, _ in (wheel.split("==") for wheel in wheels)}
    assert names == {
        f"nvidia-{part}" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
    }
    assert len({wheel.split("==")[1] for wheel in wheels}) == 1, "one minor version for all"


@needs_tools
def test_no_compiler_is_fetched_in_vain(required, plain, without_nvcc, tmp_path):
    def names(requirements: list[str]) -> list[str]:
        return [re.split(r"\W", requirement)[0] for requirement in requirements]

    off = required({**without_nvcc, "RESNET_FUSED_CUDA": "off"})
    assert names(off) == ["setuptools", "cmake", "ninja", "pybind11"]
    nothing = required({**without_nvcc, "RESNET_FUSED_EXTENSION": "off"})
    assert names(nothing) == ["setuptools"]
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    for steering in (
        {"CUDACXX": str(nvcc)},
        {"CUDA_HOME": str(nvcc.parents[1])},
        {"PATH": os.pathsep.join([str(nvcc.parent), without_nvcc["PATH"]])},
    ):
        assert required({**without_nvcc, **steering}) == off


# The package without its extension, and with one that cannot be loaded


def test_works_without_the_extension(source, plain, python):
    report = python(source, plain, "-m", "resnet_fused.env")
    assert re.search(r"extension +not usable: .*is not built .*pip install", report)
    assert re.search(r"reference +available", report)
    assert re.search(r"cuda +unavailable: backend 'cuda' cannot run: .*pip install", report)


def test_an_extension_that_cannot_be_loaded_is_explained(source, plain, python):
    (source / "resnet_fused" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF, but no more")
    report = python(source, plain, "-m", "resnet_fused.env")
    assert re.search(r"extension +not usable: .*cannot be loaded .*--force-reinstall", report)
    assert re.search(r"reference +available", report)


def test_missing_torch_is_named_and_reported(source, plain, python):
    """A folder that hides torch stands for a machine without it."""
    (source / "torch.py").write_text("raise ImportError('libcudart.so is missing')")
    report = python(source, plain, "-m", "resnet_fused.env")
    assert re.search(r"python +3\.", report)
    assert "could not be found out: ImportError: libcudart.so is missing" in report
    assert "RESNET_FUSED_TUNE" in report
    code = "import resnet_fused\ntry: resnet_fused.resnet50()\nexcept ImportError as e: print(e)"
    found = python(source, plain, "-c", code)
    assert "needs PyTorch, which cannot be imported: libcudart.so is missing" in found


def test_report_goes_on_after_a_probe_that_fails(monkeypatch):
    def broken():
        yield "first", "known"
        raise OSError("no such thing")

    probes = {"broken": broken, "backends": environment.PROBES["backends"]}
    monkeypatch.setattr(environment, "PROBES", probes)
    report = environment.report()
    assert re.search(r"first +known\n.*could not be found out: OSError: no such thing", report)
    assert re.search(r"reference +available", report)


def test_report_names_variables_that_are_set_wrong(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_TRAINING", "fast")
    monkeypatch.setenv("RESNET_FUSED_TUNE", " OFF")
    monkeypatch.setattr(environment, "PROBES", {"variables": environment._variables})
    report = environment.report()
    assert "'fast' is not understood; set it to speed or memory." in report
    assert report.count("is not understood") == 1
    assert not settings.tuning_enabled()


def test_import_loads_neither_the_extension_nor_the_gpu(source, plain, python):
    code = (
        "import sys, torch, resnet_fused\n"
        "print('resnet_fused._C' in sys.modules, torch.cuda.is_initialized())"
    )
    assert python(source, plain, "-c", code).split() == ["False", "False"]


# Sources that lie beside an installed package


def installed_extension(name: str) -> Path:
    if reason := _extension.available(name):
        pytest.skip(reason)
    return Path(str(_extension.load(name).__file__))


@pytest.mark.parametrize(
    ("name", "found"), [("_C", r"extension +\d.*\n +{path}\n"), ("_C_sim", "cuda_sim +available")]
)
def test_sources_find_an_installed_extension(source, plain, uninstalled, tmp_path, name, found):
    """In the folder of the sources, where Python takes these and not the installed package."""
    extension = installed_extension(name)
    package = tmp_path / "site" / "resnet_fused"
    package.mkdir(parents=True)
    planted = package / extension.name
    shutil.copy(extension, planted)

    def report() -> str:
        env = {**plain, "PYTHONPATH": str(package.parent)}
        return run(uninstalled, "-m", "resnet_fused.env", cwd=source, env=env).stdout

    assert re.search(found.format(path=re.escape(str(planted))), report())

    bindings = source / "csrc/bindings/register.h"
    text = bindings.read_text()
    bindings.write_text(text + "\n")
    refused = (
        rf"{name} in {re.escape(str(planted))} was built from other bindings than .*pip install"
    )
    assert re.search(refused, report())

    bindings.write_text(text)
    planted.write_bytes(b"\x7fELF, but no more")
    assert re.search(rf"{name} cannot be loaded .*--force-reinstall", report())


# What the extension's stub says


def signatures(stub: str) -> dict[str, list[str]]:
    """The names of the arguments of each function and method of a stub."""
    found = {}
    for node in ast.parse(stub).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef) and not member.decorator_list:
                found[prefix + member.name] = [a.arg for a in member.args.args]
    return found


def test_the_stub_is_of_the_bindings():
    """As pybind11 gives signatures: the first line of each docstring."""
    if reason := _extension.available():
        pytest.skip(reason)
    module = _extension.load()
    stub = signatures((ROOT / "resnet_fused/_C.pyi").read_text())
    del stub["__getattr__"]
    for name, arguments in stub.items():
        function = functools.reduce(getattr, name.split("."), module)
        line = function.__doc__.split("\n")[0]
        while "[" in line:  # types of types
            line = re.sub(r"\[[^\[\]]*\]", "", line)
        assert re.findall(r"[(,] ?(\w+): ", line) == arguments, line
    bound = {name for name in dir(module) if callable(getattr(module, name))}
    missing = {name for name in bound if not name.startswith("_")}
    missing -= {name.split(".")[0] for name in stub}
    assert not [name for name in missing if not re.match("cuda_|[A-Z]", name)]


# Continuous integration


def test_ci_runs_the_commands_of_the_readme():
    start = (ROOT / "README.md").read_text().split("\n## Start\n")[1].split("\n## ")[0]
    commands = [block.strip() for block in start.split("```")[1::2]]
    install, test = commands
    assert install.startswith("python3 -m venv")
    assert test.startswith("pytest")
    ci = (ROOT / ".ci/run").read_text().splitlines()
    assert ci.index(install) < ci.index(test)
    assert "- run: .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()


@pytest.mark.thorough
def test_the_sources_compile_for_aarch64_and_its_kernels_run(tmp_path):
    """In an emulator, as a processor with bfloat16 and as one without."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    pybind11 = importlib.util.find_spec("pybind11")
    if compiler is None or emulator is None or pybind11 is None:
        pytest.skip("needs aarch64-linux-gnu-g++, qemu-aarch64 and pybind11")
    kernels = sorted((ROOT / "csrc/kernels/cpu").glob("*.cpp"))
    bindings = sorted((ROOT / "csrc/bindings").glob("*.cpp"))
    options = ["-std=c++17", "-fopenmp", "-I", ROOT / "csrc"]
    headers = ["-isystem", Path(pybind11.origin).parent / "include"]
    headers += ["-isystem", sysconfig.get_path("include")]
    # Without those that CMake writes a header for, and that are CUDA's.
    bindings = [b for b in bindings if b.name not in ("module.cpp", "cuda.cpp")]
    checked = [*kernels, *bindings]

    def passes(*command: str | Path) -> None:
        result = run(*command, cwd=tmp_path, env=dict(os.environ))
        assert result.returncode == 0, result.stdout

    passes(compiler, *options, *headers, "-fsyntax-only", *checked)
    linked = ("batch_norm", "bn_add_relu", "conv", "group_norm_add_relu", "head", "parallel")
    linked += ("squeeze_excite", "stem", "winograd")
    sources = [ROOT / "tests/aarch64.cpp", *(k for k in kernels if k.stem in linked)]
    assert len(sources) == 1 + len(linked)
    program = tmp_path / "aarch64"
    passes(compiler, *options, "-O1", "-static", *sources, "-o", program)
    passes(emulator, "-cpu", "max", program, "bf16")
    passes(emulator, "-cpu", "neoverse-n1", program, "plain")


def test_installed_extension_links_only_the_system():
    if reason := _extension.available():
        pytest.skip(reason)
    assert_links_only_the_system(Path(str(_extension.load().__file__)))
