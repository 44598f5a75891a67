"""Fixtures that the tests share. Without a GPU, Triton kernels run under Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads that wait must not keep another's from running. Read when
    # torch loads OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# The tests are to run each kernel on a new GPU, not what stands in for it while it is checked.
os.environ.setdefault("RESNET_FUSED_SELFCHECK", "off")
if not torch.cuda.is_available():
    # Read when triton is first imported, so it is set before anything can import it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from resnet_fused import _extension, backends, use_backend
from resnet_fused.backends import autotune

# A run that is told to end, where its time is limited, still says what has failed.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wheel", help="a built wheel, for tests/test_wheel.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Workers take whole stretches of the tests and steal from each other at the end, so that what
    a module's tests share is made once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.hookimpl(tryfirst=True)  # before -m selects by the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what uses the fixture `simulator`, and skips what this machine or build lacks."""
    missing = {"simulator": backends.unavailable("cuda_sim")}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA GPU, and torch sees none"
    for item in items:
        if "simulator" in getattr(item, "fixturenames", ()):
            item.add_marker("simulator")
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Keeps the tuning cache of the person who runs the tests out of them."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def choices() -> None:
    """A test's choices of kernels are its own: sizes that share a choice may be another test's."""
    autotune.tuner.forget()


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of float32 are held to float32's errors, so TF32 is for its own tests."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _kind(value: Any) -> Any:
    """What Triton compiles for, of an argument of a launch."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return tuple(map(_kind, value)) if isinstance(value, tuple) else value


@pytest.fixture(scope="session", autouse=True)
def launches_of_one_kind() -> Iterator[None]:
    """Every Triton launch takes tensors like its first ones. A compiled one starts what was
    compiled for those without looking; an interpreted one would take any."""
    try:
        from resnet_fused.backends.triton.launching import Launch
    except ImportError:
        yield
        return
    start = Launch._start

    def checked(self: Any, tensors: tuple[Any, ...]) -> None:
        kinds = _kind(tensors)
        first = self.__dict__.setdefault("kinds", kinds)
        assert kinds == first, f"{self.kernel.__name__} was compiled for {first}"
        start(self, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "_start", checked)
        yield


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """The compiled extension, where it holds CUDA code."""
    if reason := _extension.available():
        pytest.skip(reason)
    module = _extension.load()
    info = module.build_info()
    if not info["cuda"]:
        pytest.skip(f"the extension holds no CUDA code: {info['cuda_note']}")
    return module


@pytest.fixture(scope="session")
def architectures(extension: ModuleType) -> list[str]:
    """Those that the extension holds CUDA code for."""
    return extension.build_info()["cuda_architectures"].split()


@pytest.fixture
def simulator() -> Iterator[ModuleType]:
    """The simulator's extension, its counts at zero, its settings put back afterwards.

    Who uses it gets the marker `simulator`, and skips where it is not built.
    """
    module = importlib.import_module("resnet_fused._C_sim")
    module.take_statistics()
    yield module
    module.plant()
    module.set_schedule()


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def half(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


# For exact results: the types differ in conversions, which a contract's test takes of both.
one_half = pytest.mark.parametrize("half", [torch.bfloat16], ids=["bfloat16"])


@pytest.fixture(params=["float32-avx2", "float32-avx512", "bfloat16-avx2", "bfloat16-avx512"])
def kernel(request: pytest.FixtureRequest) -> tuple[torch.dtype, str]:
    """A dtype, and an instruction set for which the CPU has kernels of it."""
    dtype, isa = request.param.split("-")
    extension = _extension.load()
    have = extension.cpu_isa()
    if have not in ("avx2", "avx512") or isa > have:
        pytest.skip(f"this processor has {have or 'neither AVX2 nor AVX-512'}")
    if (dtype, isa) == ("bfloat16", "avx512") and not extension.cpu_convolves_bf16():
        pytest.skip("this processor lacks AVX512_BF16")
    return getattr(torch, dtype), isa


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def require(name: str, device: str, dtype: torch.dtype) -> None:
    """Skips, with the reason, where the backend cannot serve such tensors."""
    if reason := backends.unavailable(name):
        pytest.skip(reason)
    if reason := backends.get(name).unsupported(torch.device(device), dtype):
        pytest.skip(f"{name}: {reason}")


TARGETS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cpu"), id="triton-interpreted"),
    pytest.param(("cuda_sim", "cpu"), id="cuda-simulated", marks=pytest.mark.simulator),
    pytest.param(("cuda_sim", "cpu", 90), id="cuda-simulated-sm90", marks=pytest.mark.simulator),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    pytest.param((None, "cuda"), id="chosen", marks=pytest.mark.gpu),
]


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=TARGETS)
def device(
    request: pytest.FixtureRequest, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The device to put tensors on, with one backend after the other chosen for it, then none."""
    name, device, *capability = request.param
    if name is not None:
        require(name, device, dtype)
    if capability:
        if dtype == torch.float32:
            pytest.skip("sm_90a has no kernel of its own for float32")
        monkeypatch.setenv("RESNET_FUSED_HOST_SIM_CAPABILITY", str(*capability))
    with use_backend(name):
        yield device
