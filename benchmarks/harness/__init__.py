"""What the benchmarks and experiments share: inputs, measuring, workers, results, comparisons."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout runs uninstalled too
