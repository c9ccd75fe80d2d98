"""Large images by a few of their patches: unbiased estimates, layers, and sources that stay on disk."""

from __future__ import annotations

from .estimators import draw, entropy_penalty, expectation
from .images import ImageSource, NumpyImage, TiffImage, small_view
from .layer import AttentionSampling, Sampled
from .patches import corners, gather
from .pictures import heat_map, save_png
from .selection import CrossAttentionPool, IterativePatchSelection, PerturbedTopK, perturbed_topk

__all__ = [
    "AttentionSampling",
    "CrossAttentionPool",
    "ImageSource",
    "IterativePatchSelection",
    "NumpyImage",
    "PerturbedTopK",
    "Sampled",
    "TiffImage",
    "corners",
    "draw",
    "entropy_penalty",
    "expectation",
    "gather",
    "heat_map",
    "perturbed_topk",
    "save_png",
    "small_view",
]
