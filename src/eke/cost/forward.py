"""Rehearse one forward pass on a copy of a model, so that nothing of the user's is touched.

The copy is in eval mode, its tensors are fake (shapes without data), and nothing is computed. Where the forward pass
depends on data (`.item()`, packed sequences, sparse or quantised weights), the copy holds real tensors and runs once.
Both give the same shapes, hence the same counts. MHA's fused fast path is off: it hides the products inside.

Cost: seconds at most and no memory with fake tensors; one more model and one forward pass otherwise.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

Observer = TypeVar("Observer", bound=AbstractContextManager[Any])


def call(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return `model(*inputs)`; one mapping is passed as keywords where `forward` accepts its keys.

    Args:
        model: Module to call.
        inputs: Positional inputs, or one mapping of named inputs.

    Returns:
        What the model returns.
    """
    if len(inputs) == 1 and isinstance(inputs[0], Mapping) and _takes_keywords(model, inputs[0]):
        return model(**inputs[0])
    return model(*inputs)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module behind `torch.compile`, DataParallel or DistributedDataParallel.

    Args:
        model: A module, wrapped or not.

    Returns:
        The module that holds the user's forward.

    Raises:
        TypeError: if it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got {type(model).__name__}; pass the model itself.")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def rehearse(
    model: nn.Module, inputs: tuple[Any, ...], observe: Callable[[nn.Module, tuple[Any, ...]], Observer]
) -> Observer:
    """Run one forward pass of a copy of `model` inside an observer.

    Args:
        model: Module; it is not touched, nor are its buffers, flags, hooks or the global RNG.
        inputs: Its inputs, see `call`; they are not touched either.
        observe: Makes a fresh context manager from the copied model and inputs; it sees every operation.

    Returns:
        The observer, after a complete forward pass.
    """
    model = unwrap(model)
    with torch.inference_mode(False), torch.no_grad(), _plain_attention():
        if _has_only_plain_tensors(model, inputs):
            try:
                return _rehearse_with_shapes(model, inputs, observe)
            except Exception:
                # Data-dependent forward passes fail in many ways here; the real run raises what is the user's to see.
                return _rehearse_with_data(model, inputs, observe)
        return _rehearse_with_data(model, inputs, observe)


def _rehearse_with_shapes(
    model: nn.Module, inputs: tuple[Any, ...], observe: Callable[[nn.Module, tuple[Any, ...]], Observer]
) -> Observer:
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    double, fed = _copied(model, inputs, shapes.from_tensor)
    with shapes, observe(double, fed) as observer:
        call(double, fed)
    return observer  # type: ignore[no-any-return]


def _rehearse_with_data(
    model: nn.Module, inputs: tuple[Any, ...], observe: Callable[[nn.Module, tuple[Any, ...]], Observer]
) -> Observer:
    double, fed = _copied(model, inputs, _cloned)
    devices = {tensor.get_device() for tensor in model.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(sorted(devices)), observe(double, fed) as observer:
        call(double, fed)
    return observer  # type: ignore[no-any-return]


def _copied(
    model: nn.Module, inputs: tuple[Any, ...], convert: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a copy in eval mode with each tensor converted once, so that tied tensors stay tied.

    Raises:
        RuntimeError: if an attribute cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _attribute_tensors(model):
        if id(tensor) not in memo and not is_lazy(tensor):
            memo[id(tensor)] = convert(tensor)
    try:
        double = copy.deepcopy(model, memo)
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and costs are counted on a "
            "copy. Remove the attribute that cannot be copied, or give the module a __deepcopy__ method."
        ) from error
    fed = tree_map(lambda leaf: convert(leaf) if isinstance(leaf, Tensor) else leaf, inputs)
    return double.eval(), fed


def _cloned(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    return nn.Parameter(clone, requires_grad=False) if isinstance(tensor, nn.Parameter) else clone


def _attribute_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for leaf in tree_leaves(vars(module)):
            if isinstance(leaf, Tensor):
                yield leaf


def _has_only_plain_tensors(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    tensors = [*_attribute_tensors(model), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    return all(
        tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested for tensor in tensors
    )


def _takes_keywords(model: nn.Module, named: Mapping[Any, Any]) -> bool:
    try:
        inspect.signature(unwrap(model).forward).bind(**named)
    except TypeError:
        return False
    return True


@contextmanager
def _plain_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
