"""The model that was given, looked at before any work: a module, with values, that can be copied and changed.

What people give in place of a module is known well enough to say what they meant: a path, a state_dict, the class
instead of an instance, the function that builds it.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .._errors import error_line
from ..sites import find, skipped, unwrap

_MENDABLE = ("parametrized", "masked", "spectral_norm", "weight_norm", "quantized")
"""Words of the reasons why a matrix is no site that its owner can do something about."""


def check_module(model: object) -> nn.Module:
    """Refuse what is no module that can be changed; wrappers are taken off.

    Args:
        model: What was given.

    Returns:
        The module inside the wrappers.

    Raises:
        TypeError: if it is no module, or one whose layers cannot be changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"eke needs a torch.nn.Module, got {type(model).__name__}{_instead_of_a_module(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"eke cannot change the layers of compiled TorchScript, got {type(model).__name__}: pass the nn.Module "
            "that it was made from."
        )
    return unwrap(model)


def _instead_of_a_module(given: object) -> str:
    """Return the rest of the sentence for what is no module: what to do."""
    advice = ": build the network and pass it."
    if isinstance(given, (str, pathlib.Path)):
        advice = (
            f" {str(given)!r}: build the network, then model.load_state_dict(torch.load({str(given)!r}, "
            "weights_only=True)), and pass model."
        )
    elif isinstance(given, Mapping):
        inner = next((key for key, value in given.items() if isinstance(value, Mapping)), None)
        held = f" with the keys {[str(key) for key in given][:4]}"
        state = "state" if inner is None else f"checkpoint[{inner!r}]"
        advice = f"{held}, which holds tensors and no network: build it, then model.load_state_dict({state})."
    elif isinstance(given, type):
        advice = f" {given.__name__}: pass an instance, {given.__name__}(...)."
    elif isinstance(given, (tuple, list)) and any(isinstance(item, nn.Module) for item in given):
        place = next(index for index, item in enumerate(given) if isinstance(item, nn.Module))
        advice = f": pass its item {place}."
    elif type(given).__name__ == "ExportedProgram":
        advice = ", a graph whose layers cannot be changed: pass the nn.Module that was exported."
    elif callable(given):
        advice = f" {getattr(given, '__name__', given)!r}: call it and pass the module that it returns."
    return advice


def check_state(model: nn.Module) -> None:
    """Refuse a model whose parameters have no values, values that are not finite, or too narrow a range.

    Args:
        model: Without wrappers.

    Raises:
        TypeError: if its state holds more than tensors.
        ValueError: if a parameter is not initialised, on the meta device, in float16 or not finite.
    """
    for name, parameter in check_filled(model).named_parameters():
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"Parameter {name!r} is in float16, too narrow for second moments and recovery: pass model.float() or "
                "model.bfloat16(), and call .half() on the result."
            )
        values = parameter.detach()
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise ValueError(
                f"Parameter {name!r} holds {bad} values that are not finite: the model is broken before compression; "
                "load a good checkpoint."
            )
    reasons = [f"{name}: {reason}" for name, reason in skipped(model).items() if "quantized" in reason]
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            why = f" ({reasons[0]})" if reasons else ""
            raise TypeError(
                f"The model's state holds {name!r}, a {type(value).__name__}, where eke can store tensors only{why}: "
                "pass the model as it was before it was quantized or packed."
            )


def check_filled(model: nn.Module) -> nn.Module:
    """Refuse a model whose parameters have no values yet.

    Args:
        model: Without wrappers.

    Returns:
        The model.

    Raises:
        ValueError: if a parameter is not initialised or on the meta device.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"Parameter {name!r} is not initialised: run a batch through the model, and train it.")
        if parameter.is_meta:
            raise ValueError(
                f"Parameter {name!r} is on the meta device and has no values: build the model on a real device and "
                "load its weights."
            )
    return model


def check_sites(model: nn.Module, skip: Iterable[str]) -> list[str]:
    """Refuse a model with nothing to compress.

    Args:
        model: Without wrappers.
        skip: Names to leave alone.

    Returns:
        What stays whole although its owner could change that, one sentence each.

    Raises:
        ValueError: if no matrix is left; says why each was left out.
    """
    mendable = [
        f"{name}: {reason}" for name, reason in skipped(model).items() if any(word in reason for word in _MENDABLE)
    ]
    if not find(model, skip=skip):
        why = mendable or ["It needs linear layers or convolutions"]
        if isinstance(model, torch.fx.GraphModule):
            why = ["Its graph has operations and no layers: pass the nn.Module that was exported"]
        raise ValueError(
            f"There is nothing to compress: 0 channel groups and 0 matrices of {type(model).__name__} with 0 sites can "
            f"be changed (skip={list(skip)}). {'; '.join(why[:6])}. `eke inspect` says why for each module."
        )
    return mendable


def private_copy(model: nn.Module) -> nn.Module:
    """Copy a model, or say what in it cannot be copied.

    Args:
        model: Any module. Tensors with a gradient history that it holds (a cached output, what `torch.nn.utils.prune`
            or `weight_norm` derive from the parameters) are copied without it.

    Returns:
        A deep copy.

    Raises:
        ValueError: if an attribute cannot be copied; names it.
    """
    known = {id(tensor): tensor.detach().clone() for tensor in _histories(model)}
    try:
        return copy.deepcopy(model, known)
    except Exception as error:
        raise ValueError(
            "The model cannot be copied, and eke works on copies so that yours stays as it is: "
            f"{_uncopyable(model) or type(model).__name__} ({error_line(error)}). Keep locks, files and generators "
            "outside the module, or give it a __deepcopy__."
        ) from error


def without_history(model: nn.Module) -> nn.Module:
    """Return the model, or a copy of it if it holds tensors with a gradient history, which cannot be copied later."""
    return private_copy(model) if _histories(model) else model


def _histories(model: nn.Module) -> list[Tensor]:
    """Return the tensors with a gradient history among the attributes of all modules."""
    values = (value for module in model.modules() for value in vars(module).values())
    return [value for value in values if isinstance(value, Tensor) and not value.is_leaf]


def _uncopyable(model: nn.Module) -> str:
    """Return the attributes that cannot be copied, with their modules."""
    ordinary = set(vars(nn.Module()))
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ordinary or (isinstance(value, Tensor) and not value.is_leaf):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return f"attribute {f'{name}.{attribute}'.lstrip('.')!r} is {type(value).__name__}"
    return ""
