"""Proxies made of features of random inputs: Zen-score, MeCo and the three of AZ-NAS.

    zen    = ln(mean over samples of |f(x) - f(x + 0.01 x')|_1) + sum over batch norms of ln sqrt(mean variance),
             f the features before pooling, all weights and inputs standard normal
    meco   = sum over modules of the smallest eigenvalue of the correlation of a sample's channels
    az_nas, over the blocks of the network with Kaiming weights and normal inputs:
      expressivity   sum of the entropies of the normalised eigenvalues of the channels' covariance
      progressivity  least increase of that entropy from block to block
      trainability   mean of 2 - s - 1/s, s the largest singular value of g_in' g_out / places for random signs g_out

Blocks are the outermost items with children in a Sequential or ModuleList. AZ-NAS fuses its three and FLOPs (`fuse`).

Sources: M. Lin et al., Zen-NAS, 2021; T. Jiang et al., MeCo, 2023; J. Lee and B. Ham, AZ-NAS, 2024, and their code.
Cost: two forward passes; one and an eigenvalue problem a module; one, and a backward pass a block.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..cost.forward import call
from .flow import real
from .subject import inputs_of
from .sweep import Subject

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_PASSED = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Identity, nn.Flatten, nn.Dropout)


def _noise(subject: Subject, name: str) -> tuple[Any, ...]:
    """Return standard normal inputs in the shapes of the first batch's."""
    inputs = real(inputs_of(subject.first(name)), name)

    def drawn(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=subject.generator).to(leaf)

    return tree_map(drawn, inputs)  # type: ignore[no-any-return]


def _drawn_again(subject: Subject, deviation: Callable[[Tensor], float]) -> nn.Module:
    """Return a copy with normal weights, no biases and fresh batch norms."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _WEIGHTED):
                values = torch.randn(module.weight.shape, generator=subject.generator)
                module.weight.copy_(values * deviation(module.weight))
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, _BATCH_NORM):
                module.reset_parameters()
    return model


def zen(subject: Subject) -> float:
    """Return the Zen-score; `-inf` where the features do not depend on the input.

    Args:
        subject: What is scored.

    Returns:
        The score, with the running variances that batch norms have after both passes.

    Raises:
        ValueError: if the network has no features with places.
    """
    inputs, other = _noise(subject, "zen"), _noise(subject, "zen")
    model = _drawn_again(subject, lambda _: 1.0)
    kept: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3:
            kept[:] = [output]

    leaves = [m for m in model.modules() if not next(m.children(), None) and not isinstance(m, _PASSED)]
    handles = [leaf.register_forward_hook(note) for leaf in leaves]
    with torch.no_grad():
        features = []
        for given in (inputs, tree_map(lambda a, b: a + 0.01 * b, inputs, other)):
            call(model, given)
            if not kept:
                raise ValueError(f"zen needs features with places, and {type(model).__name__} has none; leave it out.")
            features.append(kept[0])
    for handle in handles:
        handle.remove()
    change = float((features[0] - features[1]).abs().flatten(1).sum(1).mean())
    norms = [m for m in model.modules() if isinstance(m, _BATCH_NORM) and m.running_var is not None]
    scale = sum(
        0.5 * math.log(float(norm.running_var.mean()) + 1e-12) for norm in norms if norm.running_var is not None
    )
    return math.log(change) + scale if change > 0 else float("-inf")


def meco(subject: Subject) -> float:
    """Return the sum of the smallest eigenvalues of the channels' correlations."""
    inputs = _noise(subject, "meco")
    found: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3:
            first = output[0].detach().double()
            rows = first.flatten(1) if output.ndim == 4 else first.T
            if min(rows.shape) > 1:
                found.append(torch.nan_to_num(torch.corrcoef(rows), 0.0, 0.0, 0.0))

    handles = [module.register_forward_hook(note) for module in subject.model.modules()]
    try:
        with torch.no_grad():
            call(subject.model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(float(torch.linalg.eigvalsh(matrix)[0]) for matrix in found)


def az_nas(subject: Subject) -> dict[str, float]:
    """Return expressivity, progressivity and trainability.

    Args:
        subject: What is scored.

    Returns:
        Three scores by name; an untrainable network (a block that is the identity) has trainability `-inf`.

    Raises:
        ValueError: if the network has no blocks.
    """
    inputs = _noise(subject, "az_nas")
    model = _drawn_again(subject, lambda w: math.sqrt(2.0 / max(1, w[0].numel())))
    found = blocks(model)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        made = output[0] if isinstance(output, (tuple, list)) else output
        if given and isinstance(given[0], Tensor) and isinstance(made, Tensor) and made.ndim >= 3:
            seen.append((given[0], made))

    handles = [block.register_forward_hook(note) for block in found]
    try:
        call(model, tree_map(lambda leaf: leaf.requires_grad_(), inputs))
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(
            f"az_nas looks at blocks, items with children in a Sequential or ModuleList, and found {len(found)} of "
            f"{type(model).__name__} that map features to features; leave it out."
        )
    entropies = [_entropy(output.detach()) for _, output in seen]
    steps = [after - before for before, after in itertools.pairwise(entropies)]
    return {
        "expressivity": sum(entropies),
        "progressivity": min(steps, default=0.0),
        "trainability": sum(_trainable(a, b, subject.generator) for a, b in seen) / len(seen),
    }


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost items with children of a Sequential or ModuleList, in order.

    Args:
        model: Any module.
    """
    if not isinstance(model, (nn.Sequential, nn.ModuleList)):
        return [block for child in model.children() for block in blocks(child)]
    found: list[nn.Module] = []
    for item in model:
        if next(item.children(), None) is not None:
            nested = isinstance(item, (nn.Sequential, nn.ModuleList))
            found += (blocks(item) if nested else []) or [item]
    return found


def _rows(features: Tensor) -> Tensor:
    """Return (places of all samples, channels)."""
    return (features.movedim(1, -1) if features.ndim == 4 else features).flatten(0, -2)


def _entropy(features: Tensor) -> float:
    rows = _rows(features).double()
    rows = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).clamp_min(0)
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values / total
    return float(-(shares * (shares + 1e-8).log()).sum())


def _trainable(given: Tensor, made: Tensor, generator: torch.Generator) -> float:
    if not (made.requires_grad and given.requires_grad):
        return float("-inf")
    signs = (torch.randint(0, 2, made.shape, generator=generator) * 2 - 1).to(made)
    (back,) = torch.autograd.grad(made, given, signs, retain_graph=True, allow_unused=True)
    if back is None or (back.shape == signs.shape and torch.equal(back, signs)):
        return float("-inf")
    if back.ndim == 4 and back.shape[-1] > signs.shape[-1]:
        stride = back.shape[-1] // signs.shape[-1]
        height, width = stride * signs.shape[-2], stride * signs.shape[-1]
        back = F.pixel_unshuffle(back[..., :height, :width], stride)
    rows, columns = _rows(back), _rows(signs)
    if len(rows) != len(columns):
        return float("-inf")
    largest = float(torch.linalg.matrix_norm(rows.T @ columns / len(columns), 2))
    return 2 - largest - 1 / (largest + 1e-6)
