"""Plans: what a network runs for an input of some kind, recorded once and replayed by one call.

A plan is derived from the ordinary forward, never written down: while that runs once more, the
extension records the launches of its kernels (`record.py`), and what of the network was nothing but
launches is replayed over one piece of memory. It is used for as long as nobody could tell
(`validity.py`); anything else takes the ordinary path, and a new plan is recorded after it
(`store.py`). In training the blocks of a stage have one (`training.py`).
"""

from .graphs import graphed, graphed_step
from .record import Part, part, shadows
from .store import Plans, run
from .training import TrainingPlans, train

__all__ = [
    "Part",
    "Plans",
    "TrainingPlans",
    "graphed",
    "graphed_step",
    "part",
    "run",
    "shadows",
    "train",
]
