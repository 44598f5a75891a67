"""What the experiments share: data, training, schedules, processes, reports."""

import sys
from pathlib import Path

# Where `harness` is, which is the benchmarks' too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
