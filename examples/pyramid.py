"""A feature pyramid on a fused ResNet, and a detector of torchvision's on it.

    python examples/pyramid.py

`model.features(x)` gives the results of the four stages, stem and blocks fused. A detector is
trained as torchvision's are; here it only runs, with random weights unless some are given.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import resnet_fused


class Pyramid(nn.Module):
    """Images (N, 3, H, W) -> maps (N, channels, H/s, W/s) for s = 4, 8, 16, 32, 64."""

    def __init__(self, network: resnet_fused.ResNet, channels: int = 256) -> None:
        super().__init__()
        assert isinstance(network.fc, nn.Linear)
        widths = [network.fc.in_features >> halvings for halvings in (3, 2, 1, 0)]
        network.fc = nn.Identity()
        resnet_fused.freeze_batch_norm(network)
        self.network = network
        self.pyramid = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())
        self.out_channels = channels  # torchvision's detectors ask for it

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        stages = self.network.features(x)
        return self.pyramid(OrderedDict((str(i), stage) for i, stage in enumerate(stages)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--weights", help="torchvision's name, or a file")
    parser.add_argument("--size", type=int, default=320)
    options = parser.parse_args()

    backbone = Pyramid(getattr(resnet_fused, options.arch)(weights=options.weights))
    image = torch.rand(3, options.size, options.size)
    with torch.inference_mode():
        for name, level in backbone.eval()(image[None]).items():
            print(f"level {name}: {tuple(level.shape)}")
        detector = FasterRCNN(
            backbone, num_classes=91, min_size=options.size, rpn_post_nms_top_n_test=50
        )
        (found,) = detector.eval()([image])
    print(f"{len(found['boxes'])} boxes")


if __name__ == "__main__":
    main()
