"""What an architecture may cost: FLOPs and parameters from closed forms, latency and memory measured.

The cheap limits are looked at first; a network is only built, and then measured, when it keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import cost
from .spaces.space import Space
from .subject import built

COSTS = {
    "flops": "FLOPs",
    "parameters": "parameters",
    "latency_seconds": "seconds",
    "memory_bytes": "bytes at the peak",
}
"""Costs by name, and what they are counted in."""


@dataclass(frozen=True)
class Limits:
    """Upper limits; None does not limit.

    Args:
        flops: Of one sample, 2 a multiply-add.
        parameters: Number of parameters.
        latency_seconds: Median seconds of one call in eval mode, measured here.
        memory_bytes: Peak of weights and activations of one call, counted on the built network.
        batch: Samples a call for latency and memory.
        threads: Of torch for the latency.

    Raises:
        ValueError: if a limit is not positive, or batch or threads are less than 1.
    """

    flops: float | None = None
    parameters: float | None = None
    latency_seconds: float | None = None
    memory_bytes: float | None = None
    batch: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        given = asdict(self)
        if any(value is not None and not value > 0 for value in given.values()):
            raise ValueError(f"Limits must be positive, got {given}.")

    @property
    def limited(self) -> dict[str, float]:
        """The limits that are given, by name."""
        return {name: getattr(self, name) for name in COSTS if getattr(self, name) is not None}

    def closed(self, space: Space, architecture: Any) -> dict[str, float]:
        """Return FLOPs and parameters of an architecture."""
        return {"flops": space.flops(architecture), "parameters": space.parameters(architecture)}

    def measured(self, space: Space, architecture: Any) -> dict[str, float]:
        """Return latency and memory where they are limited; builds the network."""
        wanted = [name for name in ("latency_seconds", "memory_bytes") if name in self.limited]
        if not wanted:
            return {}
        model, example = built(lambda: space.decode(architecture), 0).eval(), space.example(self.batch)
        found: dict[str, float] = {}
        if "memory_bytes" in wanted:
            found["memory_bytes"] = cost.peak_memory(model, example)
        if "latency_seconds" in wanted:
            found["latency_seconds"] = seconds(model, example, threads=self.threads)
        return found

    def excess(self, costs: Mapping[str, float]) -> float:
        """Return by how much costs exceed the limits: the sum of (cost / limit - 1) over those that are not kept."""
        over = (costs[name] / limit - 1 for name, limit in self.limited.items() if name in costs)
        return sum(share for share in over if share > 0)

    def told(self, costs: Mapping[str, float]) -> str:
        """Return costs beside the limits, in words."""
        return ", ".join(
            f"{costs[name]:.6g} {COSTS[name]} (limit {limit:.6g})"
            for name, limit in self.limited.items()
            if name in costs
        )


def seconds(model: Any, example: Any, *, threads: int) -> float:
    """Return the median seconds of one call of a network in eval mode, without gradients.

    Args:
        model: A module.
        example: Its input.
        threads: Of torch.

    Returns:
        Seconds.
    """
    import torch

    with torch.inference_mode():
        return cost.latency(lambda: model(example), threads=threads, seconds=0.2).median
