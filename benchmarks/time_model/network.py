"""What a network launches, in order: its ops run on tensors without memory, launches are recorded.

Our ops run their backend's host code (device `meta`), and every other op of PyTorch that computes
something counts by its bytes. Inference takes backend `cuda`, training its
convolutions and Triton's passes, int8 our convolutions and Triton's stem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_fused
from resnet_fused.backends import autotune
from resnet_fused.backends.cuda.training import CudaTraining
from resnet_fused.ops.dispatch import use_backend

from . import cuda_backend, cuda_launches, triton_launches
from .rates import Gpu
from .work import Work, bytes_of

# They make tensors and write nothing.
_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "as_strided_")
# By the argument that holds the left matrix.
_PRODUCTS = {"mm": 0, "linear": 0, "addmm": 1}


class _Recorder(TorchDispatchMode):
    """Runs our ops' own code on meta tensors; `drain` gives the launches since the last call."""

    sees_fused_ops = True

    def __init__(
        self, model: nn.Module, drain: Callable[[Callable[[Sequence[Any]], str]], Iterator[Work]]
    ) -> None:
        super().__init__()
        self.works: list[Work] = []
        self._drain = drain
        self._names = {id(p): name for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "resnet_fused":
            out = func(*args, **kwargs)
            self.works += _library(func, args, kwargs, out)
            return out
        # One code serves every device but `meta`, where an op only tells the shape of its result.
        own = torch.library.get_kernel(func, "CPU")
        with self:
            out = own.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        whole = self._name_of(tree_leaves(args))
        self.works += self._drain(lambda tensors: self._name_of(tensors) or whole)
        return out

    def _name_of(self, values: Sequence[Any]) -> str:
        """The module that the parameters among `values` share, "" where there is none."""
        names = [self._names[id(v)].split(".")[:-1] for v in values if id(v) in self._names]
        if not names:
            return ""
        shared = takewhile(lambda level: len(set(level)) == 1, zip(*names, strict=False))
        return ".".join(level[0] for level in shared)


def _library(func: Any, args: Any, kwargs: Any, out: Any) -> Iterator[Work]:
    """The op as a kernel of PyTorch's, if it computes something."""
    name = func._schema.name.split("::")[1]
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if not func._schema.returns:  # writes its first argument, one tensor or several
        written = [t for t in tree_leaves(args[0]) if isinstance(t, Tensor)]
    elif func._schema.returns[0].alias_info is not None:
        in_place = func._schema.returns[0].alias_info.is_write
        known = {t.untyped_storage()._cdata for t in read}
        if not in_place and all(t.untyped_storage()._cdata in known for t in written):
            return  # a view
    moved = bytes_of(*read, *written)
    if name in _EMPTY or not written or moved == 0:
        return
    multiply_adds = 0
    if name in _PRODUCTS:
        multiply_adds = written[0].numel() * args[_PRODUCTS[name]].shape[-1]
    more = f" and {len(written) - 1} more" if len(written) > 1 else ""
    yield Work(
        kernel=f"PyTorch {name}",
        config="",
        shape="×".join(map(str, written[0].shape)) + more,
        tiles=1,
        warps=1,
        blocks_per_sm=1,
        trips=(),
        dram_bytes=moved,
        l2_bytes=moved,
        multiply_adds=multiply_adds,
    )


def inference(arch: str, batch: int, dtype: torch.dtype, gpu: Gpu, extension: Path) -> list[Work]:
    """The launches of a forward in eval mode on `batch` images of 224², in `dtype` throughout."""
    model, x = _network(arch, batch, dtype)
    model.eval()
    backend = cuda_backend.RecordingBackend(gpu)

    def drain(name_of: Callable[[Sequence[Tensor]], str]) -> Iterator[Work]:
        calls = backend.calls[:]
        backend.calls.clear()
        yield from cuda_launches.works(calls, name_of, gpu, extension)

    recorder = _Recorder(model, drain)
    with use_backend(backend), torch.no_grad(), recorder:
        model(x)
    return recorder.works


def training(
    arch: str, batch: int, dtype: torch.dtype, gpu: Gpu, extension: Path | None = None
) -> list[Work]:
    """The launches of a step with SGD and momentum: float32 parameters, activations in `dtype`.
    Convolutions are our CUDA kernels where `extension` is given, Triton's where there are none."""
    model, x = _network(arch, batch, dtype)
    model.train()
    # As under autocast, which meta tensors do not take part in.
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    labels = torch.empty(batch, dtype=torch.int64, device="meta")

    def step() -> None:  # momentum exists from the second one on
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _triton_works(model, gpu, step, extension)


def quantized(arch: str, batch: int, gpu: Gpu, extension: Path | None = None) -> list[Work]:
    """The launches of an int8 network's forward on `batch` images of 224² of bytes. Convolutions
    are our CUDA kernels where `extension` is given, Triton's where there are none."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    model = resnet_fused.quantize(
        getattr(resnet_fused, arch)().eval(),
        [image],
        normalization=((0.5,) * 3, (0.25,) * 3),
        method="range",
        progress=False,
    ).to("meta")
    x = torch.empty(batch, 3, 224, 224, dtype=torch.uint8, device="meta")
    images = x.contiguous(memory_format=torch.channels_last)
    return _triton_works(model, gpu, lambda: model(images), extension)


def _triton_works(
    model: nn.Module, gpu: Gpu, run: Callable[[], object], extension: Path | None
) -> list[Work]:
    """What the second of two runs launches: the first one makes what lasts."""
    cuda, kernels = cuda_backend.RecordingBackend(gpu), None
    if extension is not None:
        autotune.tuner.forget()  # which backend's launches to record
        kernels = CudaTraining(cuda.training_convolutions)
    with triton_launches.recorded() as launches:

        def drain(name_of: Callable[[Sequence[Tensor]], str]) -> Iterator[Work]:
            found = launches[:]
            launches.clear()
            yield from triton_launches.works(found, name_of, gpu)
            if extension is not None:
                calls = cuda.calls[:]
                cuda.calls.clear()
                yield from cuda_launches.works(calls, name_of, gpu, extension)

        recorder = _Recorder(model, drain)
        quantizing = cuda if extension is not None else None
        with use_backend(triton_launches.backend(kernels, quantizing)), recorder:
            run()
            recorder.works.clear()
            run()
    return recorder.works


def _network(arch: str, batch: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        model = getattr(resnet_fused, arch)().to(dtype, memory_format=torch.channels_last)
        x = torch.empty(batch, 3, 224, 224, dtype=dtype)
    return model, x.contiguous(memory_format=torch.channels_last)
