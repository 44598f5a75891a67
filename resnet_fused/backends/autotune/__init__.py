"""Which kernel computes a call: `choose`, and what decides it."""

from . import families
from .signature import Operand, batch_bucket, describe, signature
from .tuner import BUDGET_SECONDS, Decision, NotListedError, Tuner

tuner = Tuner()
families.verdicts.listeners.append(tuner.forget)
choose = tuner.choose


def generation() -> int:
    """A number that is another one where equal calls may be computed otherwise than before."""
    return tuner.generation


__all__ = [
    "BUDGET_SECONDS",
    "Decision",
    "NotListedError",
    "Operand",
    "Tuner",
    "batch_bucket",
    "choose",
    "describe",
    "generation",
    "signature",
    "tuner",
]
