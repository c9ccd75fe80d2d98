"""Hidden states of a cut model beside those of its teacher, where their shapes allow a comparison.

Compared are the outputs of modules that hold at least two matrices and return one tensor. Where the cut left all of its
entries, it is compared as it is; where one dimension shrank to what stays of the rows of the module's last matrix,
with these channels of the teacher's output. The distance is the squared error relative to the variance of the
teacher's values, mean over the modules.

Source: Romero et al., "FitNets: hints for thin deep nets", 2015 (there through a learned map; here the channels that
stay are known).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..sites import Site, Surgery
from .apply import stays
from .task import evaluating


@dataclass(frozen=True)
class Hint:
    """One module whose outputs are compared.

    Args:
        name: Of the module, in both models.
        dim: Dimension that shrank, None if the shapes agree.
        kept: Indices of it that stay, None if the shapes agree.
    """

    name: str
    dim: int | None = None
    kept: Tensor | None = None

    def of(self, output: Tensor) -> Tensor:
        """Return the part of the teacher's output that the student still has."""
        if self.dim is None or self.kept is None:
            return output
        return output.index_select(self.dim, self.kept.to(output.device))


class Watch:
    """Keeps the outputs of some modules while the context is open.

    Args:
        model: The model.
        names: Of modules.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model, self._names = model, names
        self.outputs: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        for name in self._names:
            handle = self._model.get_submodule(name).register_forward_hook(self._keep(name))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.outputs[name] = output

        return hook


def hints(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[Site],
    surgery: Surgery,
    *,
    call: Callable[[nn.Module], Any],
) -> list[Hint]:
    """Find the modules whose outputs can be compared.

    Args:
        teacher: The original.
        student: The cut model.
        sites: The original's matrices.
        surgery: What the cut left.
        call: Runs a model once.

    Returns:
        The hints, in the order of the model.
    """
    inside = {
        name: [site for site in sites if site.module_name.startswith(f"{name}.")]
        for name, _ in teacher.named_modules() if name
    }  # fmt: skip
    there = dict(student.named_modules())
    names = [n for n, held in inside.items() if len(held) >= 2 and type(there.get(n)) is type(teacher.get_submodule(n))]
    seen = []
    for model in (teacher, student):
        with evaluating(model), Watch(model, names) as watch:
            call(model)
        seen.append(watch.outputs)
    found = []
    for name in names:
        theirs, ours = seen[0].get(name), seen[1].get(name)
        if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor) or theirs.dim() != ours.dim():
            continue
        changed = [d for d in range(theirs.dim()) if theirs.shape[d] != ours.shape[d]]
        if not changed:
            found.append(Hint(name))
        elif len(changed) == 1:
            kept = _kept(inside[name], surgery, int(theirs.shape[changed[0]]), int(ours.shape[changed[0]]))
            if kept is not None:
                found.append(Hint(name, changed[0], kept))
    return found


def _kept(sites: Sequence[Site], surgery: Surgery, before: int, after: int) -> Tensor | None:
    """Return the rows that stay of the last matrix with as many rows before and after."""
    for site in reversed(sites):
        if site.kind in ("linear", "conv") and site.groups == 1 and site.shape[0] == before:
            rows, _ = stays(site, surgery)
            if len(rows) == after:
                return rows
    return None


def distance(hints: Sequence[Hint], student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Tensor:
    """Return the mean over modules of the squared error relative to the variance of the teacher's values.

    Args:
        hints: What is compared.
        student: Outputs by module name.
        teacher: Likewise.
    """
    terms = []
    for hint in hints:
        wanted = hint.of(teacher[hint.name])
        terms.append(F.mse_loss(student[hint.name], wanted) / wanted.var(unbiased=False).clamp_min(1e-12))
    return torch.stack(terms).mean()
