"""What the experiments share: data, training, schedules, processes, reports."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout runs uninstalled too
