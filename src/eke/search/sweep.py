"""Proxies made of gradients of the loss: ZiCo and its correction, gradient norm, SNIP, GraSP, Fisher.

    gradnorm = sum over layers of |g|_2                 snip = sum |w g|               grasp = -sum w (H g)
    fisher   = sum over channels of mean over samples of (sum over places of a da)^2 / 2
    zico_bc  = ZiCo - sum over convolutions with S > 0 of ln(h w / sqrt(c))

g is the gradient of the first batch, H the Hessian of its loss, a and da a layer's output and its gradient, (c, h, w)
the shape of that output. ZiCo takes all batches.

Sources: M. Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", 2021, and its code; N. Lee et al., SNIP, 2019;
C. Wang et al., GraSP, 2020; L. Theis et al., Fisher pruning, 2018. K. Bhardwaj et al., ZiCo-BC, 2023: the correction
is from memory of the paper and thus a reconstruction.
Cost: a forward and a backward pass a batch; GraSP three times that for one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log, sqrt

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from .._types import Batch, Loss
from .subject import cross_entropy, gradients, loss_of, weights
from .variation import LayerStatistic, Spread, statistics


@dataclass
class Subject:
    """A network that is scored: a copy of its own in train mode, the batches, and noise.

    Args:
        model: The copy; what changes weights copies it once more.
        batches: Read by the proxies that need data.
        loss: Mean loss.
        generator: Of random inputs and weights.
    """

    model: nn.Module
    batches: Sequence[Batch] = ()
    loss: Loss = cross_entropy
    generator: torch.Generator = field(default_factory=torch.Generator)

    def first(self, purpose: str) -> Batch:
        """Return the first batch.

        Args:
            purpose: What needs it.

        Returns:
            The batch.

        Raises:
            ValueError: if there is none.
        """
        if not self.batches:
            raise ValueError(f"{purpose} needs a batch, got {self.batches!r}: pass batches.")
        return self.batches[0]

    @functools.cached_property
    def sweep(self) -> Sweep:
        """Gradients of all batches, computed once for all who need them."""
        return Sweep.run(self)


@dataclass(frozen=True)
class Sweep:
    """What one pass over the batches leaves.

    Args:
        spreads: Statistics of the gradients by weight.
        norms: |g|_2 by weight, of the first batch.
        saliency: sum |w g| by weight, of the first batch.
        shapes: Shape of one sample of a convolution's output by its weight.
    """

    spreads: dict[str, Spread]
    norms: dict[str, float]
    saliency: dict[str, float]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def run(cls, subject: Subject) -> Sweep:
        """Return the sweep over a subject's batches.

        Args:
            subject: What is scored.
        """
        subject.first("A proxy of gradients")
        chosen = weights(subject.model)
        spreads = {name: Spread() for name in chosen}
        norms: dict[str, float] = {}
        saliency: dict[str, float] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        handles = _watch_shapes(subject.model, shapes)
        for number, batch in enumerate(subject.batches):
            grads = gradients(loss_of(subject.model, batch, subject.loss, number), chosen.values())
            for handle in handles if number == 0 else ():
                handle.remove()
            for (name, weight), grad in zip(chosen.items(), grads):
                spreads[name].add(grad)
                if number == 0:
                    norms[name] = float(grad.norm())
                    saliency[name] = float((weight.detach() * grad).abs().sum())
        return cls(spreads, norms, saliency, shapes)

    @property
    def layers(self) -> list[LayerStatistic]:
        """ZiCo's statistics; raises as `zico` does."""
        return statistics(list(self.spreads), list(self.spreads.values()))


def _watch_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[RemovableHandle]:
    def watch(name: str) -> object:
        def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            shapes[f"{name}.weight"] = tuple(output.shape[1:])

        return note

    return [
        module.register_forward_hook(watch(name))  # type: ignore[arg-type]
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    ]


def zico_of(subject: Subject) -> float:
    """Return ZiCo."""
    return sum(layer.log_sum for layer in subject.sweep.layers)


def zico_bc(subject: Subject) -> float:
    """Return ZiCo less the sizes of the feature maps, which favour deep and thin networks."""
    total = 0.0
    for layer in subject.sweep.layers:
        shape = subject.sweep.shapes.get(layer.name)
        bias = log(torch.Size(shape[1:]).numel() / sqrt(shape[0])) if shape and layer.ratio_sum > 0 else 0.0
        total += layer.log_sum - bias
    return total


def gradnorm(subject: Subject) -> float:
    """Return the sum of the layers' gradient norms."""
    return sum(subject.sweep.norms.values())


def snip(subject: Subject) -> float:
    """Return the sum of |weight times gradient|."""
    return sum(subject.sweep.saliency.values())


def grasp(subject: Subject) -> float:
    """Return -sum of weight times (Hessian times gradient): what is left of the gradient's norm after removal."""
    chosen = weights(subject.model)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        value = loss_of(subject.model, subject.first("grasp"), subject.loss, 0)
    first = gradients(value, chosen.values(), create_graph=True)
    slope = torch.stack([(grad * grad.detach()).sum() for grad in first]).sum()
    second = gradients(slope, chosen.values())
    return -sum(float((weight.detach() * grad).sum()) for weight, grad in zip(chosen.values(), second))


def fisher(subject: Subject) -> float:
    """Return the sum over channels of the squared derivative with respect to a gate on the channel."""
    outputs: list[tuple[Tensor, Tensor, bool]] = []

    def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            # what follows may work in place; the value is kept as it is here
            outputs.append((output, output.detach().clone(), isinstance(module, nn.modules.conv._ConvNd)))

    layers = (nn.modules.conv._ConvNd, nn.Linear)
    handles = [m.register_forward_hook(note) for m in subject.model.modules() if isinstance(m, layers)]
    found: list[Tensor] = []
    try:
        value = loss_of(subject.model, subject.first("fisher"), subject.loss, 0)
    finally:
        for handle in handles:
            handle.remove()
    if value.requires_grad and outputs:
        grads = torch.autograd.grad(value, [live for live, _, _ in outputs], allow_unused=True)
        for (_, kept, places_last), grad in zip(outputs, grads):
            if grad is not None:
                found.append(_per_channel(kept * grad, places_last=places_last).square().mean(0).sum() / 2)
    return float(torch.stack(found).sum()) if found else 0.0


def _per_channel(product: Tensor, *, places_last: bool) -> Tensor:
    """Return (samples, channels): convolutions have their channels second, linear layers last."""
    if product.ndim < 3:
        return product
    return product.flatten(2).sum(2) if places_last else product.flatten(1, -2).sum(1)
