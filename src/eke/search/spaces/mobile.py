"""The MobileNetV2-like space of ZiCo's search on ImageNet, with its mutation rules.

A network is a sequence of blocks: a stem (conv 3x3, stride 2), super-blocks of inverted residuals, a head (conv 1x1),
then mean and linear. A super-block E{e}K{k} has `layers` sub-layers, each two units

    conv 1x1 to e * bottleneck -> depthwise k x k -> conv 1x1 to bottleneck, then the same to `out`

with batch norm after each convolution and ReLU after all but the last; the first unit has the stride. A unit that
changes neither shape nor stride has a shortcut, and ReLU follows.

Mutation of a super-block draws e and k anew, multiplies out and bottleneck by one of nine factors, adds -2..2 to the
layers; of the stem, only the width changes; the head's never does. 6 or more layers are split into 3 and the rest.

Source: G. Li et al., ZiCo, 2023, and its search code. The shortcuts are a reconstruction from MobileNetV2's rule; the
paper scores networks without them, as `bare` builds them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any, NamedTuple

from torch import Tensor, nn

from .space import Choose, Space, images

FACTORS = (2.5, 2.0, 1.5, 1.25, 1.0, 1 / 1.25, 1 / 1.5, 1 / 2.0, 1 / 2.5)
"""What widths are multiplied by."""

EXPANSIONS, KERNELS = (1, 2, 4, 6), (3, 5, 7)
_WIDTHS = (8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_SPLIT = 6


class Block(NamedTuple):
    """A super-block.

    Args:
        expansion: e.
        kernel: k, odd.
        out: Channels out.
        stride: 1 or 2.
        bottleneck: Channels between the two units of a sub-layer.
        layers: Sub-layers.
    """

    expansion: int
    kernel: int
    out: int
    stride: int
    bottleneck: int
    layers: int


class Network(NamedTuple):
    """An architecture: the stem's width, the super-blocks, the head's width."""

    stem: int
    blocks: tuple[Block, ...]
    head: int


START = Network(
    8, tuple(Block(6, 3, out, 2, width, 1) for out, width in ((32, 8), (48, 32), (96, 48), (128, 96))), 2048
)
"""Where the paper's search starts (the bottlenecks are the widths in)."""


class Conv(NamedTuple):
    """One convolution with its batch norm: channels, kernel, stride, groups, pixels a side of its output."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    size: int


@dataclass(frozen=True)
class MobileNet(Space):
    """The space.

    Args:
        classes: Outputs.
        resolution: Height and width of the images.
        max_layers: Most sub-layers in all.
        image_channels: Of the images.
        stem_stride: Stride of the first convolution, 1 for small images.
        strides: Stride of each stage where `compose` makes a network.
    """

    classes: int = 1000
    resolution: int = 224
    max_layers: int = 14
    image_channels: int = 3
    stem_stride: int = 2
    strides: tuple[int, ...] = (2, 2, 2, 2)
    name = "mobile"

    def compose(self, choose: Choose) -> Network:
        """Return the network that choices make, one super-block a stage."""
        blocks = []
        for stage, stride in enumerate(self.strides):
            e, k = choose(f"{stage}.expansion", EXPANSIONS), choose(f"{stage}.kernel", KERNELS)
            out, width = choose(f"{stage}.out", _WIDTHS), choose(f"{stage}.bottleneck", _WIDTHS)
            blocks.append(Block(e, k, out, stride, width, choose(f"{stage}.layers", (1, 2, 3, 4, 5))))
        return Network(choose("stem", (8, 16, 24, 32)), tuple(blocks), START.head)

    def mutate(self, architecture: Any, rng: random.Random, *, changes: int = 2) -> Network:
        """Return a neighbour by the paper's rules; a block that is drawn twice changes once.

        Args:
            architecture: Stem, blocks and head.
            rng: Source of randomness.
            changes: Blocks that are drawn.
        """
        stem, blocks, head = network(architecture)
        places = {rng.randrange(len(blocks) + 1) for _ in range(changes)}
        if 0 in places:
            stem = _scaled(stem, rng)
        made = [_mutated(block, rng) if place in places else block for place, block in enumerate(blocks, start=1)]
        return Network(stem, tuple(part for block in made for part in _split(block)), head)

    def decode(self, architecture: Any) -> nn.Module:
        """Return the network with fresh weights."""
        return MobileNetwork(network(architecture), self, shortcuts=True)

    def bare(self, architecture: Any) -> nn.Module:
        """Return the network without shortcuts, as the paper scores it."""
        return MobileNetwork(network(architecture), self, shortcuts=False)

    def parameters(self, architecture: Any) -> int:
        """Return the number of parameters in closed form."""
        net = network(architecture)
        total = sum(c.kernel**2 * c.inputs * c.outputs // c.groups + 2 * c.outputs for c in self.convolutions(net))
        return total + (net.head + 1) * self.classes

    def flops(self, architecture: Any) -> int:
        """Return the FLOPs of one image in closed form."""
        net = network(architecture)
        convs = self.convolutions(net)
        total = sum(c.kernel**2 * c.inputs * c.outputs // c.groups * c.size**2 for c in convs)
        return 2 * (total + net.head * self.classes)

    def log_numel(self, architecture: Any) -> float:
        """Return the sum of ln(entries) over all weights; every one lies on the path."""
        net = network(architecture)
        convs = self.convolutions(net)
        return sum(log(c.kernel**2 * c.inputs * c.outputs // c.groups) for c in convs) + log(net.head * self.classes)

    def convolutions(self, net: Network) -> list[Conv]:
        """Return every convolution in order.

        Args:
            net: An architecture.
        """
        return [conv for unit in self._units(net) for conv in unit]

    def _units(self, net: Network) -> Iterator[list[Conv]]:
        size = -(-self.resolution // self.stem_stride)
        yield [Conv(self.image_channels, net.stem, 3, self.stem_stride, 1, size)]
        inputs = net.stem
        for block in net.blocks:
            wide = block.expansion * block.bottleneck
            for layer in range(block.layers):
                for outputs, stride in ((block.bottleneck, block.stride if layer == 0 else 1), (block.out, 1)):
                    before, size = size, -(-size // stride)
                    yield [
                        Conv(inputs, wide, 1, 1, 1, before),
                        Conv(wide, wide, block.kernel, stride, wide, size),
                        Conv(wide, outputs, 1, 1, 1, size),
                    ]
                    inputs = outputs
        yield [Conv(inputs, net.head, 1, 1, 1, size)]

    def fault(self, architecture: Any) -> str | None:
        """Return whether a network is deeper than `max_layers`."""
        layers = sum(block.layers for block in network(architecture).blocks)
        return None if layers <= self.max_layers else f"{layers} layers are more than max_layers={self.max_layers}"

    def example(self, batch: int = 1) -> Tensor:
        """Return images (batch, channels, resolution, resolution)."""
        return images(batch, self.image_channels, self.resolution)

    @property
    def smallest(self) -> Network:
        """All widths 8, one sub-layer a stage, no expansion."""
        return Network(8, tuple(Block(1, 3, 8, stride, 8, 1) for stride in self.strides), START.head)

    @property
    def start(self) -> Network:
        """Where the search starts: the paper's first network with the strides of this space."""
        chosen = zip(START.blocks, self.strides)
        return START._replace(blocks=tuple(block._replace(stride=stride) for block, stride in chosen))

    def describe(self, architecture: Any) -> str:
        """Return the blocks in the paper's manner."""
        net = network(architecture)
        parts = [f"conv3(out {net.stem})"]
        for b in net.blocks:
            parts.append(f"E{b.expansion}K{b.kernel}(out {b.out}, s{b.stride}, b{b.bottleneck}, n{b.layers})")
        return " | ".join([*parts, f"conv1({net.head})"])

    def settings(self) -> dict[str, Any]:
        """Return the name of the space and its numbers."""
        return {"space": self.name, **vars(self)}


