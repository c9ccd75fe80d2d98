"""Training of unrolled networks, and the search for HyperLISTA's numbers.

`fit` trains a copy on problems with known answers, stage by stage; a stage trains the first layers on their own output.

    LayerWise   for k = 1 .. K: layer k alone; all k layers at `second` times the rate; at `third` times the rate. Rates
                of earlier layers fall by `decay` a layer. Loss: sum of squares. This is the schedule of the papers.
    Deepening   depths 2, 4, .. K, then all layers at falling rates. Loss: the error in decibels, which weighs a factor
                of two the same at every depth; thresholds move on a logarithmic scale. Many times faster.

Both use Adam and the package's one training loop.
Sources: Chen et al., 2018, and Liu et al., "ALISTA", 2019 (LayerWise); Deepening is ours.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..training import run
from .lista import Unrolled
from .operators import Operator, check_vector
from .problems import nmse_db

Network = TypeVar("Network", bound=Unrolled)
Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(x, truth)`: a scalar for a batch (batch, n)."""


def decibels(x: Tensor, truth: Tensor) -> Tensor:
    """Return 10 log10(sum |x - truth|^2 / sum |truth|^2), differentiable."""
    error = (x - truth).abs().square().sum()
    tiny = torch.finfo(error.dtype).tiny
    return 10 * torch.log10((error + tiny) / truth.abs().square().sum().clamp_min(tiny))


def squared_error(x: Tensor, truth: Tensor) -> Tensor:
    """Return the mean over samples of |x - truth|^2."""
    return (x - truth).abs().square().sum() / len(x)


@dataclass(frozen=True)
class Stage:
    """One part of a training.

    Args:
        depth: Layers that run.
        steps: Steps of Adam.
        rates: Learning rate of each trained layer, by its index.
        shared: Learning rate of parameters that all layers use.
        name: For progress.
    """

    depth: int
    steps: int
    rates: dict[int, float]
    shared: float
    name: str


class Schedule(Protocol):
    """What says which layers are trained when."""

    @property
    def loss(self) -> Loss:
        """What is minimised."""

    def stages(self, layers: int) -> Sequence[Stage]:
        """Return the stages for a network of so many layers."""


@dataclass(frozen=True)
class LayerWise:
    """The papers' schedule: three stages for each layer.

    Args:
        steps: Steps of one stage; the papers wait for a plateau, which takes thousands.
        rate: Of Adam in first stages.
        second: Factor of the rate in second stages.
        third: Factor of the rate in third stages.
        decay: Factor of an earlier layer's rate, for every layer between.
        loss: What is minimised.
    """

    steps: int = 50
    rate: float = 5e-4
    second: float = 0.2
    third: float = 0.02
    decay: float = 0.3
    loss: Loss = squared_error

    def stages(self, layers: int) -> list[Stage]:
        """Return the three stages of each layer."""
        found = []
        for k in range(layers):
            depth, rate = k + 1, self.rate
            found.append(Stage(depth, self.steps, {k: rate}, rate, f"layer {depth}, alone"))
            for factor, name in ((self.second, "all"), (self.third, "all, slowly")):
                rates = {i: rate * factor * self.decay ** (k - i) for i in range(depth)}
                found.append(Stage(depth, self.steps, rates, rate * factor, f"layer {depth}, {name}"))
        return found


@dataclass(frozen=True)
class Deepening:
    """The faster schedule: more and more layers, all trained.

    Args:
        every: Layers added at once.
        steps: Steps at each depth.
        rate: Of Adam while the network grows.
        last: (steps, rate) of what follows at full depth.
        loss: What is minimised.
    """

    every: int = 2
    steps: int = 60
    rate: float = 0.03
    last: Sequence[tuple[int, float]] = ((150, 0.01), (100, 0.002))
    loss: Loss = decibels

    def stages(self, layers: int) -> list[Stage]:
        """Return a stage for each depth and those at full depth."""
        depths = [*range(self.every, layers, self.every), layers]
        plan = [(depth, self.steps, self.rate) for depth in depths] + [(layers, *rest) for rest in self.last]
        return [Stage(d, s, dict.fromkeys(range(d), r), r, f"{d} layers, rate {r:g}") for d, s, r in plan]


