"""What is measured: our backends and every baseline, each one function that builds a ready call.

Each is built in a process of its own (harness/workers.py), so it may change process-wide settings.
To add a baseline, write a `build` function and list it in BASELINES.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from harness.measure import in_cuda_graph
from torch import Tensor, nn

import resnet_fused

from .folded import CudnnNetwork

Call = Callable[[], Tensor]


class UnavailableError(Exception):
    """This baseline cannot run here; the message says why and what would change it."""


class Task(NamedTuple):
    """What every implementation in one comparison is given.

    state: file with a torchvision state dict of the architecture, floating values in `dtype`.
    images: (N, 3, H, W) in `dtype`, normalised, NCHW in memory, on `device`.
    """

    architecture: str
    state: Path
    images: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    @property
    def device(self) -> torch.device:
        return self.images.device

    def load(self, library: Any, dtype: torch.dtype | None = None) -> nn.Module:
        """The model as `library` (torchvision.models or resnet_fused) makes it, for inference.

        It is in the task's dtype unless another one is asked for, with the same values.
        """
        state = torch.load(self.state, weights_only=True)
        with torch.device("meta"):  # initial values would only be overwritten
            model: nn.Module = getattr(library, self.architecture)(
                num_classes=len(state["fc.bias"])
            )
        model.to_empty(device=self.device).to(dtype or self.dtype)
        model.load_state_dict(state)
        return model.eval()

    def torchvision(self, dtype: torch.dtype | None = None) -> nn.Module:
        """torchvision's model, as `load` makes it."""
        return self.load(torchvision.models, dtype)

    def nhwc(self) -> tuple[nn.Module, Tensor]:
        """torchvision's model and the images, both channels_last."""
        layout = torch.channels_last
        images = self.images.contiguous(memory_format=layout)
        return self.torchvision().to(memory_format=layout), images


class Baseline(NamedTuple):
    """An implementation to measure, ours included.

    It has a name for the command line, a title for tables, and builds the call that is timed.
    `build` runs in the worker's process under inference mode; what it raises becomes the reason in
    the table. It must be importable there. `bound` is for what computes in fewer bits than the
    comparison's dtype: the relative error that it may have. It stands in the table beside the
    others; a speed-up is stated of it only where ours has a bound as well.
    """

    key: str
    title: str
    build: Callable[[Task], Call]
    devices: tuple[str, ...] = ("cpu", "cuda")
    ours: bool = False
    slow: bool = False  # to build; --quick leaves it out
    bound: float | None = None


def require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install {package}") from error


# Ours


def _ours(task: Task, backend: str | None) -> Call:
    resnet_fused.use_backend(backend)
    model = task.load(resnet_fused)
    if task.images.is_cuda:  # the CPU's kernels pack weights of any layout
        model.to(memory_format=torch.channels_last)
    images = task.images.contiguous(memory_format=torch.channels_last)
    return lambda: model(images)


def _ours_frozen(task: Task) -> Call:
    resnet_fused.use_backend("cpu")
    model = resnet_fused.freeze(task.load(resnet_fused))
    images = task.images.contiguous(memory_format=torch.channels_last)
    return lambda: model(images)


def _pieces(images: Tensor) -> list[Tensor]:
    """One piece of the images for each core, for those who compute batches side by side."""
    cores = torch.get_num_threads()
    if len(images) < cores:
        raise UnavailableError(f"batches side by side need at least {cores} images, one a core")
    return list(images.tensor_split(cores))


def _ours_streams(task: Task) -> Call:
    resnet_fused.use_backend("cpu")
    images = task.images.contiguous(memory_format=torch.channels_last)
    pieces = _pieces(images)
    scorer = resnet_fused.throughput(resnet_fused.freeze(task.load(resnet_fused)), len(pieces))
    return lambda: torch.cat(list(scorer.map(pieces)))


def _ours_in_graph(task: Task, backend: str | None) -> Call:
    return in_cuda_graph(_ours(task, backend))


# Of a random ResNet-50, which damps no noise, 0.14 (224×224, 8 photographs).
INT8_BOUND = 0.2
_CALIBRATION_IMAGES = 8


