"""NAS-Bench-201: all cells of six edges with one of five operations each, 15 625 networks.

A cell has nodes 0..3; node j is the sum over i < j of operation (i, j) applied to node i, node 0 is the input and
node 3 the output. The network: conv 3x3 to c channels, batch norm; three stages of n cells with c, 2c, 4c channels, a
residual reduction block before the second and the third; batch norm, ReLU, mean over pixels, linear.

An architecture is six letters, the edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3 in this order: a none, b identity, c conv 1x1,
d conv 3x3, e mean over 3x3. Convolutions are ReLU, conv, batch norm.

Source: X. Dong and Y. Yang, NAS-Bench-201, 2020. Parameters agree with its table for all networks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from .space import Choose, Space, images

EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""Edges in the order of the letters."""

_LETTERS = "abcde"
_KERNEL = {"c": 1, "d": 3}


@dataclass(frozen=True)
class NasBench201(Space):
    """The space of NAS-Bench-201.

    Args:
        classes: Outputs.
        resolution: Height and width of the images; the table is of 32 (CIFAR) and 16 (ImageNet16-120).
        channels: Of the first stage.
        cells: In each stage.
        image_channels: Of the images.
    """

    classes: int = 10
    resolution: int = 32
    channels: int = 16
    cells: int = 5
    image_channels: int = 3
    name = "nb201"

    def compose(self, choose: Choose) -> str:
        """Return the architecture that six choices make."""
        return "".join(choose(f"{i}-{j}", tuple(_LETTERS)) for i, j in EDGES)

    def choices(self, architecture: str) -> dict[str, Any]:
        """Return the letter of each edge."""
        return {f"{i}-{j}": letter for (i, j), letter in zip(EDGES, checked(architecture))}

    def decode(self, architecture: str, classes: int | None = None) -> nn.Module:
        """Return the network with fresh weights.

        Args:
            architecture: Six letters.
            classes: Outputs; the space's own if not given.
        """
        return CellNetwork(checked(architecture), self, self.classes if classes is None else classes)

    def parameters(self, architecture: str, classes: int | None = None) -> int:
        """Return the number of parameters in closed form.

        Args:
            architecture: Six letters.
            classes: Outputs; the space's own if not given.
        """
        kernels = [_KERNEL[letter] for letter in checked(architecture) if letter in _KERNEL]
        total = 9 * self.image_channels * self.channels + 2 * self.channels
        for c in self._widths:
            total += self.cells * sum(k * k * c * c + 2 * c for k in kernels)
        for i, o in self._reductions:
            total += 9 * i * o + 9 * o * o + i * o + 4 * o
        last = self._widths[-1]
        return total + 2 * last + (last + 1) * (self.classes if classes is None else classes)

    def flops(self, architecture: str) -> int:
        """Return the FLOPs of one image in closed form; a convolution that leads nowhere is run and counts."""
        kernels = [_KERNEL[letter] for letter in checked(architecture) if letter in _KERNEL]
        sizes = self._sizes
        total = 9 * self.image_channels * self.channels * sizes[0] ** 2
        for c, size in zip(self._widths, sizes):
            total += self.cells * sum(k * k * c * c for k in kernels) * size**2
        for (i, o), size in zip(self._reductions, sizes[1:]):
            total += (9 * i * o + 9 * o * o + i * o) * size**2
        return 2 * (total + self._widths[-1] * self.classes)

    def connected(self, architecture: str) -> bool:
        """Return whether some path without `none` leads from the input to the output of the cell."""
        return bool(_alive(checked(architecture)))

    def log_numel(self, architecture: str, classes: int | None = None) -> float:
        """Return the sum of ln(entries) over the weights that lie on a path from input to output; 0 without a path.

        Args:
            architecture: Six letters.
            classes: Outputs; the space's own if not given.
        """
        alive = _alive(checked(architecture))
        if not alive:
            return 0.0
        kernels = [_KERNEL[architecture[edge]] for edge in alive if architecture[edge] in _KERNEL]
        total = log(9 * self.image_channels * self.channels)
        for c in self._widths:
            total += self.cells * sum(log(k * k * c * c) for k in kernels)
        for i, o in self._reductions:
            total += log(9 * i * o) + log(9 * o * o) + log(i * o)
        return total + log(self._widths[-1] * (self.classes if classes is None else classes))

    def fault(self, architecture: str) -> str | None:
        """Return what is wrong with a cell whose output does not depend on its input."""
        if self.connected(architecture):
            return None
        return f"the cell {architecture!r} has no path from its input to its output, so the network is a constant"

    def example(self, batch: int = 1) -> Tensor:
        """Return images (batch, channels, resolution, resolution)."""
        return images(batch, self.image_channels, self.resolution)

    @property
    def smallest(self) -> str:
        """The cell whose only edge is the identity from input to output."""
        return "aaabaa"

    def settings(self) -> dict[str, Any]:
        """Return the name of the space and its numbers."""
        return {"space": self.name, **vars(self)}

    @property
    def _widths(self) -> tuple[int, int, int]:
        return self.channels, 2 * self.channels, 4 * self.channels

    @property
    def _reductions(self) -> tuple[tuple[int, int], tuple[int, int]]:
        first, second, third = self._widths
        return (first, second), (second, third)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        half = (self.resolution + 1) // 2
        return self.resolution, half, (half + 1) // 2


