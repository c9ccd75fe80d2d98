"""What a model costs: operations, seconds, bytes in memory and on disk; measured, never guessed."""

from __future__ import annotations

from .environment import Environment, environment
from .files import read_tensors, write_bytes, write_tensors
from .flops import flops, flops_by_module, register_flops
from .latency import (
    FASTER_ABOVE,
    Latency,
    LatencyComparison,
    compare_latency,
    fewest_pairs,
    interleave,
    latency,
    paired_ratio,
    pinned_threads,
)
from .memory import give_back, peak_memory
from .module_times import module_times
from .storage import model_bytes, parameters, stored_bytes

__all__ = [
    "FASTER_ABOVE",
    "Environment",
    "Latency",
    "LatencyComparison",
    "compare_latency",
    "environment",
    "fewest_pairs",
    "flops",
    "flops_by_module",
    "give_back",
    "interleave",
    "latency",
    "model_bytes",
    "module_times",
    "paired_ratio",
    "parameters",
    "peak_memory",
    "pinned_threads",
    "read_tensors",
    "register_flops",
    "stored_bytes",
    "write_bytes",
    "write_tensors",
]
