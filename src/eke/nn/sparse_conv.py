"""A 1 x 1 convolution that stores and multiplies only the entries that a mask keeps: `SparseLinear` on every pixel.

Images in the memory format channels_last are read where they are; others are turned on the way in and out.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from .sparse_linear import SparseLinear, Way


class SparseConv2d(nn.Module):
    """A 1 x 1 convolution with few weights.

    Args:
        linear: Its weights: channels in, channels out.
        stride: Steps between pixels.
    """

    def __init__(self, linear: SparseLinear, *, stride: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.linear, self.stride = linear, stride

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, mask: Tensor, *, way: Way | None = None) -> Self:
        """Take the kept entries of a dense convolution over.

        Args:
            conv: With a 1 x 1 kernel, one group and no padding; left as it is.
            mask: Kept entries, bool, of the weight's shape (out, in, 1, 1).
            way: See `SparseLinear`.

        Returns:
            A convolution with the outputs of the masked dense one.

        Raises:
            ValueError: if the convolution is of another kind, or the mask of another shape.
        """
        if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.padding not in {(0, 0), "valid", "same"}:
            raise ValueError(
                "SparseConv2d takes convolutions with a 1 x 1 kernel, one group and no padding, got "
                f"kernel_size={conv.kernel_size}, groups={conv.groups}, padding={conv.padding!r}; larger kernels pay "
                "with whole channels removed, not single entries."
            )
        if mask.shape != conv.weight.shape:
            raise ValueError(
                f"The mask must have the weight's shape {tuple(conv.weight.shape)}, got {tuple(mask.shape)}."
            )
        inner = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta")
        inner.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=conv.weight.requires_grad)
        if conv.bias is not None:
            inner.bias = nn.Parameter(conv.bias.detach(), requires_grad=conv.bias.requires_grad)
        linear = SparseLinear.from_dense(inner, mask.flatten(1), way=way)
        up, side = conv.stride
        return cls(linear, stride=(up, side)).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images.

        Args:
            x: (batch, channels, height, width), or without the batch.

        Returns:
            Images of `linear.out_features` channels, in x's memory format where it is channels_last.
        """
        up, side = self.stride
        # Its own work and that of the matrix are one: no module is called, so clocks at modules see both.
        y = self.linear.forward(x[..., ::up, ::side].movedim(-3, -1))
        return y.movedim(-1, -3)
