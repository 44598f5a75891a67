"""The likeliest classes of photographs.

    python examples/classify.py photo.jpg other.jpg
    python examples/classify.py photo.jpg --arch resnet18 --weights resnet18-f37072fd.pth

`resnet-fused classify` does the same for folders of any size; this is what it takes in a program.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from torchvision.models import get_model_weights

import resnet_fused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name, or a file")
    options = parser.parse_args()

    recipe = get_model_weights(options.arch).DEFAULT
    prepare, labels = recipe.transforms(), recipe.meta["categories"]
    network = getattr(resnet_fused, options.arch)
    model = network(weights=options.weights, num_classes=len(labels)).eval()

    images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in options.images])
    with torch.inference_mode():
        probabilities = model(images).softmax(1)
    for path, row in zip(options.images, probabilities, strict=True):
        best = zip(*(part.tolist() for part in row.topk(5)), strict=True)
        print(f"{path}: " + ", ".join(f"{labels[index]} {p:.1%}" for p, index in best))


if __name__ == "__main__":
    main()
