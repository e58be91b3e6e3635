"""Probes: synthetic tasks that show what an architecture can and cannot do, in a minute each."""

from scratchlm.evaluate.probes.tasks import Copying, Induction, ModularAddition, ProbeBatch, Recall, Task
from scratchlm.evaluate.probes.training import LengthResult, ProbeResult, probe

__all__ = [
    "Copying",
    "Induction",
    "LengthResult",
    "ModularAddition",
    "ProbeBatch",
    "ProbeResult",
    "Recall",
    "Task",
    "probe",
]
