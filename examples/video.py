"""Labels the frames of a stream as they come, in batches, with bounded memory and delay.

    python examples/video.py --frames 200

A thread reads and prepares frames while the network works on those before. The queue between them
is short: a source that is faster than the network waits, and nothing piles up. The frames are drawn
here; a camera or a decoder takes the place of `frames`.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchvision.models import get_model_weights

import resnet_fused


def frames(count: int, height: int = 360, width: int = 640) -> Iterator[Tensor]:
    """A bright square that crosses the picture: (3, height, width) uint8."""
    for number in range(count):
        frame = torch.full((3, height, width), 40, dtype=torch.uint8)
        left = number * 8 % (width - 80)
        frame[:, 120:200, left : left + 80] = 220
        yield frame


def batches(
    source: Iterator[Tensor], prepare: Callable[[Tensor], Tensor], size: int
) -> Iterator[Tensor]:
    """Batches of up to `size` prepared frames, read ahead by one batch in a thread of its own."""
    ready: queue.Queue[Tensor | None] = queue.Queue(maxsize=1)

    def read() -> None:
        held: list[Tensor] = []
        for frame in source:
            held.append(prepare(frame))
            if len(held) == size:
                ready.put(torch.stack(held))
                held = []
        if held:
            ready.put(torch.stack(held))
        ready.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (batch := ready.get()) is not None:
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name, or a file")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()

    recipe = get_model_weights(options.arch).DEFAULT
    labels = recipe.meta["categories"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = getattr(resnet_fused, options.arch)
    model = network(weights=options.weights, num_classes=len(labels)).eval().to(device)
    seen, last, start = 0, None, time.perf_counter()
    with torch.inference_mode():
        for batch in batches(frames(options.frames), recipe.transforms(), options.batch):
            for index in model(batch.to(device)).argmax(1).tolist():
                if index != last:
                    print(f"frame {seen}: {labels[index]}")
                seen, last = seen + 1, index
    print(f"{seen} frames, {seen / (time.perf_counter() - start):.1f} a second")


if __name__ == "__main__":
    main()
