"""What a forward costs the host: calls are counted against the goals, and the benchmark runs."""

from __future__ import annotations

import json
from pathlib import Path

import host_time
import pytest
import torch

import resnet_fused
from resnet_fused import _extension, use_backend

# Of a ResNet-50 forward: Python's calls and those of C functions from Python.
MOST_CALLS = 300


def calls(backend: str, dtype: torch.dtype) -> tuple[int, int]:
    """By the ordinary path, and by the plan."""
    extension = _extension.load(host_time._MODULES[backend])
    model = resnet_fused.resnet50().eval().to(dtype, memory_format=torch.channels_last)
    x = torch.zeros(1, 3, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), use_backend(backend), host_time.stubbed(extension):
        with host_time.without_plans():
            model(x)
            ordinary = host_time.count_calls(model, x)
        for _ in range(3):
            model(x)
        return ordinary, host_time.count_calls(model, x)


@pytest.mark.parametrize("backend", ["cpu", "cuda_sim"])
def test_a_planned_forward_makes_few_calls(backend):
    module = host_time._MODULES[backend]
    if reason := _extension.available(module):
        pytest.skip(reason)
    if backend == "cpu" and not _extension.load().cpu_isa():
        pytest.skip("this processor has no kernels for float32")
    ordinary, planned = calls(backend, host_time._DTYPES[backend])
    assert planned <= MOST_CALLS
    assert ordinary > 3 * MOST_CALLS, "what is counted are calls"


def test_the_benchmark_writes_what_it_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if reason := _extension.available():
        pytest.skip(reason)
    file = tmp_path / "host_time.json"
    arguments = ["--network", "resnet18", "--backend", "cpu", "--size", "64", "--rounds", "3"]
    arguments += ["--training", "cpu", "--json", str(file)]
    assert host_time.main(arguments) == 0
    record = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert [row.get("training", False) for row in record["rows"]] == [False, True]
    for row in record["rows"]:
        assert row["planned"]["calls"] < row["ordinary"]["calls"]
        low, high = row["planned"]["ms_quartiles"]
        assert 0 < low <= row["planned"]["ms"] <= high
        assert str(row["planned"]["calls"]) in printed
    assert {"machine", "commit", "versions"} <= set(record)


def test_stubbed_kernels_write_nothing():
    if reason := _extension.available():
        pytest.skip(reason)
    extension = _extension.load()
    value = torch.zeros(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    out, one = torch.full_like(value, 7.0), torch.ones(8)
    vector = _extension.tensor_arg(one)
    described = [_extension.tensor_arg(t) for t in (out, value)]
    with host_time.stubbed(extension):
        extension.bn_add_relu(*described, (vector, vector, None, None, 0.0), None, False)
    assert bool((out == 7).all())
    extension.bn_add_relu(*described, (vector, vector, None, None, 0.0), None, False)
    assert bool((out == -1).all())
