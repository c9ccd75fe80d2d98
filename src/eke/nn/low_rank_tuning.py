"""Tune a model by low-rank changes of its matrices, which are added to the weights in the end.

While it learns, a weight W (m, n) is W + (scale / r) B A with A (r, n) normal and B (m, r) zero at the start; only A, B
and what is named besides have gradients. Afterwards W holds the sum: nothing is added to the model.
Source: Hu and others, "LoRA: low-rank adaptation of large language models", 2021. Cost: O(m n r) a matrix and step on
top of the model's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import training
from .._types import Batch, Loss
from .substitute import CHILD, Substitute, substitutes


class LowRankChange(nn.Module):
    """W + scale / r B A.

    Args:
        weight: W, (m, n).
        rank: r.
        scale: Of the change.
    """

    def __init__(self, weight: Tensor, *, rank: int, scale: float) -> None:
        super().__init__()
        m, n = weight.shape
        self.factor = scale / rank
        self.a = nn.Parameter(weight.new_empty(rank, n).normal_(std=1 / math.sqrt(n)))
        self.b = nn.Parameter(weight.new_zeros(m, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return torch.addmm(weight, self.b, self.a, alpha=self.factor)


def low_rank_tuning_(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Loss,
    steps: int,
    rank: int = 8,
    scale: float = 16.0,
    learning_rate: float = 1e-3,
    maps: bool = True,
    modules: Iterable[str] | None = None,
    seed: int = 0,
) -> list[float]:
    """Mend a converted model as a whole: tune its attentions' matrices by low-rank changes, and the feature maps.

    Args:
        model: From `linearize`, or any model where `modules` names what to tune; changed in place.
        batches: For the loss; at most `steps` of them are kept.
        loss: `loss(model, batch)`: mean loss of a batch.
        steps: Batches to learn from.
        rank: Of the changes.
        scale: Changes are multiplied by scale / rank.
        learning_rate: Of Adam; falls to zero as a cosine.
        maps: Whether feature maps and balances learn too.
        modules: Modules whose matrices are tuned, with all that is inside them; None for the converted attentions (of a
            Hugging Face model also the projections beside them).
        seed: Of the changes and of the order of batches.

    Returns:
        The loss, step by step.

    Raises:
        ValueError: if there is nothing to tune, the rank is not positive, or batches is empty.
    """
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank!r}.")
    kept = list(itertools.islice(batches, max(1, steps)))
    if not kept:
        raise ValueError("batches is empty: give at least one batch (a list, not a spent iterator).")
    places = list(_matrices(model, modules))
    if not places:
        raise ValueError(
            f"{type(model).__name__} has nothing to tune: convert it with linearize first, or name modules, got "
            f"modules={None if modules is None else list(modules)}."
        )
    learned_maps = [p for part in substitutes(model).values() for p in part.parameters()] if maps else []
    with _alone(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changes, orders = [], {module: list(module._parameters) for module, _ in places}
        for module, name in places:
            change = LowRankChange(getattr(module, name), rank=min(rank, *getattr(module, name).shape), scale=scale)
            parametrize.register_parametrization(module, name, change, unsafe=True)
            changes += list(change.parameters())
        for parameter in (*changes, *learned_maps):
            parameter.requires_grad_(True)
        try:
            return _learned(model, kept, [*changes, *learned_maps], loss, steps, learning_rate, seed)
        finally:
            for module, name in places:
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                for key in orders[module]:  # as it was before: optimizers and files go by it
                    module._parameters[key] = module._parameters.pop(key)


def _learned(
    model: nn.Module,
    batches: list[Batch],
    parameters: list[nn.Parameter],
    loss: Loss,
    steps: int,
    rate: float,
    seed: int,
) -> list[float]:
    """Return the losses of the steps."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))

    def step(_: int, samples: Tensor) -> float:
        optimizer.zero_grad()
        found = loss(model, batches[int(samples[0])])
        torch.autograd.backward(found)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        return float(found.detach())

    return training.run(step, samples=len(batches), batch_size=1, steps=steps, seed=seed)


def _matrices(model: nn.Module, modules: Iterable[str] | None) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules and names of the matrices to tune."""
    names = list(modules) if modules is not None else [_block_of(model, name) for name in substitutes(model)]
    seen: set[int] = set()
    for name in names:
        for inner_name, module in model.get_submodule(name).named_modules():
            if CHILD in inner_name.split(".") or isinstance(module, Substitute):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 2 and id(parameter) not in seen and not isinstance(module, nn.Embedding):
                    seen.add(id(parameter))
                    yield module, key


def _block_of(model: nn.Module, name: str) -> str:
    """Return the module that holds an attention and its output projection, where that is one more level up."""
    above = name.rpartition(".")[0]
    parent = model.get_submodule(above)
    inside = model.get_submodule(name)
    # BERT's `attention` holds `self`, which attends, and `output`, which projects.
    words = type(parent).__name__.lower()
    return above if above and "attention" in words and inside is not parent else name


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Give the model's own parameters no gradients as long as the context lasts."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
