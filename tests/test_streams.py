"""Streams: the ordinary results, in order, on shared weights; failures reach the caller."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import Bottleneck, ResNet, _extension, freeze, throughput
from resnet_fused.backends import get
from resnet_fused.ops.dispatch import chosen_backend
from resnet_fused.testing.cases import randomise_statistics


def make() -> Any:
    torch.manual_seed(0)
    return randomise_statistics(ResNet(Bottleneck, [1, 1, 1, 1], 10)).eval()


def batches(count: int, size: int = 40) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(1 + i % 2, 3, size, size) for i in range(count)]


class Waiting(nn.Module):
    """Says how many forwards run at a time, and on how many threads."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.threads: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.threads.add(torch.get_num_threads())
        time.sleep(0.02)
        with self.lock:
            self.running -= 1
        if x.numel() == 0:
            raise ZeroDivisionError("an empty batch")
        return x + 1


@pytest.mark.parametrize(("streams", "frozen"), [(1, True), (3, False), (4, True)])
def test_results_are_the_ordinary_forwards_in_order(streams: int, frozen: bool) -> None:
    model: Any = make()
    model = freeze(model) if frozen else model
    inputs = batches(8)
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
    with throughput(model, streams) as scorer:
        for _ in range(2):  # by the ordinary path, then by plans
            results = list(scorer.map(inputs))
            assert len(results) == len(expected)
            for found, wanted in zip(results, expected, strict=True):
                assert torch.equal(found, wanted)
                assert not found.requires_grad


def test_an_edit_between_batches_is_seen_by_every_stream() -> None:
    model = make()
    inputs = batches(8)
    with throughput(model, 3) as scorer:
        for _ in range(3):
            list(scorer.map(inputs))
        model.layer1[0].conv1.weight.data.mul_(2)
        with torch.inference_mode():
            expected = [model(x) for x in inputs]
        for found, wanted in zip(scorer.map(inputs), expected, strict=True):
            assert torch.equal(found, wanted)


def test_as_many_forwards_at_a_time_as_streams_of_one_thread_each() -> None:
    before = torch.get_num_threads()
    model = Waiting().eval()
    with throughput(model, 3) as scorer:
        list(scorer.map(torch.ones(12, 1)))
    assert model.most == 3
    assert model.threads == {1}
    assert torch.get_num_threads() == before
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before], "threads that start later are not affected"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="this system does not tell")
def test_no_thread_beside_the_streams_and_one_copy_of_the_weights() -> None:
    if reason := _extension.available():
        pytest.skip(reason)
    model = freeze(make())
    inputs = batches(8)
    with torch.inference_mode():
        for x in inputs:
            model(x)
    packed = _packed_bytes(model)
    assert packed > 0
    before = len(os.listdir("/proc/self/task"))
    with throughput(model, 4) as scorer:
        for _ in range(3):
            list(scorer.map(inputs))
        assert len(os.listdir("/proc/self/task")) <= before + 4
        assert _packed_bytes(model) == packed


def _packed_bytes(model: nn.Module) -> int:
    slots = get("cpu")._convolutions._slots  # type: ignore[attr-defined]
    memory = {id(p.untyped_storage()) for p in model.parameters()}
    own = [slots[key] for key in memory & slots.keys()]
    return sum(packed.packed.numel() for slot in own for _, packed in slot.packed.values())


def test_map_takes_few_batches_ahead() -> None:
    taken: list[int] = []

    def source() -> Iterator[Tensor]:
        for i in range(100):
            taken.append(i)
            yield torch.ones(1)

    with throughput(nn.ReLU().eval(), 2) as scorer:
        results = scorer.map(source())
        next(results)
        assert len(taken) <= 4
        results.close()  # type: ignore[attr-defined]
        assert len(taken) <= 4


def test_what_a_forward_raises_comes_in_its_turn() -> None:
    with throughput(Waiting().eval(), 2) as scorer:
        results = scorer.map([torch.ones(1), torch.ones(0), torch.ones(1)])
        assert torch.equal(next(results), torch.full((1,), 2.0))
        with pytest.raises(ZeroDivisionError, match="an empty batch"):
            next(results)
        assert torch.equal(scorer.submit(torch.ones(1)).result(), torch.full((1,), 2.0))


def test_the_chosen_backend_holds_in_the_streams() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> str:
            backend = chosen_backend()
            return "none" if backend is None else backend.name

    with resnet_fused.use_backend("reference"), throughput(Chosen().eval(), 2) as scorer:
        assert list(scorer.map(torch.ones(4, 1))) == ["reference"] * 4


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="model must be a module, found function"):
        throughput(make)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\)"):
        throughput(make().train())
    with pytest.raises(ValueError, match=r"found weight on meta"):
        throughput(nn.Linear(1, 1, device="meta").eval())
    with pytest.raises(ValueError, match="at least 1, found 0"):
        throughput(nn.ReLU().eval(), 0)
    scorer = throughput(nn.ReLU().eval(), 1)
    with pytest.raises(TypeError, match="batch must be a tensor, found list"):
        scorer.submit([1])  # type: ignore[arg-type]
    scorer.close()
    with pytest.raises(RuntimeError, match="closed"):
        scorer.submit(torch.ones(1))
