"""The main job: budget, candidates, plan, apply, recover, verify, artifact."""

from __future__ import annotations

from .._types import Metric, Samples
from .artifact import load
from .attentions import Clusters, Conversion
from .budget import Budget
from .dense import dense_cross_entropy, mean_iou, pixel_accuracy
from .lessons import distillation
from .metrics import top_k_accuracy
from .overview import Option, Survey, survey
from .pipeline import compress, front
from .plan import Choice, InfeasibleError, Plan, Term, choose, choose_nested
from .recover import Recovery
from .regression import mean_absolute_error, mean_squared_error, r_squared, squared_loss
from .result import Result
from .retrieval import contrastive_loss, embedding_of, mean_reciprocal_rank, recall_at
from .spread import interval, paired_difference
from .task import Task, accuracy, cross_entropy, forward
from .tokens import causal_cross_entropy, perplexity, token_accuracy, token_cross_entropy

__all__ = [
    "Budget",
    "Choice",
    "Clusters",
    "Conversion",
    "InfeasibleError",
    "Metric",
    "Option",
    "Plan",
    "Recovery",
    "Result",
    "Samples",
    "Survey",
    "Task",
    "Term",
    "accuracy",
    "causal_cross_entropy",
    "choose",
    "choose_nested",
    "compress",
    "contrastive_loss",
    "cross_entropy",
    "dense_cross_entropy",
    "distillation",
    "embedding_of",
    "forward",
    "front",
    "interval",
    "load",
    "mean_absolute_error",
    "mean_iou",
    "mean_reciprocal_rank",
    "mean_squared_error",
    "paired_difference",
    "perplexity",
    "pixel_accuracy",
    "r_squared",
    "recall_at",
    "squared_loss",
    "survey",
    "token_accuracy",
    "token_cross_entropy",
    "top_k_accuracy",
]