def checked(architecture: str) -> str:
    """Return an architecture of NAS-Bench-201.

    Args:
        architecture: Six letters.

    Returns:
        The same.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(architecture, str) or len(architecture) != len(EDGES) or not set(architecture) <= set(_LETTERS):
        raise ValueError(
            f"An architecture of NAS-Bench-201 is six of the letters a none, b identity, c conv 1x1, d conv 3x3, "
            f"e mean 3x3, one for each edge 0-1, 0-2, 1-2, 0-3, 1-3, 2-3, such as 'dddbdc'; got {architecture!r}."
        )
    return architecture


def _alive(architecture: str) -> list[int]:
    """Return the places of the edges that lie on a path from node 0 to node 3."""
    used = [(edge, i, j) for edge, (i, j) in enumerate(EDGES) if architecture[edge] != "a"]
    reached, leads = {0}, {3}
    # edges are sorted by their end, so one pass in each direction is enough
    for _, i, j in used:
        if i in reached:
            reached.add(j)
    for _, i, j in reversed(used):
        if j in leads:
            leads.add(i)
    return [edge for edge, i, j in used if i in reached and j in leads]


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(outputs))


class Cell(nn.Module):
    """One cell: (batch, channels, h, w) to the same shape."""

    def __init__(self, architecture: str, channels: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.edges = nn.ModuleDict()
        for (i, j), letter in zip(EDGES, architecture):
            if letter in _KERNEL:
                self.edges[f"{i}-{j}"] = _convolution(channels, channels, _KERNEL[letter])
            elif letter == "e":
                self.edges[f"{i}-{j}"] = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return node 3; a node without incoming edges is zero."""
        nodes = [x]
        for node in (1, 2, 3):
            terms = [
                nodes[i] if letter == "b" else self.edges[f"{i}-{j}"](nodes[i])
                for (i, j), letter in zip(EDGES, self.architecture)
                if j == node and letter != "a"
            ]
            nodes.append(functools.reduce(torch.add, terms) if terms else torch.zeros_like(x))
        output: Tensor = nodes[3]
        return output


class Reduction(nn.Module):
    """Half the pixels, twice the channels: two convolutions beside mean and conv 1x1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride=2)
        self.second = _convolution(outputs, outputs, 3)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs, h / 2, w / 2)."""
        output: Tensor = self.shortcut(x) + self.second(self.first(x))
        return output


class CellNetwork(nn.Module):
    """The network around the cells."""

    def __init__(self, architecture: str, space: NasBench201, classes: int) -> None:
        super().__init__()
        first = space.channels
        self.stem = nn.Sequential(
            nn.Conv2d(space.image_channels, first, 3, padding=1, bias=False), nn.BatchNorm2d(first)
        )
        blocks: list[nn.Module] = []
        for stage, c in enumerate((first, 2 * first, 4 * first)):
            blocks += [Reduction(c // 2, c)] if stage else []
            blocks += [Cell(architecture, c) for _ in range(space.cells)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(4 * first)
        self.act = nn.ReLU()
        self.head = nn.Linear(4 * first, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        features = self.act(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


NB201 = NasBench201()
"""The space as in the table: 10 classes, images of 3 x 32 x 32; `dataclasses.replace(NB201, ...)` for others."""
