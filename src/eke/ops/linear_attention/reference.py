"""What linear attention is: the recurrence that every other form must agree with, one position at a time.

    S_t = diag(a_t) S_{t-1} + k_t u_t^T,   z_t = a_t z_{t-1} + k_t,   o_t = S_t^T q_t  [/ (z_t . q_t + eps)]
    u_t = v_t,  or with the delta rule  u_t = b_t (v_t - (diag(a_t) S_{t-1})^T k_t)

on features q, k (dim D) and values v (dim M). Decay a: none, a number a head and position (RetNet, Mamba-2), or one a
key channel as well (GLA). Cost: 2 D M operations a position, head and state; state (D, M) and (D).
Sources: Katharopoulos and others, 2020; Sun and others, "Retentive network", 2023; Yang and others, "Gated linear
attention", 2024, and "Gated delta networks", 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    inputs: tuple[Tensor, Tensor, Tensor], decay: Tensor | None, beta: Tensor | None, state: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance by one position.

    Args:
        inputs: Features q and k (..., D), values v (..., M).
        decay: (..., 1) or (..., D) in (0, 1], or None.
        beta: (...,) of the delta rule, or None.
        state: S, (..., D, M).
        sums: z, (..., D).

    Returns:
        Numerators (..., M), denominators (...,), S, z.
    """
    q, k, v = inputs
    if decay is not None:
        state, sums = decay.unsqueeze(-1) * state, decay * sums
    if beta is not None:
        v = beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ state).squeeze(-2))
    state, sums = state + k.unsqueeze(-1) * v.unsqueeze(-2), sums + k
    return (q.unsqueeze(-2) @ state).squeeze(-2), (q * sums).sum(-1), state, sums


def recurrent(
    inputs: tuple[Tensor, Tensor, Tensor], log_decay: Tensor | None, beta: Tensor | None, state: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go through a sequence position by position.

    Args:
        inputs: Features q and k (batch, heads, length, D), values v (batch, heads, length, M).
        log_decay: (batch, heads, length, 1 or D), not above zero, or None.
        beta: (batch, heads, length), or None.
        state: S before the first position, (batch, heads, D, M).
        sums: z before the first position, (batch, heads, D).

    Returns:
        Numerators (batch, heads, length, M), denominators (batch, heads, length), S and z after the last position.
    """
    numerators, denominators = [], []
    for t in range(inputs[0].shape[2]):
        now = (inputs[0][:, :, t], inputs[1][:, :, t], inputs[2][:, :, t])
        decay = None if log_decay is None else log_decay[:, :, t].exp()
        top, bottom, state, sums = step(now, decay, None if beta is None else beta[:, :, t], state, sums)
        numerators.append(top)
        denominators.append(bottom)
    if not numerators:
        return inputs[2].new_zeros(inputs[2].shape), inputs[0].new_zeros(inputs[0].shape[:3]), state, sums
    return torch.stack(numerators, 2), torch.stack(denominators, 2), state, sums
