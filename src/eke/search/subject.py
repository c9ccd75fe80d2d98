"""The network under examination: a copy, so that nothing of the user's changes, and the batches it is shown.

The copy is in train mode, as proxies are defined (batch norm uses the batch). Weights that a proxy looks at are those
of convolutions, linear layers (the transposed `Conv1D` of Hugging Face too) and attention's joint projection, tied ones
once, frozen ones not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Loss
from ..cost.forward import call, unwrap

Factory = Callable[[], nn.Module]
"""Builds the network with fresh weights; called with the seed set."""


@contextmanager
def apart(model: nn.Module) -> Iterator[nn.Module]:
    """Work on a copy of a model and give the random numbers back afterwards.

    Args:
        model: Any module; wrapped ones are unwrapped.

    Yields:
        The copy, in train mode and without gradients.

    Raises:
        RuntimeError: if it cannot be copied.
    """
    model = unwrap(model)
    try:
        double = copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and scores are computed on a "
            "copy. Detach the tensors it keeps from graphs, or give a function that builds it."
        ) from error
    double.zero_grad(set_to_none=True)
    devices = {tensor.get_device() for tensor in double.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(sorted(devices)), torch.enable_grad():
        yield double.train()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw global random numbers from a seed, and give those of every device back afterwards.

    Args:
        seed: Of all devices that are in use.
    """
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(cuda):
        # torch.manual_seed would leave its seed behind for devices that are not in use yet
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield


def built(factory: Factory, seed: int) -> nn.Module:
    """Return the network that a function builds with a seed; the global random numbers stay as they are.

    Args:
        factory: Builds it.
        seed: Of its weights.

    Returns:
        The network.

    Raises:
        TypeError: if it is no module.
    """
    with seeded(seed):
        model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"score needs a module or a function that returns one, got {type(model).__name__} {model!r:.60}."
        )
    return model


def weights(model: nn.Module, *, frozen: bool = False) -> dict[str, nn.Parameter]:
    """Return the weights that are scored, by name.

    Args:
        model: Any module.
        frozen: Whether those that are not trained belong to them.

    Returns:
        Weights of convolutions and linear layers in the order of the modules.

    Raises:
        ValueError: if there is none.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for own in _matrices(module):
            parameter = getattr(module, own, None)
            if not isinstance(parameter, nn.Parameter) or id(parameter) in seen:
                continue
            if parameter.requires_grad or frozen:
                seen.add(id(parameter))
                found[f"{name}.{own}" if name else own] = parameter
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"{type(model).__name__} has no trainable convolution or linear layer to score (it has "
            f"{', '.join(kinds[:8])}); unfreeze its weights with requires_grad_() or give another model."
        )
    return found


def _matrices(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own weights that count."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or type(module).__name__ == "Conv1D":
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"
    return ()


def listed(batches: Iterable[Batch]) -> list[Batch]:
    """Return batches as a list.

    Args:
        batches: A loader, a list or any iterable.

    Returns:
        The batches.

    Raises:
        ValueError: if there is none.
    """
    made = list(batches)
    if not made:
        raise ValueError(f"Scores need at least one batch, got an empty {type(batches).__name__}; was it used up?")
    return made


def inputs_of(batch: Batch) -> tuple[Any, ...]:
    """Return what a model is called with: the batch without its labels.

    Args:
        batch: A tensor, a pair (inputs, labels), or a mapping of named inputs.
    """
    if isinstance(batch, Mapping):
        return ({key: value for key, value in batch.items() if key != "labels"},)
    return (batch,) if isinstance(batch, Tensor) else (batch[0],)


def tensor_of(output: Any) -> Tensor:
    """Return the tensor of a model's output: itself, `logits`, the last hidden state or the first item.

    Args:
        output: What the model returned.

    Returns:
        A floating-point tensor.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)  # type: ignore[no-any-return]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"The model returned {type(output).__name__}; give a `loss(model, batch)` that knows it.")


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of a batch (inputs, labels), or of a mapping with the key "labels".

    Labels are classes; -100 is left out. Outputs (batch, tokens, classes) are taken with labels (batch, tokens).

    Args:
        model: Called with the inputs.
        batch: Inputs and labels.

    Returns:
        A scalar.

    Raises:
        ValueError: if there are no labels, their shape is not that of the outputs, or one of them is no class.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else _second(batch)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"a batch has no labels: got {type(batch).__name__}, needed (inputs, labels) or a mapping with 'labels'. "
            "Add labels, or give `loss=` for another task."
        )
    logits = tensor_of(call(model, inputs_of(batch)))
    classes = logits.shape[-1]
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be whole numbers of shape {tuple(logits.shape[:-1])}, got {labels.dtype} of "
            f"{tuple(labels.shape)}; give `loss=` for targets that are no classes."
        )
    counted = labels[labels != -100]
    if not counted.numel():
        raise ValueError(f"all of the {labels.numel()} labels are -100, so there is no loss; leave the batch out.")
    if not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        raise ValueError(
            f"labels go from {int(counted.min())} to {int(counted.max())}, the model has {classes} outputs, so they "
            f"must be 0..{classes - 1}; build the model with more classes or map the labels."
        )
    return F.cross_entropy(logits.reshape(-1, classes), labels.reshape(-1).long())


def _second(batch: Batch) -> Any:
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def loss_of(model: nn.Module, batch: Batch, loss: Loss, number: int) -> Tensor:
    """Return the loss of one batch.

    Args:
        model: The model.
        batch: The batch.
        loss: Mean loss.
        number: Of the batch, for messages.

    Returns:
        A finite scalar.

    Raises:
        ValueError: as `loss` says, with the number of the batch.
        FloatingPointError: if it is not finite.
    """
    try:
        value = loss(model, batch)
    except ValueError as error:
        raise ValueError(f"Batch {number}: {error}") from error
    if not math.isfinite(float(value.detach())):
        raise FloatingPointError(
            f"Batch {number}: the loss is {float(value.detach())}; look for values that are not finite in it."
        )
    return value


def gradients(value: Tensor, chosen: Iterable[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return gradients of a scalar, zero where it does not depend on a tensor.

    Args:
        value: A scalar.
        chosen: Tensors that require gradients.
        create_graph: Whether the gradients are differentiated again.
    """
    tensors = list(chosen)
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    found = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(tensor) if grad is None else grad for tensor, grad in zip(tensors, found)]
