"""Put sparse layers in place of those whose zeros make them faster.

The model is run once on example inputs to see what each layer gets; each linear layer or 1 x 1 convolution with enough
zeros is then timed as a `SparseLinear` at that size, and replaced where another way than the dense product is fastest;
a convolution with a larger kernel where the sparse one takes less time on these inputs. Whatever made the zeros (masks,
`compress` with `structures.Unstructured`) does not matter. Outputs of the new model are compared with those of the old
one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .sparse_conv import SparseConv2d
from .sparse_linear import SparseLinear, Way, seconds

_CLOSE = 1e-4
"""Largest difference between outputs, relative to the largest of the old model's, that rounding explains."""


@dataclass(frozen=True)
class SparseLayer:
    """One layer with zeros.

    Args:
        name: Of the module.
        density: Share of its entries that are not 0.
        samples: Rows that it multiplied with the example inputs, in the largest call.
        way: What was fastest for so many; a layer for which that is "dense" was left as it is.
    """

    name: str
    density: float
    samples: int
    way: Way


@dataclass(frozen=True)
class MadeSparse:
    """A model with sparse layers, and what was found of each layer with zeros.

    Args:
        model: The new model.
        layers: In the order of `named_modules`.
    """

    model: nn.Module
    layers: tuple[SparseLayer, ...]


def use_sparse(model: nn.Module, inputs: Sequence[Any], *, least: float = 0.3) -> MadeSparse:
    """Return a copy of a model in which layers with zeros run the fastest way.

    Args:
        model: Any module; not changed.
        inputs: Positional arguments of one call, of the size it will run with.
        least: Share of zeros from which a layer is looked at.

    Returns:
        The new model in evaluation mode, and what was found.

    Raises:
        ValueError: if least is out of range, or the new model's outputs are others: it reads a layer's weight, say.
    """
    if not 0 <= least < 1:
        raise ValueError(f"least must be a share of zeros in [0, 1), got {least}.")
    new = copy.deepcopy(model).eval()
    owners = Counter(id(p) for m in new.modules() for p in m._parameters.values() if p is not None)
    candidates = {
        name: module
        for name, module in new.named_modules()
        if _known(module) and owners[id(module.weight)] == 1 and _zeros(module) >= least
    }
    samples: dict[str, int] = {}
    images: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            width = output.shape[-1] if isinstance(module, nn.Linear) else module.out_channels
            count = output.numel() // int(width)  # type: ignore[arg-type]
            if count > samples.get(name, 0):
                samples[name] = count
                if not isinstance(module, nn.Linear) and arguments:
                    images[name] = arguments[0]

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in candidates.items()]
    with torch.no_grad():
        wanted = new(*inputs)
    for handle in handles:
        handle.remove()
    found = []
    for name, module in candidates.items():
        if name not in samples:
            continue
        mask = module.weight.detach() != 0
        made: SparseLinear | SparseConv2d
        made = (SparseLinear if isinstance(module, nn.Linear) else SparseConv2d).from_dense(module, mask)
        way = (made if isinstance(made, SparseLinear) else made.linear).fastest(samples[name])
        if isinstance(made, SparseConv2d) and made.window.size != (1, 1):
            way = _compared(made, module, images.get(name))
        found.append(SparseLayer(name, float(mask.double().mean()), samples[name], way))
        if way != "dense" and name:
            new.set_submodule(name, made, strict=True)
        elif way != "dense":
            new = made
    _same(new, inputs, wanted)
    return MadeSparse(new, tuple(found))


def _known(module: nn.Module) -> bool:
    return type(module) is nn.Linear or SparseConv2d.fits(module)


def _compared(made: SparseConv2d, module: nn.Module, images: Tensor | None) -> Way:
    """Return "native" where a sparse convolution takes less time on these images than the dense one, else "dense"."""
    if images is None:  # it was called by keyword
        return "dense"
    made.linear.way = "native"
    best = [float("inf")] * 2
    for _ in range(3):  # interleaved, so that a burst of other work hits both
        best = [min(b, seconds(lambda run=run: run(images))) for b, run in zip(best, (made, module))]  # type: ignore[misc]
    return "native" if best[0] < best[1] else "dense"


def _zeros(module: nn.Module) -> float:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return float((weight == 0).double().mean()) if weight.numel() else 0.0


def _same(new: nn.Module, inputs: Sequence[Any], wanted: Any) -> None:
    try:
        with torch.no_grad():
            found = new(*inputs)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{type(new).__name__} does not run with other layers in place of its linear ones ({error}): it uses their "
            "weights itself."
        ) from error
    for a, b in zip(_tensors(found), _tensors(wanted)):
        error_of = float((a.double() - b.double()).abs().max()) if b.numel() else 0.0
        scale = float(b.double().abs().max()) if b.numel() else 1.0
        if not error_of <= _CLOSE * max(scale, 1e-30):
            raise ValueError(
                f"Outputs with sparse layers are off by {error_of:.3g} where the largest is {scale:.3g}; the model "
                "gives others every time it is called, or uses its layers' weights itself."
            )


def _tensors(outputs: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point())