@dataclass(frozen=True)
class Training:
    """What a callback hears after each step.

    Args:
        stage: Name of the stage.
        step: Steps done in all, from 1.
        total: Steps in all.
        loss: Of this step.
    """

    stage: str
    step: int
    total: int
    loss: float


@dataclass(frozen=True)
class Fit(Generic[Network]):
    """A trained network.

    Args:
        solver: The network; what was given is unchanged.
        losses: Of every step.
        seconds: Of the training.
        nmse_db: Error after each layer on the problems held out, or on the first training problems without any.
    """

    solver: Network
    losses: list[float]
    seconds: float
    nmse_db: list[float] = field(default_factory=list)


def fit(
    solver: Network,
    x: Tensor,
    b: Tensor,
    *,
    schedule: Schedule | None = None,
    batch_size: int = 128,
    held_out: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    callback: Callable[[Training], None] | None = None,
) -> Fit[Network]:
    """Train a copy of an unrolled network on problems with known answers.

    Args:
        solver: The network.
        x: Answers, (samples, n).
        b: Right-hand sides, (samples, m).
        schedule: Which layers are trained when; None for `Deepening()`.
        batch_size: Samples a step.
        held_out: (x, b) on which the result is measured.
        seed: Of the order of the samples.
        callback: Called after each step.

    Returns:
        The trained network and how it went.

    Raises:
        TypeError: if the solver has no layers to train.
    """
    if not isinstance(solver, Unrolled):
        raise TypeError(f"fit trains LISTA and its kin, got {type(solver).__name__}. HyperLISTA has tune_hyperlista.")
    check_pairs(solver.operator, x, b)
    plan = Deepening() if schedule is None else schedule
    start = time.perf_counter()
    trained = copy.deepcopy(solver)
    stages = plan.stages(trained.iterations)
    total = sum(stage.steps for stage in stages)
    losses: list[float] = []
    for stage in stages:
        done = len(losses)
        step = _step(trained, stage, x, b, plan.loss)

        def after(index: int, loss: float, name: str = stage.name) -> None:
            if callback is not None:
                callback(Training(name, index + 1, total, loss))

        end = done + stage.steps
        losses += run(step, samples=len(b), batch_size=batch_size, steps=end, start=done, seed=seed, after=after)
    seconds = time.perf_counter() - start
    truth, seen = held_out if held_out is not None else (x[:batch_size], b[:batch_size])
    with torch.no_grad():
        errors = [nmse_db(out, truth) for out in trained.trajectory(seen)]
    for parameter in trained.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return Fit(trained, losses, seconds, errors)


def _step(trained: Unrolled, stage: Stage, x: Tensor, b: Tensor, loss: Loss) -> Callable[[int, Tensor], float]:
    """Return what trains the layers of a stage once."""
    network = trained.prefix(stage.depth)
    groups = [{"params": trained.parameters_of(k), "lr": rate} for k, rate in stage.rates.items()]
    groups.append({"params": trained.shared_parameters(), "lr": stage.shared})
    groups = [group for group in groups if group["params"]]
    chosen = {id(parameter) for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
    for parameter in trained.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    optimizer = torch.optim.Adam(groups)

    def step(index: int, samples: Tensor) -> float:
        del index
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            error = loss(network(b[samples]), x[samples])
        error.backward()  # type: ignore[no-untyped-call]
        for parameter in trained.parameters():
            if parameter.grad is not None:
                # Adam cannot read gradients whose conjugation is still to be done
                parameter.grad = parameter.grad.resolve_conj()
        optimizer.step()
        return float(error.detach())

    return step


def check_pairs(operator: Operator, x: Tensor, b: Tensor) -> None:
    """Check problems with known answers.

    Args:
        operator: A, one for all of them.
        x: Answers.
        b: Right-hand sides.

    Raises:
        ValueError: if they do not fit, there are none, or every sample has an A of its own.
    """
    if operator.batch is not None:
        raise ValueError(f"Training needs one A for all samples, got one for each of {operator.batch}.")
    check_vector(operator, b, "b")
    check_vector(operator, x, "x")
    if len(x) != len(b):
        raise ValueError(f"x has {len(x)} samples and b {len(b)}.")