def quantised_network(task: Task) -> Any:
    """Our network in int8, calibrated on some of the images themselves."""
    few = task._replace(images=task.images[:_CALIBRATION_IMAGES].float().cpu())
    return resnet_fused.quantize(few.load(resnet_fused), [few.images], progress=False)


def int8(task: Task) -> Call:
    """Our network in int8; it takes the images as floats."""
    network = quantised_network(task).to(task.device)
    images = task.images.contiguous(memory_format=torch.channels_last)
    return lambda: network(images)


def _int8_in_graph(task: Task) -> Call:
    return in_cuda_graph(int8(task))


# PyTorch


def _eager(task: Task) -> Call:
    model = task.torchvision()
    return lambda: model(task.images)


def _eager_nhwc(task: Task) -> Call:
    model, images = task.nhwc()
    return lambda: model(images)


def _compiled(task: Task, mode: str | None = None, freezing: bool = False) -> Call:
    import torch._inductor.config as inductor

    # Not torch.compile(options=...): that reaches inductor after freezing was decided on, and
    # nothing is frozen (seen with torch 2.15).
    inductor.freezing = freezing
    model, images = task.nhwc()
    compiled = torch.compile(model, mode=mode)
    return lambda: compiled(images)


def _cudnn_graph(task: Task) -> Call:
    model, images = task.nhwc()
    fused = CudnnNetwork(model)
    return in_cuda_graph(lambda: fused(images))


# Other engines


