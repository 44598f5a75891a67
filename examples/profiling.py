"""Where a network's time and memory go.

    python examples/profiling.py --arch resnet50 --batch 8 --trace trace.json

Prints what PyTorch's profiler saw, in which fused ops have names of their own (`resnet_fused::`);
the FLOPs of an image; and the bytes that a training step saves for backward.
`trace.json` opens in https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--trace", help="a file for the time line")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = getattr(resnet_fused, options.arch)().eval().to(device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.inference_mode():
        for _ in range(2):  # the first call packs weights and chooses kernels
            model(images)
        with profile(activities=activities) as seen:
            model(images)
        with FlopCounterMode(display=False) as flops:
            model(images)
    print(seen.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=12))
    if options.trace:
        seen.export_chrome_trace(options.trace)
    print(f"{flops.get_total_flops() / options.batch / 1e9:.2f} GFLOP an image")
    kept = resnet_fused.kept_activation_bytes(model.train(), images)
    print(f"{kept.total / options.batch / 2**20:.1f} MiB saved for backward an image")


if __name__ == "__main__":
    main()
