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

from .._errors import error_line, own_words
from ..cost import read_tensors, write_tensors
from ..sites import Site
from ..structures import Exactness, Structure, Supported, UniformGrid, straight_through
from ..training import run
from .advice import describe
from .hidden import Hint, Watch, distance
from .lessons import Lessons, distillation
from .task import Forward

REFRESH = 10
"""Steps after which the scales of grids are searched anew."""

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
        hidden: Weight of the distance of hidden states from the teacher's, which then runs in every step; 0 leaves
            it out.

    Raises:
        TypeError: if steps or batch_size is no whole number.
        ValueError: if a number is out of range.
    """

    steps: int = 900
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 5e-4
    warmup: float = 0.2
    grid_from: float = 0.7
    match: Match = distillation
    hidden: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Recovery.{name} must be a whole number, got {value!r}.")
        if self.steps < 0 or self.batch_size < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"Recovery needs steps >= 0, batch_size >= 1, learning_rate > 0 and weight_decay >= 0, got {self}."
            )
        if not (math.isfinite(self.hidden) and self.hidden >= 0):
            raise ValueError(f"Recovery needs a finite weight hidden >= 0, got {self.hidden}.")
        if not 0 <= self.warmup < 1 or not 0 <= self.grid_from <= 1:
            raise ValueError(f"Recovery needs 0 <= warmup < 1 and 0 <= grid_from <= 1, got {self}.")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        rise = self.warmup * self.steps
        if step < rise:
            return self.learning_rate * (step + 1) / (rise + 1)
        progress = (step - rise) / max(1.0, self.steps - rise)
        return self.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Teacher:
    """The original model, in evaluation mode, and the modules whose outputs are compared."""

    model: nn.Module
    hints: tuple[Hint, ...]


class _Formed(nn.Module):
    """Parametrization: the weight on its support from the start, on its grid in the last part, gradients straight
    through. Scales of a grid are searched anew every `REFRESH` steps.
    """  # noqa: D205

    def __init__(self, structure: Structure, site: Site, support: Tensor | None) -> None:
        super().__init__()
        self.structure, self.site, self.support = structure, site, support
        self.grid = structure if isinstance(structure, UniformGrid) else getattr(structure, "second", None)
        # What is neither a support nor a grid is met from the first step on.
        self.active = support is None and self.grid is None
        self.scales: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight (any shape), formed as a matrix (m, n)."""
        matrix = _as_matrix(self.site, weight)
        if self.support is not None:
            matrix = matrix * self.support
        if self.active:
            matrix = straight_through(self._rounding(matrix.detach()), matrix)
        return _as_stored(self.site, matrix)

    def _rounding(self, matrix: Tensor) -> Structure:
        if not isinstance(self.grid, UniformGrid):
            return self.structure
        if self.scales is None:
            self.scales = self.grid.quantize(matrix)[1]
        return _Scaled(self.grid, self.scales)


def _as_matrix(site: Site, weight: Tensor) -> Tensor:
    """Return what `Site.read` returns, differentiable in the stored weight."""
    if site.kind == "conv_transpose":
        weight = weight.reshape(site.groups, -1, *weight.shape[1:]).transpose(1, 2)
    elif site.transposed:
        weight = weight.t()
    return weight.reshape(site.shape)


