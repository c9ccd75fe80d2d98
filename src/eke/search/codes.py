"""Proxies made of the on-off codes of rectifiers: NASWOT and SWAP.

Each unit behind a rectifier (ReLU and its kin; for smooth ones the sign of what goes in) is on or off for each sample.

    naswot = ln det K,  K[i, j] = number of units with the same code in samples i and j  (-inf if two samples agree)
    swap   = number of distinct patterns over the samples that units show

Sources: J. Mellor et al., "Neural Architecture Search without Training", 2021; Y. Peng et al., SWAP-NAS, 2024.
The first batch is used. Cost: a forward pass and, for n samples and V units, n^2 V multiply-adds (NASWOT) or a sort of
V numbers (SWAP).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..cost.forward import call
from .subject import inputs_of
from .sweep import Subject

aten = torch.ops.aten

RECTIFIERS = frozenset({
    *(aten.relu, aten.relu_, aten.gelu, aten.silu, aten.silu_, aten.hardswish, aten.hardswish_, aten.hardtanh),
    *(aten.hardtanh_, aten.leaky_relu, aten.leaky_relu_, aten.elu, aten.elu_, aten.mish, aten.mish_),
})  # fmt: skip
"""Operations whose input's sign is a code."""

_BITS = 62


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gather codes (samples, units) of every rectifier that runs."""

    def __init__(self, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples = samples
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in RECTIFIERS and args[0].ndim > 1 and len(args[0]) == self.samples:
            self.found.append((args[0] > 0).flatten(1))
        return func(*args, **(kwargs or {}))


def codes(subject: Subject, name: str) -> list[Tensor]:
    """Return the codes of the first batch.

    Args:
        subject: What is scored.
        name: Of the proxy, for messages.

    Returns:
        One bool tensor (samples, units) a rectifier.

    Raises:
        ValueError: if no rectifier ran.
    """
    inputs = inputs_of(subject.first(name))
    leading = next(iter(inputs[0].values())) if isinstance(inputs[0], dict) else inputs[0]
    with torch.no_grad(), _Watch(len(leading)) as watch:
        call(subject.model, inputs)
    found: list[Tensor] = watch.found
    if not found:
        raise ValueError(
            f"{name} reads the codes of rectifiers (ReLU, GELU, SiLU, ...) and none ran in "
            f"{type(subject.model).__name__}; leave {name!r} out."
        )
    return found


def naswot(subject: Subject) -> float:
    """Return the log determinant of the kernel of codes; -inf where two samples cannot be told apart."""
    found = codes(subject, "naswot")
    samples = len(found[0])
    kernel = torch.zeros(samples, samples, dtype=torch.float64)
    for code in found:
        signs = code.to(torch.float32).mul_(2).sub_(1)
        # (units + sum of s s') / 2 units agree; sums of up to 2^24 ones are exact in float32
        kernel += (signs @ signs.T).double().cpu().add_(code.shape[1]).div_(2)
    sign, logarithm = torch.linalg.slogdet(kernel)
    return float(logarithm) if float(sign) > 0 else float("-inf")


def swap(subject: Subject) -> float:
    """Return the number of distinct activation patterns over the samples."""
    patterns = torch.cat([code.T for code in codes(subject, "swap")])
    groups = [patterns[:, start : start + _BITS] for start in range(0, patterns.shape[1], _BITS)]
    keys = torch.stack([_key(group) for group in groups], 1)
    distinct = torch.unique(keys.flatten()) if len(groups) == 1 else torch.unique(keys, dim=0)
    return float(len(distinct))


def _key(bits: Tensor) -> Tensor:
    """Return each row of bits as one whole number."""
    key = torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    for place in range(bits.shape[1]):
        key |= bits[:, place].to(torch.int64) << place
    return key
