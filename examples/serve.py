"""Serves a network over HTTP, answering requests that wait together in one batch.

    python examples/serve.py --port 8000
    curl --data-binary @photo.jpg http://localhost:8000

The answer is JSON: the five likeliest classes and their probabilities; 400 for what is no image,
500 where the network failed.
Standard library only; a copy of this file is a start. It has no authentication and no encryption.
"""

from __future__ import annotations

import argparse
import io
import json
import queue
import threading
import urllib.request
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.models import get_model_weights

import resnet_fused

Answer = list[dict[str, Any]]


class Batcher(threading.Thread):
    """A thread that runs the network on all images that wait, up to `largest` at once."""

    def __init__(self, arch: str, weights: str, largest: int) -> None:
        super().__init__(daemon=True)
        recipe = get_model_weights(arch).DEFAULT
        self.prepare, self.labels = recipe.transforms(), recipe.meta["categories"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = getattr(resnet_fused, arch)
        self.model = network(weights=weights, num_classes=len(self.labels)).eval().to(self.device)
        self.largest = largest
        self.waiting: queue.Queue[tuple[Tensor, Future[Answer]]] = queue.Queue(4 * largest)
        self.start()

    def ask(self, body: bytes) -> Answer:
        """The likeliest classes of an image file. UnidentifiedImageError for what is none."""
        try:
            image = Image.open(io.BytesIO(body)).convert("RGB")
        except Exception as error:  # a damaged file makes Pillow raise anything, even TypeError
            raise UnidentifiedImageError(f"this is no image: {error}") from error
        answer: Future[Answer] = Future()
        self.waiting.put((self.prepare(image), answer))
        return answer.result()

    def run(self) -> None:
        while True:
            taken = [self.waiting.get()]
            while len(taken) < self.largest and not self.waiting.empty():
                taken.append(self.waiting.get())
            try:
                found = self._classify(torch.stack([image for image, _ in taken]))
            except Exception as error:  # those who ask shall hear of it, and the thread goes on
                for _, answer in taken:
                    answer.set_exception(error)
            else:
                for (_, answer), classes in zip(taken, found, strict=True):
                    answer.set_result(classes)

    @torch.inference_mode()
    def _classify(self, images: Tensor) -> list[Answer]:
        best = self.model(images.to(self.device)).float().softmax(1).topk(5)
        return [
            [{"label": self.labels[i], "probability": p} for p, i in zip(*row, strict=True)]
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def server(batcher: Batcher, port: int) -> ThreadingHTTPServer:
    """A server on localhost; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, answer = 200, json.dumps(batcher.ask(body))
            except UnidentifiedImageError as error:
                status, answer = 400, json.dumps({"error": str(error)})
            except Exception as error:
                status, answer = 500, json.dumps({"error": str(error)})
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(answer.encode())

    return ThreadingHTTPServer(("localhost", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name, or a file")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--largest-batch", type=int, default=32)
    parser.add_argument("--once", type=Path, help="send this image, print the answer and end")
    options = parser.parse_args()

    with server(
        Batcher(options.arch, options.weights, options.largest_batch), options.port
    ) as http:
        address = f"http://localhost:{http.server_address[1]}"
        print(f"listening at {address}", flush=True)
        if not options.once:
            http.serve_forever()
        threading.Thread(target=http.serve_forever, daemon=True).start()
        with urllib.request.urlopen(address, options.once.read_bytes()) as answer:
            print(answer.read().decode())
        http.shutdown()


if __name__ == "__main__":
    main()
