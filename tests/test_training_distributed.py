"""Two processes, synchronised batch norm or DistributedDataParallel, against one process."""

from __future__ import annotations

import contextlib
import copy
import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import require
from test_training import FoldingReference
from torch import Tensor, nn

from resnet_fused import BasicBlock, Bottleneck, freeze_batch_norm, use_backend
from resnet_fused.models import ResNet
from resnet_fused.numerics import relative_error
from resnet_fused.ops import block_training
from resnet_fused.testing.cases import generator, randomise_statistics
from resnet_fused.testing.plain import training_ops_in_pytorch

SPLIT = 3  # of 5 images the first process gets 3: counts differ


def _model() -> nn.Module:
    """A stem-like block chain: a projection block and an identity block, random statistics."""
    torch.manual_seed(0)
    projection = nn.Sequential(nn.Conv2d(8, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    first = Bottleneck(8, 8, 2, projection)
    return randomise_statistics(nn.Sequential(first, Bottleneck(32, 8))).train()


def _data() -> tuple[Tensor, Tensor]:
    rng = generator()
    return torch.randn(5, 8, 6, 6, generator=rng), torch.randn(5, 32, 3, 3, generator=rng)


def _step(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Everything that must agree: result, gradients, running statistics."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grad)
    found = {"result": out.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters()}
    found |= dict(model.named_buffers())
    return found


def _join(rank: int, folder: Path, backend: str = "gloo", **options: Any) -> None:
    """What a process of its own starts with: these tests' settings, and the other process.

    A spawned process knows nothing of conftest.py, so it would multiply in TF32, PyTorch's default.
    """
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(backend, f"file://{folder}/meet", rank=rank, world_size=2, **options)


def _worker(rank: int, backend: str | None, folder: Path) -> None:
    _join(rank, folder)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(_model())
    x, grad = _data()
    part = slice(None, SPLIT) if rank == 0 else slice(SPLIT, None)
    if backend == "folded":
        block_training.kernels = lambda x: FoldingReference()
    with use_backend("reference" if backend == "folded" else backend):
        found = _step(model, x[part], grad[part])
    # Summed as DistributedDataParallel would, which refuses this layer on the CPU.
    for name, _ in model.named_parameters():
        dist.all_reduce(found[name])
    torch.save(found, folder / f"rank{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", [None, "triton", "folded"])
def test_two_processes_equal_one_on_the_joined_batch(backend: str | None, tmp_path: Path) -> None:
    if backend == "triton":
        require(backend, "cpu", torch.float32)
    expected = _step(copy.deepcopy(_model()), *_data())
    mp.spawn(_worker, (backend, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    for key, value in expected.items():
        if key in ("result", "x"):
            found = torch.cat([rank[key] for rank in ranks])
        else:
            assert torch.equal(ranks[0][key], ranks[1][key]), key
            found = ranks[0][key]
        # Both are float32, summed in different orders.
        assert relative_error(found, value) < 1e-5, key


def freeze_first_layers(model: nn.Module) -> None:
    """What is left trains a normalisation whose own input needs no gradient."""
    model[0].requires_grad_(False)
    model[1].conv1.requires_grad_(False)


def _uneven_worker(rank: int, difference: str, folder: Path) -> None:
    """The first process fuses everything; something keeps the second one from it."""
    # The time limit is of a collective for which the other process never comes.
    _join(rank, folder, timeout=datetime.timedelta(seconds=60))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(_model())
    x, grad = _data()
    part = slice(None, SPLIT) if rank == 0 else slice(SPLIT, None)
    if difference == "an empty batch":
        part = slice(None, None) if rank == 0 else slice(0, 0)
    elif difference == "partly frozen":
        freeze_first_layers(model)
    if rank == 1 and difference == "hooks":
        for module in (model[0].bn2, model[0].downsample[1], model[1].conv1):
            module.register_forward_hook(lambda m, i, out: None)
    elif rank == 1 and difference == "partly frozen":
        model[1].bn1.register_forward_pre_hook(lambda m, i: None)
    out = model(x[part])
    out.backward(grad[part])
    found = {"result": out.detach(), **dict(model.named_buffers())}
    for name, p in model.named_parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            found[name] = p.grad
    torch.save(found, folder / f"rank{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("difference", ["hooks", "an empty batch", "partly frozen"])
def test_ranks_that_fuse_differently_meet_in_the_same_collectives(
    difference: str, tmp_path: Path
) -> None:
    model, (x, grad) = _model(), _data()
    if difference == "partly frozen":
        freeze_first_layers(model)
    out = model(x)
    out.backward(grad)
    mp.spawn(_uneven_worker, (difference, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    found = torch.cat([rank["result"] for rank in ranks])
    assert relative_error(found, out.detach()) < 1e-5
    for name, buffer in model.named_buffers():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert relative_error(ranks[0][name], buffer) < 1e-5, name
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in ranks[0]), name
        if p.grad is not None:
            assert relative_error(ranks[0][name], p.grad) < 1e-5, name


def _stem_worker(rank: int, folder: Path) -> None:
    _join(rank, folder)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(_network())
    x = torch.randn(4, 3, 32, 32, generator=generator())[rank * 2 : rank * 2 + 2]
    torch.save((model(x).detach(), model.bn1.running_var), folder / f"rank{rank}")
    dist.destroy_process_group()


def _network() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=7).train()


def test_a_whole_network_synchronises(tmp_path: Path) -> None:
    model = _network()
    expected = model(torch.randn(4, 3, 32, 32, generator=generator()))
    mp.spawn(_stem_worker, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    found = torch.cat([out for out, _ in ranks])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(ranks[0][1], ranks[1][1])
    torch.testing.assert_close(ranks[0][1], model.bn1.running_var)


def _parallel_worker(rank: int, device: str, folder: Path) -> None:
    _join(rank, folder, "nccl" if device == "cuda" else "gloo")
    place = torch.device(device, rank if device == "cuda" else None)
    model = _parallel_model(device).to(place)
    model = nn.parallel.DistributedDataParallel(model)
    x, grad = (t.to(place) for t in _data())
    part = slice(None, SPLIT) if rank == 0 else slice(SPLIT, None)
    with _training_ops(device):
        model(x[part]).backward(grad[part])
    torch.save({k: p.grad.cpu() for k, p in model.module.named_parameters()}, folder / f"{rank}")
    dist.destroy_process_group()


def _parallel_model(device: str) -> nn.Module:
    """Synchronised batch norm where DistributedDataParallel takes it, frozen elsewhere, because
    local statistics are not those of the joined batch."""
    if device == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(_model())
    model = freeze_batch_norm(_model()).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
    return model


def _training_ops(device: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if device == "cuda" else training_ops_in_pytorch()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_data_parallel_gradients_are_those_of_the_joined_batch(device: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs for NCCL")
    model = _parallel_model("cpu") if device == "cpu" else _model().cuda()
    x, grad = (t.to(device) for t in _data())
    with _training_ops(device):
        model(x).backward(grad)
    mp.spawn(_parallel_worker, (device, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}") for rank in range(2)]
    for key, parameter in model.named_parameters():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        # The processes' mean, of gradients of sums.
        assert relative_error(2 * ranks[0][key], parameter.grad.cpu()) < 1e-5, key
