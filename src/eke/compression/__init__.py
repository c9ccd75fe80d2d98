"""The main job: budget, candidates, plan, apply, recover, verify, artifact."""

from __future__ import annotations

from .artifact import load
from .budget import Budget
from .lessons import distillation
from .pipeline import compress
from .plan import Choice, InfeasibleError, Plan, Term, choose
from .recover import Recovery
from .result import Result
from .task import Task, accuracy, cross_entropy, forward

__all__ = [
    "Budget",
    "Choice",
    "InfeasibleError",
    "Plan",
    "Recovery",
    "Result",
    "Task",
    "Term",
    "accuracy",
    "choose",
    "compress",
    "cross_entropy",
    "distillation",
    "forward",
    "load",
]