def network(architecture: Any) -> Network:
    """Return an architecture with its names, from the plain tuples that JSON gives.

    Args:
        architecture: (stem, blocks, head).

    Returns:
        The same with names.

    Raises:
        ValueError: if it is no such thing, or a number is out of range.
    """
    try:
        stem, blocks, head = architecture
        net = Network(stem, tuple(Block(*block) for block in blocks), head)
        numbers = [net.stem, net.head, *(n for block in net.blocks for n in block)]
        odd = all(block.kernel % 2 for block in net.blocks)
        if net.blocks and odd and all(isinstance(n, int) and n > 0 for n in numbers):
            return net
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "An architecture of this space is (stem, ((expansion, odd kernel, out, stride, bottleneck, layers), ...), "
        f"head) in positive whole numbers, got {architecture!r:.200}."
    )


def _scaled(width: int, rng: random.Random) -> int:
    return max(8, round(width * rng.choice(FACTORS) / 8) * 8)


def _mutated(block: Block, rng: random.Random) -> Block:
    return Block(
        rng.choice(EXPANSIONS),
        rng.choice(KERNELS),
        _scaled(block.out, rng),
        block.stride,
        _scaled(block.bottleneck, rng),
        max(1, block.layers + rng.choice((-2, -1, 0, 1, 2))),
    )


def _split(block: Block) -> list[Block]:
    if block.layers < _SPLIT:
        return [block]
    return [block._replace(layers=3), block._replace(layers=block.layers - 3, stride=1)]


class Unit(nn.Module):
    """Convolutions with batch norms, ReLU between them, and a shortcut where shapes allow one."""

    def __init__(self, convs: list[Conv], *, shortcuts: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c in convs:
            layers += [
                nn.Conv2d(c.inputs, c.outputs, c.kernel, c.stride, c.kernel // 2, groups=c.groups, bias=False),
                nn.BatchNorm2d(c.outputs),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers[:-1])
        self.act = nn.ReLU()
        same = len(convs) == 3 and convs[0].inputs == convs[-1].outputs and convs[0].size == convs[-1].size
        self.shortcut = shortcuts and same

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs, h, w)."""
        y = self.layers(x)
        output: Tensor = self.act(x + y if self.shortcut else y)
        return output


class MobileNetwork(nn.Module):
    """The network of an architecture."""

    def __init__(self, net: Network, space: MobileNet, *, shortcuts: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Unit(unit, shortcuts=shortcuts) for unit in space._units(net)))
        self.head = nn.Linear(net.head, space.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits
