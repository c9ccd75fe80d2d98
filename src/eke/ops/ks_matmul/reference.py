"""What a Kronecker-sparse product is: the specification every backend must agree with.

blocks of shape (a, b, c, d) are the free entries of K with support I_a x 1_(b x c) x I_d:
    K[i*b*d + k*d + j, i*c*d + l*d + j] = blocks[i, k, l, j].
Batch first: y = x K^T, einsum("nacd,abcd->nabd"). Batch last: y = K x, einsum("acdn,abcd->abdn").
Cost: 2 a b c d operations a sample, against 2 (a b d)(a c d) of the dense matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply rows by K^T.

    Args:
        x: Inputs, (batch, a*c*d).
        blocks: Free entries, (a, b, c, d).

    Returns:
        Outputs, (batch, a*b*d).
    """
    a, b, c, d = blocks.shape
    return torch.einsum("nacd,abcd->nabd", x.reshape(-1, a, c, d), blocks).reshape(x.shape[0], a * b * d)


def matmul_batch_last(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply K by columns.

    Args:
        x: Inputs, (a*c*d, batch).
        blocks: Free entries, (a, b, c, d).

    Returns:
        Outputs, (a*b*d, batch).
    """
    a, b, c, d = blocks.shape
    return torch.einsum("acdn,abcd->abdn", x.reshape(a, c, d, -1), blocks).reshape(a * b * d, x.shape[1])


def gradient(x: Tensor, grad: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Differentiate sum(grad * matmul(x, blocks)) with respect to the blocks.

    Args:
        x: Inputs, (batch, a*c*d).
        grad: Gradient of the outputs, (batch, a*b*d).
        shape: (a, b, c, d).

    Returns:
        Gradient of the blocks, (a, b, c, d).
    """
    a, b, c, d = shape
    return torch.einsum("nabd,nacd->abcd", grad.reshape(-1, a, b, d), x.reshape(-1, a, c, d))


def gradient_batch_last(x: Tensor, grad: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Differentiate sum(grad * matmul_batch_last(x, blocks)) with respect to the blocks.

    Args:
        x: Inputs, (a*c*d, batch).
        grad: Gradient of the outputs, (a*b*d, batch).
        shape: (a, b, c, d).

    Returns:
        Gradient of the blocks, (a, b, c, d).
    """
    a, b, c, d = shape
    return torch.einsum("abdn,acdn->abcd", grad.reshape(a, b, d, -1), x.reshape(a, c, d, -1))


def dense(blocks: Tensor) -> Tensor:
    """Return K itself, (a*b*d, a*c*d)."""
    a, b, c, d = blocks.shape
    full = blocks.new_zeros(a, b, d, a, c, d)
    i = torch.arange(a, device=blocks.device)[:, None]
    j = torch.arange(d, device=blocks.device)[None, :]
    # Indexed dimensions come first: (a, d, b, c).
    full[i, :, j, i, :, j] = blocks.permute(0, 3, 1, 2)
    return full.reshape(a * b * d, a * c * d)
