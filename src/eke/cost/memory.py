"""Peak memory of one inference forward pass: weights, inputs and the activations alive at the worst moment.

Every operation of the pass is watched; a storage lives from the operation that first returns it until Python drops
it. Views and in-place results share their storage and count once. Scratch memory inside kernels is not seen, nor is
what an allocator rounds up: the number is a property of the network, the same on every run and machine.

Cost: see `forward`; for most networks nothing is computed.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .forward import rehearse


def peak_memory(model: nn.Module, *inputs: Any) -> int:
    """Return the bytes of weights and live activations at the peak of one inference forward pass.

    Args:
        model: Module in any mode; it is not touched.
        *inputs: Inputs of `forward`, or one mapping of its keyword inputs. They count, as the caller holds them.

    Returns:
        Bytes of parameters and buffers, tied ones once, plus the peak of inputs and activations.
    """
    return rehearse(model, inputs, _Watch).peak


def give_back() -> None:
    """Return memory that was freed to the system, where the C library would keep it (glibc); nothing elsewhere.

    After a stage that worked with many tensors of some megabytes, more than a gigabyte can lie between those that stay.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow which storages are alive after each operation."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0
        self.note(chain(model.parameters(), model.buffers(), tree_leaves(inputs)))

    def note(self, values: Iterable[Any]) -> None:
        """Add the storages of new values and update the peak."""
        for storage in chain.from_iterable(_storages(value) for value in values if isinstance(value, Tensor)):
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self.alive[reference] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        # What died since the last operation is gone by now; this operation's inputs are held by `args`.
        dead = [reference for reference in self.alive if reference.expired()]  # type: ignore[no-untyped-call]
        for reference in dead:
            del self.alive[reference]
        self.note(tree_leaves(results))
        return results


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [part.untyped_storage() for part in parts]
