"""int8 networks: ours, and what others make of the same weights, calibrated on the same images.

All take float images, so that quantising them is part of every call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resnet_fused

from . import (
    INT8_BOUND,
    Baseline,
    Call,
    Task,
    int8,
    onnx_model,
    openvino_call,
    quantised_network,
    require,
)


def _ours_in_bfloat16(task: Task) -> Call:
    model = resnet_fused.freeze(task.load(resnet_fused, torch.bfloat16))
    images = task.images.to(torch.bfloat16, memory_format=torch.channels_last)
    return lambda: model(images)


def _exported(task: Task, folder: str) -> str:
    """Our quantised network as ONNX."""
    path = str(Path(folder, "ours.onnx"))
    resnet_fused.quantization.export_onnx(quantised_network(task), path)
    return path


def _statically_quantised(task: Task, folder: str) -> str:
    """The float network as ONNX Runtime quantises it: QDQ, a scale for each output channel."""
    require("onnxruntime", "onnxruntime")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared, path = (str(Path(folder, f"{n}.onnx")) for n in ("float", "folded", "int8"))
    Path(source).write_bytes(onnx_model(task))
    quant_pre_process(source, prepared, skip_symbolic_shape=True)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"x": task.images.numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantization.quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"WeightSymmetric": True},
    )
    return path


Model = Callable[[Task, str], str]


def _onnxruntime(task: Task, model: Model) -> Call:
    ort = require("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = model(task, folder)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: task.images.numpy()}

    def call() -> Tensor:
        return torch.from_numpy(session.run(None, fed)[0])

    return call


def _openvino(task: Task, model: Model) -> Call:
    openvino = require("openvino", "openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        network = core.read_model(model(task, folder))
        network.reshape(list(task.images.shape))
        return openvino_call(core.compile_model(network, "CPU", settings), task.images)


def _all() -> Iterator[Baseline]:
    cpu = partial(Baseline, devices=("cpu",), bound=INT8_BOUND)
    yield cpu("int8", "resnet_fused int8", int8, ours=True)
    yield cpu("bfloat16", "resnet_fused bf16, frozen", _ours_in_bfloat16)
    for key, title, build in (
        ("openvino", "OpenVINO", _openvino),
        ("onnxruntime", "ONNX Runtime", _onnxruntime),
    ):
        yield cpu(key, f"{title} int8", partial(build, model=_statically_quantised))
        yield cpu(f"{key}-export", f"{title}, our export", partial(build, model=_exported))


BASELINES = tuple(_all())
