"""Labels any number of images on a Ray cluster, with Ray Data.

    python examples/batch_scoring.py --images PHOTOS --out predictions --workers 2
    python examples/batch_scoring.py --images s3://bucket/photos --out s3://bucket/predictions ...

Tasks read and prepare images on whatever core is free, while `--workers` processes hold a network
each and score batches. When one of them dies Ray starts another and gives it the batch that was
lost. On a cluster that runs already, set RAY_ADDRESS; a GPU for each network: `--gpus 1`.
"""

from __future__ import annotations

import argparse
import io
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from torchvision.models import get_model_weights

import resnet_fused

Batch = dict[str, Any]


class Scorer:
    """A network in a process of its own."""

    def __init__(self, arch: str, weights: str) -> None:
        self.labels = get_model_weights(arch).DEFAULT.meta["categories"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = getattr(resnet_fused, arch)
        self.model = network(weights=weights, num_classes=len(self.labels)).eval().to(self.device)

    def __call__(self, batch: Batch) -> Batch:
        """path (N), image (N, 3, H, W) float32 -> path, label, probability."""
        with torch.inference_mode():
            images = torch.from_numpy(batch["image"]).to(self.device)
            best, indices = self.model(images).float().softmax(1).max(1)
        labels = np.array([self.labels[index] for index in indices.tolist()])
        return {"path": batch["path"], "label": labels, "probability": best.cpu().numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True)
    parser.add_argument("--out", required=True, help="a folder for CSV files")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name, or a file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()

    prepare = get_model_weights(options.arch).DEFAULT.transforms()

    def read(row: Batch) -> Batch:
        image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
        return {"path": row["path"], "image": prepare(image).numpy()}

    ray.init(include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.read_binary_files(options.images, include_paths=True).map(read).map_batches(
        Scorer,
        fn_constructor_args=(options.arch, options.weights),
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_cpus=0.5,  # reading needs cores too, where workers are as many as these
        num_gpus=options.gpus,
    ).write_csv(options.out)


if __name__ == "__main__":
    main()
