"""Several forwards of one network at a time, each on one core: batch scoring on a CPU."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .ops.checks import check_is_module


class Throughput:
    """What `resnet_fused.throughput` makes: threads of one core each, which share a network.

    Attributes:
        streams: how many batches are computed at a time.
    """

    def __init__(self, model: nn.Module, streams: int) -> None:
        self.streams = streams
        self._model = model
        # Whose `use_backend` was in force; each forward runs in a copy of its own.
        self._context = contextvars.copy_context()
        started = threading.Barrier(streams + 1)
        self._pool = ThreadPoolExecutor(
            streams, "resnet_fused.throughput", initializer=_take_one_core, initargs=(started,)
        )
        threads = torch.get_num_threads()
        for _ in range(streams):
            self._pool.submit(int)  # starts a thread, which waits for the others
        started.wait()
        # PyTorch gives later threads the number that was set last, by whatever thread.
        torch.set_num_threads(threads)

    def submit(self, batch: Tensor) -> Future[Any]:
        """The network's result for `batch`, to come; it raises what the forward raised.

        Batches wait in line without a bound; `map` holds few at a time. Raises TypeError for what
        is no tensor, and RuntimeError once it is closed.
        """
        if not isinstance(batch, Tensor):
            raise TypeError(f"batch must be a tensor, found {type(batch).__qualname__}.")
        context = self._context.copy()
        try:
            return self._pool.submit(context.run, _forward, self._model, batch)
        except RuntimeError:
            raise RuntimeError(
                "these streams are closed; call resnet_fused.throughput again."
            ) from None

    def map(self, batches: Iterable[Tensor]) -> Iterator[Any]:
        """The network's results for the batches, in their order.

        It takes batches as results are asked for, and holds at most twice as many as there are
        streams, so each needs memory of its own until its turn. What a forward, or the iterable,
        raises, it raises in that batch's turn; batches that wait are then dropped.
        """
        waiting: deque[Future[Any]] = deque()
        try:
            for batch in batches:
                waiting.append(self.submit(batch))
                if len(waiting) == 2 * self.streams:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Ends the threads once the batches that were submitted are done."""
        self._pool.shutdown()

    def __enter__(self) -> Throughput:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)


def _take_one_core(started: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first call sets the process's number, over this one's own
    torch.set_num_threads(1)
    started.wait()


def _forward(model: nn.Module, batch: Tensor) -> Any:
    with torch.inference_mode():
        return model(batch)


def throughput(model: nn.Module, streams: int | None = None) -> Throughput:
    """Streams that compute batches side by side, each on one core, with the weights of one network.

    Cores that share a forward wait for one another at every layer. For many images whose latency
    does not matter it is faster to give each core a batch of its own:

        with resnet_fused.throughput(resnet_fused.freeze(model)) as scorer:
            for logits in scorer.map(batches):
                ...

    Results are the model's own, without gradients; their bits do not depend on the stream. The
    model is not copied: its parameters and their packed forms exist once, each stream has memory
    for the activations of one batch, and hooks run in its thread. Forwards run under
    `inference_mode`, outside of autocast, on the backend that `use_backend` has chosen here.

    Args:
        model: a network of this package, or any module, in eval mode and in main memory.
        streams: batches at a time; as many as PyTorch uses threads (`torch.get_num_threads()`).

    Raises TypeError for what is no module, and ValueError for one in training mode or on another
    device, and for less than one stream.
    """
    check_is_module(model)
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() first.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"streams are for models in main memory, found {name} on {tensor.device}; on a "
                "GPU, larger batches do the same."
            )
    if streams is None:
        streams = torch.get_num_threads()
    if streams < 1:
        raise ValueError(f"streams must be at least 1, found {streams}.")
    return Throughput(model, streams)
