"""Fine-tunes a network on a folder with a folder of images for each class.

    python examples/finetune.py --data FLOWERS --out flowers.pth

The classifier is replaced. Batch norm keeps the statistics of ImageNet, which a few images would
only blur: `freeze_batch_norm` holds through `.train()`. `--out` can be given to
`resnet-fused classify --weights` and to torchvision alike.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import resnet_fused

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name, or a file")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.size, scale=(0.5, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    data = ImageFolder(options.data, augment)
    batches = DataLoader(data, options.batch, shuffle=True, num_workers=options.workers)

    model = getattr(resnet_fused, options.arch)(weights=options.weights)
    model.fc = nn.Linear(model.fc.in_features, len(data.classes))
    model = resnet_fused.freeze_batch_norm(model).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), options.learning_rate, momentum=0.9)
    for epoch in range(options.epochs):
        hits, total = 0, 0.0
        for images, classes in batches:
            images, classes = images.to(device), classes.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hits += int((logits.argmax(1) == classes).sum())
            total += loss.item() * len(images)
        print(f"epoch {epoch + 1}: loss {total / len(data):.3f}, right {hits / len(data):.1%}")
    torch.save(model.state_dict(), options.out)


if __name__ == "__main__":
    main()
