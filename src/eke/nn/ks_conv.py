"""A convolution whose weight matrix (out, in * height * width) is a product of Kronecker-sparse factors.

Every patch of the image is a row for `KSLinear`. A 1 x 1 convolution takes the pixels as they are; a larger kernel
unfolds the patches first, which costs height * width times the image in memory.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ..patterns import Chain
from .ks_linear import ChainName, KSLinear


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class KSConv2d(nn.Module):
    """A two-dimensional convolution with a product of Kronecker-sparse factors as its weight.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the result.
        kernel_size: Height and width of a patch.
        chain: The factors of the (out_channels, in_channels * height * width) matrix, or the name of a kind.
        rank: For a named chain.
        blocks: For chain="monarch".
        stride: Steps between patches.
        padding: Zeros around the image.
        dilation: Steps between the pixels of a patch.
        bias: Whether to add a trained bias.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        chain: Chain | ChainName,
        rank: int | None = None,
        blocks: int | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        height, width = self.kernel_size
        self.in_channels, self.out_channels = in_channels, out_channels
        self.linear = KSLinear(
            in_channels * height * width, out_channels, chain=chain, rank=rank, blocks=blocks, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, *, chain: Chain | ChainName, rank: int | None = None, blocks: int | None = None
    ) -> Self:
        """Project a dense convolution.

        Args:
            conv: With one group and zero padding; left as it is.
            chain: A chainable chain, or the name of a kind.
            rank: For a named chain.
            blocks: For chain="monarch".

        Returns:
            A convolution near the dense one.

        Raises:
            ValueError: if the convolution has groups, or pads by a name or with other values than zeros.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                "KSConv2d.from_dense takes one group and a number of zeros as padding, got "
                f"groups={conv.groups}, padding={conv.padding!r}, padding_mode={conv.padding_mode!r}."
            )
        weight = conv.weight.detach()
        dense = nn.Linear(weight[0].numel(), conv.out_channels, bias=conv.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.flatten(1), requires_grad=False)
        if conv.bias is not None:
            dense.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
        linear = KSLinear.from_dense(dense, chain=chain, rank=rank, blocks=blocks)
        height, width = conv.kernel_size
        (up, side), (down, right), (tall, broad) = conv.stride, conv.padding, conv.dilation
        layer = cls(
            conv.in_channels, conv.out_channels, (height, width), chain=linear.chain, stride=(up, side),
            padding=(down, right), dilation=(tall, broad), bias=conv.bias is not None, device="meta",
        )  # fmt: skip
        layer.linear = linear
        return layer.train(conv.training).requires_grad_(conv.weight.requires_grad)

    def to_dense(self) -> Tensor:
        """Return the weight, (out_channels, in_channels, height, width)."""
        return self.linear.to_dense().reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a batch of images.

        Args:
            x: (batch, in_channels, height, width).

        Returns:
            (batch, out_channels, height', width').

        Raises:
            ValueError: if x is no such batch.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"KSConv2d takes (batch, {self.in_channels}, height, width), got {tuple(x.shape)}.")
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            pixels = x[:, :, :: self.stride[0], :: self.stride[1]]
            y: Tensor = self.linear(pixels.movedim(1, -1)).movedim(-1, 1)
            return y
        sizes = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride
            )
        ]
        patches = nn.functional.unfold(
            x, self.kernel_size, dilation=self.dilation, padding=self.padding, stride=self.stride
        )
        y = self.linear(patches.transpose(1, 2)).transpose(1, 2)
        return y.reshape(x.shape[0], self.out_channels, *sizes)

    def extra_repr(self) -> str:
        """Return what print(layer) shows."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