def _as_stored(site: Site, matrix: Tensor) -> Tensor:
    """Return the weight whose matrix this is."""
    if site.kind == "conv_transpose":
        inputs, outputs, *kernel = site.stored_shape
        matrix = matrix.reshape(site.groups, outputs, inputs // site.groups, *kernel).transpose(1, 2)
    elif site.transposed:
        matrix = matrix.t()
    return matrix.reshape(site.stored_shape)


class _Scaled:
    """A grid with fixed scales."""

    exactness: Exactness = "heuristic"

    def __init__(self, grid: UniformGrid, scales: Tensor) -> None:
        self._grid, self._scales = grid, scales

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        return self._grid.dequantize(self._grid.round(v, self._scales), self._scales, v.dtype)

    def bits(self, shape: tuple[int, int]) -> int:
        return self._grid.bits(shape)

    def check(self, shape: tuple[int, int]) -> None:
        return self._grid.check(shape)


def recover_(
    model: nn.Module,
    lessons: Lessons,
    recovery: Recovery,
    *,
    forms: Mapping[str, tuple[Site, Structure]],
    forward: Forward,
    members: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    seed: int = 0,
    checkpoint: pathlib.Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the model in place; it ends in evaluation mode, its weights not yet projected.

    Args:
        model: The cut model.
        lessons: Samples and the teacher's answers.
        recovery: How to train.
        forms: Site and structure of each matrix that will be packed.
        forward: Calls the model on a batch.
        members: Member of each structure to start from, by site name; of a structure with a support, the support.
        teacher: The original and what to compare; needed if `recovery.hidden` is positive.
        seed: Of the order of samples.
        checkpoint: File to continue from and to write to, about every ten seconds.
        progress: Called with (step, loss).

    Returns:
        Losses of the steps that ran here.

    Raises:
        TypeError: if `recovery.match` returns no tensor.
        ValueError: if the model cannot be trained on a batch; names the step.
    """  # noqa: DOC502
    trained = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    flags = [p.requires_grad for _, p in trained]
    for _, parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [p for _, p in trained], lr=recovery.learning_rate, weight_decay=recovery.weight_decay
    )
    model.train()
    # Supports are chosen from what the model was given with, before a checkpoint's values replace it.
    formed = _register(model, forms, members or {})
    first_on_grid = math.floor(recovery.grid_from * recovery.steps)
    saved = time.monotonic()

    def step(index: int, samples: Tensor) -> float:
        for form in formed:
            if index >= first_on_grid:
                form.active = True
            if (index - first_on_grid) % REFRESH == 0:
                form.scales = None
        batch, answers = lessons.take(samples)
        for group in optimizer.param_groups:
            group["lr"] = recovery.rate(index)
        # Dropout draws from the global generator: it is seeded for this step alone and put back.
        with torch.random.fork_rng(devices=sorted({p.device.index for _, p in trained if p.is_cuda})):
            torch.manual_seed((seed * 1_000_003 + index) % 2**63)
            try:
                loss = _loss(model, batch, answers, recovery=recovery, forward=forward, teacher=teacher)
            except Exception as error:
                if own_words(error):
                    raise
                raise ValueError(_failed(error, index, batch)) from error
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    def after(index: int, loss: float) -> None:
        nonlocal saved
        if progress is not None:
            progress(index + 1, loss)
        # Scales are no part of a checkpoint, so it is written where they are searched anew.
        fresh = (index + 1 - first_on_grid) % REFRESH == 0
        if checkpoint is not None and fresh and time.monotonic() - saved > 10:
            _save(model, optimizer, trained, checkpoint, step=index + 1)
            saved = time.monotonic()

    try:
        losses = run(
            step,
            samples=lessons.samples,
            batch_size=recovery.batch_size if lessons.mixed else 1,
            steps=recovery.steps,
            start=_resume(model, optimizer, trained, checkpoint),
            seed=seed,
            after=after,
        )
    finally:
        _unregister(model, forms)
        for (_, parameter), flag in zip(trained, flags):
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.eval()
    return losses


def _loss(
    model: nn.Module, batch: Any, answers: Any, *, recovery: Recovery, forward: Forward, teacher: Teacher | None
) -> Tensor:
    """Return the distance of outputs, and of hidden states where they are asked for."""
    if teacher is None or not recovery.hidden or not teacher.hints:
        return _matched(recovery, forward(model, batch), answers)
    names = [hint.name for hint in teacher.hints]
    with torch.no_grad(), Watch(teacher.model, names) as wanted:
        forward(teacher.model, batch)
    with Watch(model, names) as ours:
        loss = _matched(recovery, forward(model, batch), answers)
    return loss + recovery.hidden * distance(teacher.hints, ours.outputs, wanted.outputs)


def _matched(recovery: Recovery, ours: Any, theirs: Any) -> Tensor:
    """Return the distance of outputs.

    Raises:
        TypeError: if it is no scalar tensor with a gradient.
    """
    loss = recovery.match(ours, theirs)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError(
            "Recovery.match(student, teacher) must return a scalar tensor with a gradient, got "
            f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}."
        )
    return loss


def _failed(error: BaseException, index: int, batch: Any) -> str:
    """Return what to do about a step that fails."""
    mend = "recovery trains the model, so its forward must work in training mode"
    if "more than 1 value per channel" in str(error):
        mend = "batch normalisation needs several samples: raise Recovery(batch_size=), or set drop_last=True"
    elif isinstance(error, torch.OutOfMemoryError):
        mend = "lower Recovery(batch_size=)"
    return f"Step {index} of the recovery failed on {describe(batch)}, {error_line(error)}: {mend}."


def _register(
    model: nn.Module, forms: Mapping[str, tuple[Site, Structure]], members: Mapping[str, Tensor]
) -> list[_Formed]:
    formed = []
    for site, structure in forms.values():
        module = model.get_submodule(site.module_name)
        support = None
        if isinstance(structure, Supported):
            support = structure.support(members.get(site.name, site.read(model)))
        formed.append(_Formed(structure, site, support))
        parametrize.register_parametrization(module, site.parameter, formed[-1], unsafe=True)
    return formed


def _unregister(model: nn.Module, forms: Mapping[str, tuple[Site, Structure]]) -> None:
    for site, _ in forms.values():
        module = model.get_submodule(site.module_name)
        if not parametrize.is_parametrized(module, site.parameter):
            continue
        form: Any = module.parametrizations[site.parameter][0]  # type: ignore[index]
        later = [name for name in module._parameters if name != site.parameter]
        parametrize.remove_parametrizations(module, site.parameter, leave_parametrized=False)
        # The parameter is now the last one; it goes back to the front, where a weight stands.
        for name in later:
            module.register_parameter(name, module._parameters.pop(name))
        if form.support is not None:
            site.write_(model, site.read(model) * form.support)


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
