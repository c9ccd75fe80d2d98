"""Changes that cost no quality: folding batch normalisation into the layer before it, and the memory format.

Folding: bn(Wx + b) = (s W)x + s (b - mean) + beta with s = gamma / sqrt(var + eps), row by row. Which normalisation
follows which layer is seen by running the model once (the layer's output is the very tensor that the normalisation
gets); that nothing else reads the tensor is proved by comparing the outputs of a float64 copy before and after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ..nn import KSLinear
from .task import evaluating

Pair = tuple[str, str]
"""Names of a layer and of the batch normalisation that follows it."""

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_WITH_FACTORS = (*_LAYERS, KSLinear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def foldable(model: nn.Module, call: Callable[[nn.Module], Any]) -> list[Pair]:
    """Find and prove the pairs of layer and batch normalisation that can be folded.

    Args:
        model: Any module; not changed.
        call: Runs the model once on example inputs and returns its outputs.

    Returns:
        The pairs, in the order of the forward pass.
    """
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if isinstance(module, _NORMS) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.add_(torch.linspace(-0.5, 0.5, module.num_features, dtype=torch.float64))
    pairs = _adjacent(double, call)
    with evaluating(double):
        wanted = _tensors(_in_double(double, call))
        if _same(wanted, _folded(double, pairs, call)):
            return pairs
        return [pair for pair in pairs if _same(wanted, _folded(double, [pair], call))]


def fold_batchnorm_(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold in place; the normalisations become `nn.Identity`.

    Args:
        model: The model.
        pairs: From `foldable`.

    Raises:
        ValueError: if a name is not of a layer and a batch normalisation.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer_name, norm_name in pairs:
        layer, norm = modules.get(layer_name), modules.get(norm_name)
        if not isinstance(layer, _WITH_FACTORS) or not isinstance(norm, _NORMS):
            raise ValueError(
                f"Cannot fold {norm_name!r} ({type(norm).__name__}) into {layer_name!r} ({type(layer).__name__}): "
                "build the architecture that was compressed."
            )
        assert norm.running_mean is not None
        assert norm.running_var is not None
        # In float64, rounded once.
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(scale)
        shift = (bias - norm.running_mean.double()) * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        with torch.no_grad():
            if isinstance(layer, KSLinear):
                weight, (a, b, _, d) = layer.factors[0], layer.factors[0].shape
                rows = scale.view(a, b, 1, d)
            else:
                weight, rows = layer.weight, scale.view(-1, *[1] * (layer.weight.ndim - 1))
            weight.copy_(weight.double() * rows)
            layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        parent, _, attribute = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Identity().train(norm.training))


def set_memory_format_(model: nn.Module, name: str) -> None:
    """Store 4-dimensional weights in a memory format.

    Args:
        model: The model.
        name: "contiguous" or "channels_last".

    Raises:
        ValueError: if the format is not known.
    """
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if name not in formats:
        raise ValueError(f"The memory format must be one of {sorted(formats)}, got {name!r}.")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:  # Module.to would ask the same of those of 3-d convolutions, which have no such format
            tensor.data = tensor.data.to(memory_format=formats[name])


def _adjacent(model: nn.Module, call: Callable[[nn.Module], Any]) -> list[Pair]:
    """Return the pairs where the normalisation's input is the layer's very output and each is called once."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    calls: dict[str, int] = {}
    pairs: list[Pair] = []
    handles: list[RemovableHandle] = []

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, _LAYERS) and isinstance(output, Tensor):
                outputs[id(output)] = (name, output)
            elif isinstance(module, _NORMS) and module.running_mean is not None and id(inputs[0]) in outputs:
                pairs.append((outputs[id(inputs[0])][0], name))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (*_LAYERS, *_NORMS)):
            handles.append(module.register_forward_hook(after(name)))
    try:
        with evaluating(model):
            _in_double(model, call)
    finally:
        for handle in handles:
            handle.remove()
    once = [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1 and _rows_fit(model, pair)]
    return [pair for pair in once if sum(pair[0] == layer for layer, _ in pairs) == 1]


def _rows_fit(model: nn.Module, pair: Pair) -> bool:
    """Return whether the normalisation has one channel a row (a linear layer's output can be normalised otherwise)."""
    layer, norm = (model.get_submodule(name) for name in pair)
    weight = layer.weight
    return isinstance(weight, Tensor) and weight.shape[0] == norm.num_features


def _in_double(model: nn.Module, call: Callable[[nn.Module], Any]) -> Any:
    """Return what `call` does with floating point inputs turned into float64 on their way into the model."""

    def promote(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        def double(leaf: Any) -> Any:
            return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return pytree.tree_map(double, (args, kwargs))

    handle = model.register_forward_pre_hook(promote, with_kwargs=True)
    try:
        return call(model)
    finally:
        handle.remove()


def _folded(model: nn.Module, pairs: Sequence[Pair], call: Callable[[nn.Module], Any]) -> list[Tensor]:
    trial = copy.deepcopy(model)
    fold_batchnorm_(trial, pairs)
    return _tensors(_in_double(trial, call))


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _same(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return len(wanted) == len(got) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= 1e-9 * max(1.0, float(a.abs().max()))
        for a, b in zip(wanted, got)
        if a.is_floating_point()
    )
