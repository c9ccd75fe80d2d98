"""Recovery: a fixed, seeded number of steps in which the cut model learns to answer as the original does.

AdamW with a linear warm-up and a cosine decay; in the last part the weights pass through their grids with
straight-through gradients, so that the model meets its own rounding before it is packed. The state is a function of the
step alone (orders are drawn from the seed and the epoch), and checkpoints hold all of it: a run that is killed and
continued ends bit for bit where an uninterrupted one ends.
"""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..sites import Site
from ..structures import Structure, straight_through
from ..training import run
from .checkpoint import read_tensors, write_tensors
from .lessons import Lessons, distillation
from .task import Forward

Match = Callable[[Any, Any], Tensor]
"""`match(student_outputs, teacher_outputs)`: what recovery minimises, a scalar tensor."""


@dataclass(frozen=True)
class Recovery:
    """How to recover.

    Args:
        steps: Number of steps; 0 leaves the model as the cut left it.
        batch_size: Samples a step.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay.
        warmup: Share of the steps with rising learning rate.
        grid_from: Share of the steps after which weights pass through their grids.
        match: Distance from the teacher's outputs.

    Raises:
        ValueError: if a number is out of range.
    """

    steps: int = 800
    batch_size: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 5e-4
    warmup: float = 0.2
    grid_from: float = 0.7
    match: Match = distillation

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"Recovery needs steps >= 0, batch_size >= 1, learning_rate > 0 and weight_decay >= 0, got {self}."
            )
        if not 0 <= self.warmup < 1 or not 0 <= self.grid_from <= 1:
            raise ValueError(f"Recovery needs 0 <= warmup < 1 and 0 <= grid_from <= 1, got {self}.")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        rise = self.warmup * self.steps
        if step < rise:
            return self.learning_rate * (step + 1) / (rise + 1)
        progress = (step - rise) / max(1.0, self.steps - rise)
        return self.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


class _OnGrid(nn.Module):
    """Parametrization: the weight as its site's structure projects it, gradients straight through."""

    def __init__(self, structure: Structure, site: Site) -> None:
        super().__init__()
        self.structure, self.rows = structure, site.shape[0]
        self.transposed = site.transposed

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight (any shape), projected as a matrix (m, n)."""
        matrix = weight.t() if self.transposed else weight.reshape(weight.shape[0], -1)
        projected = straight_through(self.structure, matrix)
        return projected.t() if self.transposed else projected.reshape(weight.shape)


def recover_(
    model: nn.Module,
    lessons: Lessons,
    recovery: Recovery,
    *,
    grids: Mapping[str, tuple[Site, Structure]],
    forward: Forward,
    seed: int = 0,
    checkpoint: pathlib.Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the model in place; it ends in evaluation mode, its weights not yet projected.

    Args:
        model: The cut model.
        lessons: Samples and the teacher's answers.
        recovery: How to train.
        grids: Site and structure of each matrix that will be packed.
        forward: Calls the model on a batch.
        seed: Of the order of samples.
        checkpoint: File to continue from and to write to, about every ten seconds.
        progress: Called with (step, loss).

    Returns:
        Losses of the steps that ran here.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    flags = [p.requires_grad for _, p in trained]
    for _, parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [p for _, p in trained], lr=recovery.learning_rate, weight_decay=recovery.weight_decay
    )
    model.train()
    start = _resume(model, optimizer, trained, checkpoint)
    first_on_grid = math.floor(recovery.grid_from * recovery.steps)
    saved = time.monotonic()

    def step(index: int, samples: Tensor) -> float:
        if index >= first_on_grid:
            _register(model, grids)
        batch, answers = lessons.take(samples)
        for group in optimizer.param_groups:
            group["lr"] = recovery.rate(index)
        # Dropout draws from the global generator: it is seeded for this step alone and put back.
        with torch.random.fork_rng(devices=sorted({p.device.index for _, p in trained if p.is_cuda})):
            torch.manual_seed((seed * 1_000_003 + index) % 2**63)
            loss = recovery.match(forward(model, batch), answers)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    def after(index: int, loss: float) -> None:
        nonlocal saved
        if progress is not None:
            progress(index + 1, loss)
        if checkpoint is not None and time.monotonic() - saved > 10:
            _save(model, optimizer, trained, checkpoint, step=index + 1)
            saved = time.monotonic()

    try:
        losses = run(
            step,
            samples=lessons.samples,
            batch_size=recovery.batch_size if lessons.mixed else 1,
            steps=recovery.steps,
            start=start,
            seed=seed,
            after=after,
        )
    finally:
        _unregister(model, grids)
        for (_, parameter), flag in zip(trained, flags):
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.eval()
    return losses


def _register(model: nn.Module, grids: Mapping[str, tuple[Site, Structure]]) -> None:
    for site, structure in grids.values():
        module = model.get_submodule(site.module_name)
        if not parametrize.is_parametrized(module, site.parameter):
            parametrize.register_parametrization(module, site.parameter, _OnGrid(structure, site), unsafe=True)


def _unregister(model: nn.Module, grids: Mapping[str, tuple[Site, Structure]]) -> None:
    for site, _ in grids.values():
        module = model.get_submodule(site.module_name)
        if parametrize.is_parametrized(module, site.parameter):
            later = [name for name in module._parameters if name != site.parameter]
            parametrize.remove_parametrizations(module, site.parameter, leave_parametrized=False)
            # The parameter is now the last one; it goes back to the front, where a weight stands.
            for name in later:
                module.register_parameter(name, module._parameters.pop(name))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def _save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: list[tuple[str, nn.Parameter]],
    path: pathlib.Path,
    *,
    step: int,
) -> None:
    tensors = {f"buffer.{name}": buffer for name, buffer in _buffers(model).items()}
    for name, parameter in trained:
        tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    write_tensors(path, tensors, {"step": str(step)})


def _resume(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: list[tuple[str, nn.Parameter]],
    path: pathlib.Path | None,
) -> int:
    if path is None or not path.exists():
        return 0
    tensors, metadata = read_tensors(path)
    buffers = _buffers(model)
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "buffer":
                buffers[name].copy_(value)
        for name, parameter in trained:
            parameter.copy_(tensors[f"parameter.{name}"])
            # A parameter that no output depends on has no state.
            if f"optimizer.step.{name}" in tensors:
                optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }
    return int(metadata["step"])
