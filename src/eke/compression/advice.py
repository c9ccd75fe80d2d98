"""What to do about a batch that a model does not take: read off the batch, the model's parameters and the error."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LABELS = ("labels", "label", "targets", "target")
LOADER = "Make the loader yield what the model takes, or pass forward=."


def describe(tree: Any) -> str:
    """Return a batch written as types and shapes."""
    if isinstance(tree, Tensor):
        where = "" if tree.device.type == "cpu" else f" on {tree.device}"
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}{where}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        shown = [describe(value) for value in tree[:8]]
        return "(" + ", ".join([*shown, *(["..."] if len(tree) > 8 else [])]) + ")"
    return type(tree).__name__


def on_batch(model: nn.Module, batch: Any, error: BaseException) -> str:
    """Return what to do about a batch on which a model fails.

    Args:
        model: The model.
        batch: The batch.
        error: What running it raised.

    Returns:
        One or two sentences.
    """
    special = _on_types(batch) or _on_tensors(model, batch, error) or _on_names(model, batch, error)
    return f"{special} {LOADER}" if special else LOADER


def _on_types(batch: Any) -> str:
    """Return what to do about leaves that are no tensors."""
    leaves = pytree.tree_leaves(batch)
    if any(isinstance(leaf, str) for leaf in leaves):
        return "Tokenise text first: a model takes tensors, such as tokenizer(texts, return_tensors='pt')."
    homes = {type(leaf).__module__.partition(".")[0] for leaf in leaves}
    if "PIL" in homes:
        return "Turn images into tensors in the dataset, such as torchvision.transforms.ToTensor(), and stack them."
    if "numpy" in homes:
        return "Turn arrays into tensors, torch.as_tensor(array), or let a DataLoader do it."
    if leaves and not any(isinstance(leaf, Tensor) for leaf in leaves):
        return "There is no tensor in it: torch.utils.data.DataLoader(dataset, batch_size=64) makes batches of tensors."
    return ""


def _on_tensors(model: nn.Module, batch: Any, error: BaseException) -> str:
    """Return what to do about tensors of another device or dtype, or too large ones."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The memory is too small for such a batch: give smaller ones."
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None or not tensors:
        return ""
    elsewhere = next((t.device for t in tensors if t.device != parameter.device), None)
    if elsewhere is not None:
        return f"The batch is on {elsewhere} and the model on {parameter.device}: move one to the other."
    words = str(error)
    if "indices" in words and "scalar type" in words:
        return "An embedding looks up whole numbers: convert its inputs, x.long()."
    wrong = next((t for t in tensors if t.is_floating_point() and t.dtype != parameter.dtype), None)
    wanted = str(parameter.dtype)
    if wrong is not None:
        return f"Convert the inputs, x.to({wanted}), or the model, model.to({wrong.dtype})."
    if "dtype" in words or "scalar type" in words or ("type" in words and "expected" in words.lower()):
        return f"Convert whole numbers, x.to({wanted})."
    return ""


def _on_names(model: nn.Module, batch: Any, error: BaseException) -> str:
    """Return what to do about a dictionary whose keys are no arguments of the model."""
    if not isinstance(batch, Mapping) or not isinstance(error, TypeError):
        return ""
    return f"Its keys become arguments of {type(model).__name__}.forward{inspect.signature(model.forward)}."


def on_loss(loss: Any, batch: Any, *, outputs: Any, error: BaseException) -> str:
    """Return what to do about a loss that fails, starting with a space, or nothing.

    Args:
        loss: The loss.
        batch: The batch on which it fails.
        outputs: What the model returned for it.
        error: What the loss raised.
    """
    if "does not require grad and does not have a grad_fn" in str(error):
        return " Only return the mean loss: eke calls backward itself."
    if isinstance(loss, nn.Module) or str(getattr(loss, "__module__", "")).startswith("torch."):
        return (
            " loss is called with the model and a batch, not with outputs and targets: take "
            "eke.compression.cross_entropy, or lambda model, batch: your_loss(model(batch[0]), batch[1])."
        )
    if isinstance(batch, Mapping) and not set(batch) & set(LABELS):
        return f" Targets of a dictionary are looked for under {', '.join(LABELS)}."
    first = next((leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)), None)
    if first is not None and first.ndim == 0 and not isinstance(outputs, Tensor):
        return " Its first output is one number: say where the logits are, forward=lambda model, batch: ...[1]."
    if first is not None and first.ndim == 2 and first.shape[1] == 1:
        return (
            " The model has one output a sample: give a loss= and a score= of one output, such as "
            "eke.compression.squared_loss and mean_squared_error, or your own with binary_cross_entropy_with_logits."
        )
    targets = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(targets, Tensor) or first is None:
        return ""
    if targets.ndim > 1 and targets.shape == first.shape:
        return " Targets of the logits' shape look one-hot: yield targets.argmax(1)."
    if targets.ndim == 2 and targets.shape[1] == 1:
        return " Targets have one column too many: yield targets.squeeze(1)."
    return ""
