"""A convolution that stores and multiplies only the entries that a mask keeps: `SparseLinear` on every patch.

Patches are read channels last, (taps, channels) beside each other, so that cutting them out copies whole runs of
channels; as many images at a time as stay in the cache. Images in the memory format channels_last are read where they
are; others are turned on the way in and out. A 1 x 1 kernel needs no patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sparse_linear import SparseLinear, Way

_CACHED = 1 << 19
"""Entries of patches that are cut out at once."""


@dataclass(frozen=True)
class Window:
    """Where a kernel goes, vertically and horizontally.

    Args:
        size: Taps.
        stride: Steps between pixels.
        padding: Zeros on either side.
        dilation: Steps between taps.
    """

    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Window | None:
        """Return that of a convolution, None where it is not padded by as many zeros on either side."""
        size, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
        spans = [d * (k - 1) for d, k in zip(dilation, size)]
        if conv.padding_mode != "zeros" or (conv.padding == "same" and any(span % 2 for span in spans)):
            return None
        if conv.padding == "same":
            padding = [span // 2 for span in spans]
        else:
            padding = [0, 0] if conv.padding == "valid" else [int(side) for side in conv.padding]
        return cls((size[0], size[1]), (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))

    def cut(self, x: Tensor) -> Tensor:
        """Return the patches of images (batch, height, width, channels), (batch, height, width, taps * channels)."""
        (up, side), (step_up, step_side) = self.padding, self.stride
        if self.size == (1, 1):
            return F.pad(x, (0, 0, side, side, up, up))[:, ::step_up, ::step_side]
        x = F.pad(x, (0, 0, side, side, up, up)) if up or side else x
        for dim, (taps, step, apart) in enumerate(zip(self.size, self.stride, self.dilation), start=1):
            x = x.unfold(dim, apart * (taps - 1) + 1, step)[..., ::apart]
        return x.permute(0, 1, 2, 4, 5, 3).flatten(3)


class SparseConv2d(nn.Module):
    """A convolution with few weights.

    Args:
        linear: Its weights, from taps * channels (each tap's channels beside each other) to channels.
        window: Where the kernel goes.
    """

    def __init__(self, linear: SparseLinear, *, window: Window | None = None) -> None:
        super().__init__()
        self.linear, self.window = linear, window or Window()

    @classmethod
    def fits(cls, conv: nn.Module) -> bool:
        """Return whether `from_dense` takes a module."""
        return type(conv) is nn.Conv2d and conv.groups == 1 and Window.of(conv) is not None

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, mask: Tensor, *, way: Way | None = None) -> Self:
        """Take the kept entries of a dense convolution over.

        Args:
            conv: With one group, and padded by as many zeros on either side; left as it is.
            mask: Kept entries, bool, of the weight's shape (out, in, height, width).
            way: See `SparseLinear`.

        Returns:
            A convolution with the outputs of the masked dense one.

        Raises:
            ValueError: if the convolution is of another kind, or the mask of another shape.
        """
        window = Window.of(conv)
        if conv.groups != 1 or window is None:
            raise ValueError(
                "SparseConv2d takes convolutions with one group and as many zeros on either side, got "
                f"kernel_size={conv.kernel_size}, groups={conv.groups}, padding={conv.padding!r}, "
                f"padding_mode={conv.padding_mode!r}; others pay with whole channels removed, not single entries."
            )
        if mask.shape != conv.weight.shape:
            raise ValueError(
                f"The mask must have the weight's shape {tuple(conv.weight.shape)}, got {tuple(mask.shape)}."
            )
        weight = conv.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous()
        inner = nn.Linear(weight.shape[1], weight.shape[0], bias=conv.bias is not None, device="meta")
        inner.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        if conv.bias is not None:
            inner.bias = nn.Parameter(conv.bias.detach(), requires_grad=conv.bias.requires_grad)
        linear = SparseLinear.from_dense(inner, mask.permute(0, 2, 3, 1).flatten(1), way=way)
        return cls(linear, window=window).train(conv.training)

    def to_dense(self) -> Tensor:
        """Return the weight with its zeros, (out, in, height, width)."""
        weight = self.linear.to_dense()
        return weight.view(len(weight), *self.window.size, -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images.

        Args:
            x: (batch, channels, height, width), or without the batch.

        Returns:
            Images of `linear.out_features` channels, in x's memory format where it is channels_last.
        """
        images = (x if x.dim() == 4 else x[None]).movedim(1, 3)
        # Its own work and that of the matrix are one: no module is called, so clocks at modules see both.
        if self.window.size == (1, 1) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            y = self.linear.forward(self.window.cut(images))
        else:
            y = self._by_part(images)
        y = y.movedim(3, 1)
        return y if x.dim() == 4 else y[0]

    def _by_part(self, images: Tensor) -> Tensor:
        """Return the outputs of images (batch, height, width, channels), some at a time."""
        taps = self.window.size[0] * self.window.size[1]
        each = max(1, images[:1].numel() * taps // (self.window.stride[0] * self.window.stride[1]))
        parts = [self.linear.forward(self.window.cut(part)) for part in torch.split(images, max(1, _CACHED // each))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
