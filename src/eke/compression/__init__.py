"""The main job: budget, candidates, plan, apply, recover, verify, artifact."""

from __future__ import annotations

from .artifact import load
from .budget import Budget
from .lessons import distillation
from .overview import Option, Survey, survey
from .pipeline import compress, front
from .plan import Choice, InfeasibleError, Plan, Term, choose, choose_nested
from .recover import Recovery
from .result import Result
from .task import Task, accuracy, cross_entropy, forward

__all__ = [
    "Budget",
    "Choice",
    "InfeasibleError",
    "Option",
    "Plan",
    "Recovery",
    "Result",
    "Survey",
    "Task",
    "Term",
    "accuracy",
    "choose",
    "choose_nested",
    "compress",
    "cross_entropy",
    "distillation",
    "forward",
    "front",
    "load",
    "survey",
]
