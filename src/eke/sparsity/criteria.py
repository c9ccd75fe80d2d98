"""What each entry of a matrix is worth: how much the loss is modelled to change when it becomes 0.

With gradient g, curvature h and the change -w of an entry w:

    magnitude       w^2
    LinearModel     |-g w|                  QuadraticModel  |-g w + 1/2 h w^2|
    OBD             1/2 h w^2               OBS             1/2 w^2 / [H^-1]_qq
    WoodFisher      1/2 w^2 / [F^-1]_qq, F the empirical Fisher matrix in blocks
    Wanda           |w| times the norm of its input

h is the diagonal of the Gauss-Newton matrix (`curvature.gauss_newton_diagonal`), H the second moment of a layer's
inputs (the layer's own output error, as in OBC), with damping relative to its mean diagonal. A criterion is called as
`criterion(model, names)` and returns scores by parameter name; `parts` gives the signed pieces of a loss model, whose
sum is the predicted change.

Source: LeCun, Denker, Solla, "Optimal brain damage", 1990; Hassibi, Stork, "Optimal brain surgeon", 1993; Laurent et
al., "Revisiting loss modelling for unstructured pruning", 2020; Singh, Alistarh, "WoodFisher", 2020; Frantar, Alistarh,
"Optimal brain compression", 2022; Sun et al., "A simple and effective pruning approach for large language models",
2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._errors import suggest
from .._types import Batch, Loss
from ..curvature import Call, Diagonal, Fisher, Recorder, gauss_newton_diagonal, private_copy, rows_of
from ..sites import Site, find

Scores = dict[str, Tensor]
Criterion = Callable[[nn.Module, Sequence[str]], Mapping[str, Tensor]]
"""`criterion(model, names)`: scores in the shapes of the named parameters; the lowest are removed first."""


def magnitude(model: nn.Module, names: Sequence[str]) -> Scores:
    """Return w^2 for the named parameters."""
    return {name: weight.detach().square() for name, weight in chosen(model, names).items()}


@dataclass(frozen=True)
class LossModel:
    """A Taylor model of the loss for the removal of single entries.

    Args:
        loss: `loss(model, batch)`: mean loss.
        batches: Data; read again in every step.
        fisher: How second derivatives are measured, where the model has them.
        generator: Of the signs for "mc".
    """

    loss: Loss
    batches: Sequence[Batch]
    fisher: Fisher = "exact"
    generator: torch.Generator | None = None

    uses_gradient = True
    uses_curvature = True

    def parts(self, model: nn.Module, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (-g w, 1/2 h w^2) for the named parameters; a part that the model leaves out is 0."""
        chosen(model, names)
        sites = sites_of(model, names)
        how = self.fisher if self.uses_curvature else None
        found: dict[str, Diagonal] = gauss_newton_diagonal(
            model, self.loss, self.batches, list(sites.values()), fisher=how, generator=self.generator
        )
        result = {}
        for name, site in sites.items():
            weight = site.tensor(model).detach()
            here = found[site.name]
            g = site.stored_of(here.gradient).to(weight)
            first = -g * weight if self.uses_gradient else torch.zeros_like(weight)
            second = torch.zeros_like(weight)
            if here.curvature is not None:
                second = 0.5 * site.stored_of(here.curvature).to(weight) * weight.square()
            result[name] = (first, second)
        return result

    def __call__(self, model: nn.Module, names: Sequence[str]) -> Scores:
        """Return the absolute predicted change of each entry's removal."""
        return {name: (first + second).abs() for name, (first, second) in self.parts(model, names).items()}


@dataclass(frozen=True)
class LinearModel(LossModel):
    """|g w|: first order alone."""

    uses_curvature = False


@dataclass(frozen=True)
class QuadraticModel(LossModel):
    """|-g w + 1/2 h w^2|: right where the network is at no minimum, which is everywhere once some entries are gone."""


@dataclass(frozen=True)
class OBD(LossModel):
    """1/2 h w^2: second order alone, as if the gradient were 0."""

    uses_gradient = False


@dataclass(frozen=True)
class OBS:
    """1/2 w^2 / [H^-1]_qq with H = E[a a^T] of the layer's inputs: the output error after the others made up for it.

    Args:
        loss: Runs the model; its value does not matter.
        batches: Data.
        damping: Added to H, relative to its mean diagonal.
    """

    loss: Loss
    batches: Sequence[Batch]
    damping: float = 0.01

    def __call__(self, model: nn.Module, names: Sequence[str]) -> Scores:
        """Return the scores of the named parameters."""
        chosen(model, names)
        sites = sites_of(model, names)
        scores = {}
        for name, moment in input_moments(model, self.loss, self.batches, sites).items():
            site = sites[name]
            level = moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
            eye = torch.eye(moment.shape[1], dtype=moment.dtype)
            inverse = torch.linalg.inv(moment + self.damping * level[:, None, None] * eye)
            weight = site.matrix_of(site.tensor(model).detach()).double()
            blocks = weight.reshape(site.groups, -1, site.shape[1])
            score = 0.5 * blocks.square() / inverse.diagonal(dim1=1, dim2=2)[:, None]
            scores[name] = site.stored_of(score.reshape(site.shape)).to(site.tensor(model))
        return scores


