"""The boundary of a matrix site: module inputs and outputs as rows that multiply its matrix.

A convolution is a matrix product on patches. With x the patches of the input and W the (m, n) matrix of the layer,

    y[s, l, i] = sum_j W[i, j] x[s, l, group(i), j] + bias[i]

for sample s, location l and the group that output row i belongs to. A linear layer has one group and one location per
leading index after the first; a transposed convolution is an ordinary one with stride 1 and a flipped kernel on the
input with stride-1 zeros between its entries. Nothing here holds parameters; everything is differentiable.

Cost: unfolding copies the input prod(kernel)/prod(stride) times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input.

    Args:
        kernel: Kernel size per spatial dimension.
        stride: Stride per spatial dimension.
        padding: (before, after) per spatial dimension; of a transposed convolution as its module states it.
        dilation: Dilation per spatial dimension.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        groups: Groups of channels.
        transposed: Whether it is a transposed convolution.
        output_padding: Extra size at the end per spatial dimension (transposed convolutions only).
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.modules.conv._ConvNd) -> Geometry:
        """Return the geometry of a convolution module."""
        if isinstance(module.padding, str):
            spans = [
                d * (k - 1) if module.padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size)
            ]
            padding = tuple((span // 2, span - span // 2) for span in spans)
        else:
            padding = tuple((int(p), int(p)) for p in module.padding)
        return cls(
            tuple(module.kernel_size),
            tuple(module.stride),
            padding,
            tuple(module.dilation),
            module.padding_mode,
            module.groups,
            module.transposed,
            tuple(module.output_padding),
        )


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Cut the input of a convolution into the rows that its matrix multiplies.

    Args:
        x: Input of the module, (samples, channels, *space) or (channels, *space).
        geometry: Of the convolution.

    Returns:
        (samples, locations, groups, channels / groups * prod(kernel)); locations in row-major order of the output.
    """
    dims = len(geometry.kernel)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    x = _stuffed_and_padded(x, geometry)
    stride = (1,) * dims if geometry.transposed else geometry.stride
    for i, (k, s, d) in enumerate(zip(geometry.kernel, stride, geometry.dilation)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    if geometry.transposed:
        x = x.flip(tuple(range(x.dim() - dims, x.dim())))
    samples, channels = x.shape[:2]
    x = x.flatten(2 + dims).flatten(2, 1 + dims)  # (samples, channels, locations, prod(kernel))
    x = x.reshape(samples, geometry.groups, channels // geometry.groups, *x.shape[2:])
    return x.permute(0, 3, 1, 2, 4).reshape(samples, x.shape[3], geometry.groups, -1)


def _stuffed_and_padded(x: Tensor, geometry: Geometry) -> Tensor:
    pads = geometry.padding
    if geometry.transposed:
        sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], geometry.stride)]
        every_other = (slice(None), slice(None), *(slice(None, None, s) for s in geometry.stride))
        stuffed = x.new_zeros(*x.shape[:2], *sizes)
        stuffed[every_other] = x
        x = stuffed
        reach = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel)]
        pads = tuple((r - p, r - q + o) for r, (p, q), o in zip(reach, pads, geometry.output_padding))
    flat = [side for pair in reversed(pads) for side in pair]
    if not any(flat):
        return x
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, flat, mode=mode)


def channels_last_rows(y: Tensor, width: int) -> Tensor:
    """Reshape (samples, ..., width), or (width,), to (samples, locations, width).

    Args:
        y: Tensor whose last dimension holds the channels.
        width: Size that it must have.

    Returns:
        A view where possible; one location if there is nothing between the first and the last dimension.

    Raises:
        ValueError: if the last dimension differs from `width`.
    """
    if y.dim() == 0 or y.shape[-1] != width:
        raise ValueError(f"A tensor whose last dimension is {width} is needed here, got shape {tuple(y.shape)}.")
    if y.dim() == 1:
        return y.reshape(1, 1, width)
    return y.reshape(y.shape[0], int(torch.Size(y.shape[1:-1]).numel()), width)


def channels_first_rows(y: Tensor, width: int, dims: int) -> Tensor:
    """Reshape (samples, width, *space) to (samples, locations, width), locations in row-major order.

    Args:
        y: Output of a convolution, or its gradient; without samples: (width, *space).
        width: Number of channels it must have.
        dims: Number of spatial dimensions.

    Returns:
        (samples, locations, width).

    Raises:
        ValueError: if the shape does not fit.
    """
    if y.dim() == dims + 1:
        y = y.unsqueeze(0)
    if y.dim() != dims + 2 or y.shape[1] != width:
        raise ValueError(
            f"A tensor of shape (samples, {width}, and {dims} sizes) is needed here, got shape {tuple(y.shape)}."
        )
    return y.flatten(2).transpose(1, 2)
