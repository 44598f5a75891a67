"""Images per second of int8 networks, ours beside every peer's, on a CPU: throughput.py's race.

    python benchmarks/quantised_throughput.py --batch 1 8 --json out.json

Takes throughput.py's options. Weights and images are float32, of which each contestant makes its
own int8 network, calibrated on the images themselves; logits are held against float64 with
the bound of `baselines/quantised.py`. Our bfloat16 network stands beside them.
"""

from __future__ import annotations

import sys

from baselines.quantised import BASELINES
from throughput import main

if __name__ == "__main__":
    sys.exit(main(["--device", "cpu", "--dtype", "float32", *sys.argv[1:]], BASELINES))