def onnx_model(task: Task) -> bytes:
    require("onnxscript", "onnx onnxscript")
    program = torch.onnx.export(task.torchvision(), (task.images,), dynamo=True, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _onnxruntime(task: Task) -> Call:
    ort = require("onnxruntime", "onnxruntime-gpu" if task.device.type == "cuda" else "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if task.device.type == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise UnavailableError("this onnxruntime has no CUDA; pip install onnxruntime-gpu")
        stream = str(torch.cuda.current_stream().cuda_stream)
        settings = {"use_tf32": "0", "user_compute_stream": stream}
        providers: list[Any] = [("CUDAExecutionProvider", settings)]
    else:
        if task.dtype == torch.bfloat16:
            raise UnavailableError("onnxruntime's CPU kernels have no bfloat16 convolution")
        providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(onnx_model(task), options, providers=providers)
    images = task.images
    logits = torch.empty(len(images), 1000, dtype=task.dtype, device=task.device)
    binding = session.io_binding()
    for bind, name, tensor in (
        (binding.bind_input, session.get_inputs()[0].name, images),
        (binding.bind_output, session.get_outputs()[0].name, logits),
    ):
        # Element types by ONNX's own numbers: numpy has no bfloat16.
        element = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}[task.dtype]
        index = tensor.device.index or 0
        bind(name, task.device.type, index, element, tuple(tensor.shape), tensor.data_ptr())
    run_options = ort.RunOptions()
    if task.device.type == "cuda":
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call(_images: Tensor = images) -> Tensor:  # the binding holds addresses, not tensors
        session.run_with_iobinding(binding, run_options)
        return logits

    return call


def _openvino_model(task: Task, hint: str, shape: list[int]) -> Any:
    """The network compiled for inputs (N, 3, H, W) of that shape, and for that goal."""
    openvino = require("openvino", "openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[task.dtype]
    # OpenVINO reads float32 and converts by the hint; the values are the task's all the same.
    model = openvino.convert_model(
        task.torchvision(torch.float32), example_input=task.images.float(), input=[shape]
    )
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def openvino_call(model: Any, images: Tensor) -> Call:
    """What a compiled model makes of the images, of which it copies neither."""
    request, array = model.create_infer_request(), images.numpy()
    return lambda: torch.from_numpy(request.infer(array, share_inputs=True, share_outputs=True)[0])


def _openvino(task: Task) -> Call:
    model = _openvino_model(task, "LATENCY", list(task.images.shape))
    return openvino_call(model, task.images.float())


def _openvino_streams(task: Task) -> Call:
    openvino = require("openvino", "openvino")
    pieces = [piece.numpy() for piece in _pieces(task.images.float())]
    shape = [len(pieces[0]) if len({len(piece) for piece in pieces}) == 1 else -1]
    model = _openvino_model(task, "THROUGHPUT", [*shape, *task.images.shape[1:]])
    queue = openvino.AsyncInferQueue(model, len(pieces))
    logits: list[Any] = [None] * len(pieces)

    def keep(request: Any, i: int) -> None:
        logits[i] = torch.from_numpy(request.get_output_tensor().data.copy())

    queue.set_callback(keep)

    def call() -> Tensor:
        for i, piece in enumerate(pieces):
            queue.start_async(piece, i, share_inputs=True)
        queue.wait_all()
        return torch.cat(logits)

    return call


def _tensorrt(task: Task) -> Call:
    trt = require("tensorrt", "tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_model(task)):
        raise RuntimeError(f"TensorRT cannot read the model: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RuntimeError("TensorRT built no engine")
    engine = trt.Runtime(logger).deserialize_cuda_engine(serialized)
    context = engine.create_execution_context()
    source, target = engine.get_tensor_name(0), engine.get_tensor_name(1)
    shape = tuple(engine.get_tensor_shape(target))
    logits = torch.empty(shape, dtype=task.dtype, device=task.device)
    images = task.images
    context.set_tensor_address(source, images.data_ptr())
    context.set_tensor_address(target, logits.data_ptr())

    def call() -> Tensor:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT failed to run the engine")
        return logits

    replay = in_cuda_graph(call)

    def run(_owners: tuple[Any, ...] = (images, context, engine)) -> Tensor:  # the graph owns none
        return replay()

    return run


def _jax(task: Task) -> Call:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the others need memory too
    gpu = task.device.type == "cuda"
    jax = require("jax", "'jax[cuda13]'" if gpu else "jax")
    try:
        devices = jax.devices("gpu" if gpu else "cpu")
    except RuntimeError as error:
        raise UnavailableError("this jax sees no GPU; pip install 'jax[cuda13]'") from error
    from . import jax_resnet

    return jax_resnet.call(task.torchvision(), task.images, devices[task.device.index or 0])


_CPU, _GPU = ("cpu",), ("cuda",)


def _all() -> Iterator[Baseline]:
    yield Baseline("cpu", "resnet_fused cpu", partial(_ours, backend="cpu"), _CPU, ours=True)
    yield Baseline("cpu-frozen", "resnet_fused cpu, frozen", _ours_frozen, _CPU, ours=True)
    yield Baseline("cpu-streams", "resnet_fused cpu, streams", _ours_streams, _CPU, ours=True)
    for backend in (None, "triton", "cuda"):
        key = backend or "resnet_fused"
        title = f"resnet_fused {backend or ''}".strip()
        yield Baseline(key, title, partial(_ours, backend=backend), _GPU, ours=True)
        build = partial(_ours_in_graph, backend=backend)
        yield Baseline(f"{key}-graph", f"{title}, graph", build, _GPU, ours=True)
    title = "resnet_fused int8, graph"
    yield Baseline("int8-graph", title, _int8_in_graph, _GPU, bound=INT8_BOUND)
    yield Baseline("eager", "PyTorch eager NCHW", _eager)
    yield Baseline("eager-nhwc", "PyTorch eager channels_last", _eager_nhwc)
    yield Baseline("compile", "torch.compile", _compiled, slow=True)
    frozen = partial(_compiled, freezing=True)
    yield Baseline("compile-freezing", "torch.compile, freezing", frozen, _CPU)
    for mode in ("reduce-overhead", "max-autotune"):
        build = partial(_compiled, mode=mode, freezing=True)
        slow = mode == "max-autotune"
        yield Baseline(f"compile-{mode}", f"torch.compile {mode}", build, _GPU, slow=slow)
    yield Baseline("cudnn-graph", "cuDNN fused ops, graph", _cudnn_graph, _GPU)
    yield Baseline("onnxruntime", "ONNX Runtime", _onnxruntime)
    yield Baseline("openvino", "OpenVINO", _openvino, _CPU)
    title = "OpenVINO, throughput"
    yield Baseline("openvino-throughput", title, _openvino_streams, _CPU)
    yield Baseline("jax", "JAX, jit", _jax)
    yield Baseline("tensorrt", "TensorRT, graph", _tensorrt, _GPU)


BASELINES = tuple(_all())