@dataclass(frozen=True)
class Wanda:
    """|w| times the norm of its input over the data; meant to be compared within a row (scope "row").

    Args:
        loss: Runs the model; its value does not matter.
        batches: Data.
    """

    loss: Loss
    batches: Sequence[Batch]

    def __call__(self, model: nn.Module, names: Sequence[str]) -> Scores:
        """Return the scores of the named parameters."""
        chosen(model, names)
        sites = sites_of(model, names)
        scores = {}
        for name, moment in input_moments(model, self.loss, self.batches, sites).items():
            site = sites[name]
            weight = site.matrix_of(site.tensor(model).detach()).double().abs()
            norms = moment.diagonal(dim1=1, dim2=2).sqrt()[:, None]
            score = weight.reshape(site.groups, -1, site.shape[1]) * norms
            scores[name] = site.stored_of(score.reshape(site.shape)).to(site.tensor(model))
        return scores


@dataclass(frozen=True)
class WoodFisher:
    """1/2 w^2 / [F^-1]_qq, F = damping I + E[g g^T] over examples, in blocks of neighbouring entries.

    Args:
        loss: `loss(model, batch)`: mean loss.
        batches: Data; each example is one update of the inverse.
        block: Entries of a block.
        damping: Of F.
    """

    loss: Loss
    batches: Sequence[Batch]
    block: int = 50
    damping: float = 1e-5

    def __call__(self, model: nn.Module, names: Sequence[str]) -> Scores:
        """Return the scores of the named parameters."""
        chosen(model, names)
        sites = sites_of(model, names)
        total = sum(samples for _, samples in _passes(model, self.loss, self.batches, sites))
        inverses: dict[str, Tensor] = {}
        for gradients in _example_gradients(model, self.loss, self.batches, sites):
            for name, each in gradients.items():
                blocks = _blocked(each.double(), self.block)  # (examples, blocks, block)
                if name not in inverses:
                    eye = torch.eye(self.block, dtype=torch.float64)
                    inverses[name] = (eye / self.damping).repeat(blocks.shape[1], 1, 1)
                for g in blocks:
                    column = (inverses[name] @ g[:, :, None])[:, :, 0]
                    below = total + (g * column).sum(1)
                    inverses[name].baddbmm_(column[:, :, None], (column / below[:, None])[:, None], alpha=-1)
        scores = {}
        for name, site in sites.items():
            weight = site.matrix_of(site.tensor(model).detach())
            diagonal = inverses[name].diagonal(dim1=1, dim2=2).reshape(-1)[: weight.numel()].reshape(site.shape)
            score = 0.5 * weight.double().square() / diagonal
            scores[name] = site.stored_of(score).to(site.tensor(model))
        return scores


def chosen(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the named parameters.

    Raises:
        ValueError: if there is none of that name.
    """
    known = dict(model.named_parameters())
    for name in names:
        if name not in known:
            raise ValueError(f"This model has no parameter {name!r}." + suggest(name, known))
    return {name: known[name] for name in names}


def sites_of(model: nn.Module, names: Sequence[str]) -> dict[str, Site]:
    """Return the matrix sites of the named parameters, whose inputs and outputs can be seen.

    Raises:
        ValueError: if a name is none of them.
    """
    known = {site.parameter_name: site for site in find(model)}
    for name in names:
        if name not in known or not known[name].visible:
            raise ValueError(
                f"{name!r} is no matrix whose inputs and outputs can be seen; this criterion scores weights of linear, "
                "convolutional, recurrent and attention layers. Leave it out of names=, or use magnitude."
            )
    return {name: known[name] for name in names}


def _passes(
    model: nn.Module, loss: Loss, batches: Iterable[Batch], sites: Mapping[str, Site]
) -> Iterator[tuple[dict[str, list[Call]], int]]:
    """Yield the calls of each parameter's module and the number of samples, batch by batch."""
    with Recorder(private_copy(model, sites.values()), [site.boundary for site in sites.values()]) as recorder:
        for index, batch in enumerate(batches):
            with torch.enable_grad():
                calls, samples = recorder.run(loss, batch, index)
            yield {name: calls.get(site.boundary, []) for name, site in sites.items()}, samples


def input_moments(model: nn.Module, loss: Loss, batches: Iterable[Batch], sites: Mapping[str, Site]) -> Scores:
    """Return sums of a a^T (groups, n, n) over all samples and locations, float64."""  # noqa: DOC501
    sums: Scores = {}
    for calls, _ in _passes(model, loss, batches, sites):
        for name, site in sites.items():
            for call in calls[name]:
                a = site.inputs_to_rows(call.x).permute(2, 0, 1, 3).flatten(1, 2)
                moment = (a.mT @ a).double()
                sums[name] = moment if name not in sums else sums[name] + moment
    unused = [name for name in sites if name not in sums]
    if unused:
        raise ValueError(f"The loss does not use {unused}; leave them out of names=.")
    return sums


def _example_gradients(
    model: nn.Module, loss: Loss, batches: Iterable[Batch], sites: Mapping[str, Site]
) -> Iterator[dict[str, Tensor]]:
    """Yield gradients (examples, entries) by name, batch by batch."""
    for calls, _ in _passes(model, loss, batches, sites):
        found = {}
        for name, site in sites.items():
            here = [((0, 0), call.x, call.gradient) for call in calls[name]]
            rows = rows_of(site, here, bias=False, sharing="sum", mean=True, loss_scale=1.0, weights=None)
            found[name] = (rows.g.mT @ rows.a).transpose(0, 1).flatten(1)
        yield found


def _blocked(gradients: Tensor, block: int) -> Tensor:
    padding = -gradients.shape[1] % block
    return nn.functional.pad(gradients, (0, padding)).reshape(len(gradients), -1, block)
