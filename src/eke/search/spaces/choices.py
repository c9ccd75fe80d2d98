"""Spaces made of a few named choices: the user's own, and width and depth of timm's residual networks and transformers.

An architecture is the tuple of the chosen values, in the order of the names. `Choices` takes any function that builds a
network; where no formula is given, costs are counted on the built network (once an architecture, no data are computed).

Source of the networks: K. He et al., "Deep Residual Learning", 2016; A. Dosovitskiy et al., "An Image is Worth 16x16
Words", 2021; built by timm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ... import cost
from ..._errors import require
from ..subject import built
from .space import Choose, Space, images


@dataclass(frozen=True)
class Choices(Space):
    """A space of the user's.

    Args:
        options: Values by name: strings, numbers or booleans, two or more each to be a choice.
        build: Called with one value a name; returns the network with fresh weights.
        inputs: An input of the networks with a leading dimension of samples.
        count_flops: Closed form of the FLOPs of one sample, called as `build`; counted without it.
        count_parameters: Closed form of the parameters.
        name: In reports and logs.

    Raises:
        ValueError: if there is no choice to make, or an option is no plain value.
    """

    options: Mapping[str, Sequence[Any]]
    build: Callable[..., nn.Module]
    inputs: Tensor
    count_flops: Callable[..., int] | None = None
    count_parameters: Callable[..., int] | None = None
    name: str = "choices"
    _counted: dict[Any, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain = all(isinstance(v, (str, int, float, bool)) for values in self.options.values() for v in values)
        if not self.options or not all(self.options.values()) or not plain:
            raise ValueError(
                f"Choices needs strings, numbers or booleans for every name, got {dict(self.options)!r:.200}."
            )

    def compose(self, choose: Choose) -> tuple[Any, ...]:
        """Return the tuple of chosen values."""
        return tuple(choose(name, tuple(values)) for name, values in self.options.items())

    def choices(self, architecture: Any) -> dict[str, Any]:
        """Return the values by name.

        Args:
            architecture: One value a name.

        Returns:
            The values.

        Raises:
            ValueError: if a value is missing or is no option.
        """
        fits = isinstance(architecture, tuple) and len(architecture) == len(self.options)
        if not fits or any(v not in values for v, values in zip(architecture, self.options.values())):
            raise ValueError(f"An architecture has one value for each of {dict(self.options)}, got {architecture!r}.")
        return dict(zip(self.options, architecture))

    def decode(self, architecture: Any) -> nn.Module:
        """Return the network with fresh weights."""
        return self.build(**self.choices(architecture))

    def parameters(self, architecture: Any) -> int:
        """Return the number of parameters."""
        if self.count_parameters is not None:
            return self.count_parameters(**self.choices(architecture))
        return self._costs(architecture)[1]

    def flops(self, architecture: Any) -> int:
        """Return the FLOPs of one sample."""
        if self.count_flops is not None:
            return self.count_flops(**self.choices(architecture))
        return self._costs(architecture)[0]

    def _costs(self, architecture: Any) -> tuple[int, int]:
        if architecture not in self._counted:
            model = built(lambda: self.decode(architecture), 0)
            self._counted[architecture] = cost.flops(model, self.example()), cost.parameters(model)
        return self._counted[architecture]

    def example(self, batch: int = 1) -> Tensor:
        """Return the first samples of the input, repeated where there are too few."""
        times = -(-batch // len(self.inputs))
        return self.inputs.repeat(times, *[1] * (self.inputs.ndim - 1))[:batch]

    @property
    def smallest(self) -> tuple[Any, ...]:
        """The architecture that is cheapest when each choice is made for itself, the others as they come first."""
        best = [values[0] for values in self.options.values()]
        for place, values in enumerate(self.options.values()):
            best[place] = min(values, key=lambda v: self.flops((*best[:place], v, *best[place + 1 :])))
        return tuple(best)

    def describe(self, architecture: Any) -> str:
        """Return the choices with their names."""
        return ", ".join(f"{name} {value}" for name, value in self.choices(architecture).items())

    def settings(self) -> dict[str, Any]:
        """Return the name of the space and its options."""
        return {"space": self.name, "options": {name: list(values) for name, values in self.options.items()}}


@dataclass(frozen=True)
class TimmResNet(Space):
    """Residual networks of timm: width and depth of each stage.

    Args:
        classes: Outputs.
        resolution: Height and width of the images.
        widths: Options for the width of the first stage's blocks; stage s may have 1 to 2^s times as many.
        depths: Options for the blocks of a stage.
        bottleneck: Whether blocks are 1x1, 3x3, 1x1 with four times the width out, or two 3x3.
        image_channels: Of the images.
    """

    classes: int = 1000
    resolution: int = 224
    widths: tuple[int, ...] = (16, 24, 32, 48, 64, 96)
    depths: tuple[int, ...] = (1, 2, 3, 4, 6)
    bottleneck: bool = False
    image_channels: int = 3
    name = "resnet"

    def compose(self, choose: Choose) -> tuple[Any, ...]:
        """Return ((width, depth) of four stages)."""
        stages = []
        for stage in range(4):
            widths = tuple(width * 2**stage for width in self.widths)
            stages.append((choose(f"{stage}.width", widths), choose(f"{stage}.depth", self.depths)))
        return tuple(stages)

    def choices(self, architecture: Any) -> dict[str, Any]:
        """Return width and depth by stage."""
        stages = self._checked(architecture)
        made = {f"{stage}.width": width for stage, (width, _) in enumerate(stages)}
        return made | {f"{stage}.depth": depth for stage, (_, depth) in enumerate(stages)}

    def decode(self, architecture: Any) -> nn.Module:
        """Return the network with fresh weights."""
        stages = self._checked(architecture)
        timm = require("timm.models.resnet", extra="vision", purpose="The space of residual networks")
        block = timm.Bottleneck if self.bottleneck else timm.BasicBlock
        model: nn.Module = timm.ResNet(
            block,
            tuple(depth for _, depth in stages),
            channels=tuple(width for width, _ in stages),
            num_classes=self.classes,
            in_chans=self.image_channels,
        )
        return model

    def parameters(self, architecture: Any) -> int:
        """Return the number of parameters in closed form."""
        convs, last = self._convolutions(architecture)
        return sum(k * k * i * o + 2 * o for k, i, o, _ in convs) + (last + 1) * self.classes

    def flops(self, architecture: Any) -> int:
        """Return the FLOPs of one image in closed form."""
        convs, last = self._convolutions(architecture)
        return 2 * (sum(k * k * i * o * size**2 for k, i, o, size in convs) + last * self.classes)

    def _convolutions(self, architecture: Any) -> tuple[list[tuple[int, int, int, int]], int]:
        """Return (kernel, in, out, pixels a side of the output) of each, and the width before the head."""
        inputs, half = 64, (self.resolution + 1) // 2
        convs, size = [(7, self.image_channels, inputs, half)], (half + 1) // 2
        for stage, (width, depth) in enumerate(self._checked(architecture)):
            out = 4 * width if self.bottleneck else width
            for block in range(depth):
                before, stride = size, 2 if stage and not block else 1
                size = (size + stride - 1) // stride
                if self.bottleneck:
                    convs += [(1, inputs, width, before), (3, width, width, size), (1, width, out, size)]
                else:
                    convs += [(3, inputs, width, size), (3, width, width, size)]
                if stride > 1 or (inputs != out and not block):
                    convs.append((1, inputs, out, size))
                inputs = out
        return convs, inputs

    def _checked(self, architecture: Any) -> tuple[tuple[int, int], ...]:
        fits = isinstance(architecture, (tuple, list)) and len(architecture) == 4
        if not fits or not all(len(s) == 2 and all(isinstance(n, int) and n > 0 for n in s) for s in architecture):
            raise ValueError(f"An architecture of {self.name} is four pairs (width, depth), got {architecture!r}.")
        return tuple(tuple(stage) for stage in architecture)

    def example(self, batch: int = 1) -> Tensor:
        """Return images (batch, channels, resolution, resolution)."""
        return images(batch, self.image_channels, self.resolution)

    @property
    def smallest(self) -> tuple[Any, ...]:
        """Least widths and depths."""
        return tuple((min(self.widths) * 2**stage, min(self.depths)) for stage in range(4))

    def describe(self, architecture: Any) -> str:
        """Return widths and depths."""
        return ", ".join(f"{width} x {depth}" for width, depth in self._checked(architecture))

    def settings(self) -> dict[str, Any]:
        """Return the name of the space and its numbers."""
        return {"space": self.name, **vars(self)}


@dataclass(frozen=True)
class TimmViT(Space):
    """Vision transformers of timm: width, depth and width of the hidden layers.

    Args:
        classes: Outputs.
        resolution: Height and width of the images.
        patch: Pixels a side of a patch.
        heads: Options for the number of heads; the width is `head_width` a head.
        depths: Options for the number of blocks.
        ratios: Options for hidden width over width.
        head_width: Of each head.
        image_channels: Of the images.
    """

    classes: int = 1000
    resolution: int = 224
    patch: int = 16
    heads: tuple[int, ...] = (2, 3, 4, 6, 8, 12)
    depths: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    ratios: tuple[float, ...] = (2.0, 3.0, 4.0)
    head_width: int = 64
    image_channels: int = 3
    name = "vit"

    def compose(self, choose: Choose) -> tuple[Any, ...]:
        """Return (heads, depth, ratio)."""
        return choose("heads", self.heads), choose("depth", self.depths), choose("ratio", self.ratios)

    def choices(self, architecture: Any) -> dict[str, Any]:
        """Return heads, depth and ratio."""
        return dict(zip(("heads", "depth", "ratio"), self._checked(architecture)))

    def decode(self, architecture: Any) -> nn.Module:
        """Return the network with fresh weights."""
        heads, depth, ratio = self._checked(architecture)
        timm = require("timm.models.vision_transformer", extra="vision", purpose="The space of vision transformers")
        model: nn.Module = timm.VisionTransformer(
            img_size=self.resolution,
            patch_size=self.patch,
            in_chans=self.image_channels,
            num_classes=self.classes,
            embed_dim=heads * self.head_width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=ratio,
        )
        return model

    def parameters(self, architecture: Any) -> int:
        """Return the number of parameters in closed form."""
        width, hidden, depth, patches = self._sizes(architecture)
        block = 4 * width * (width + 1) + hidden * (width + 1) + width * (hidden + 1) + 4 * width
        total = (self.image_channels * self.patch**2 + 1) * width + (patches + 2) * width + depth * block + 2 * width
        return total + (width + 1) * self.classes

    def flops(self, architecture: Any) -> int:
        """Return the FLOPs of one image in closed form."""
        width, hidden, depth, patches = self._sizes(architecture)
        tokens = patches + 1
        block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
        return 2 * (patches * self.image_channels * self.patch**2 * width + depth * block + width * self.classes)

    def _sizes(self, architecture: Any) -> tuple[int, int, int, int]:
        """Return width, hidden width, depth and patches."""
        heads, depth, ratio = self._checked(architecture)
        width = heads * self.head_width
        return width, int(width * ratio), depth, (self.resolution // self.patch) ** 2

    def _checked(self, architecture: Any) -> tuple[int, int, float]:
        fits = isinstance(architecture, (tuple, list)) and len(architecture) == 3
        if not fits or not all(isinstance(n, (int, float)) and n > 0 for n in architecture):
            raise ValueError(f"An architecture of {self.name} is (heads, depth, ratio), got {architecture!r}.")
        return architecture[0], architecture[1], architecture[2]

    def example(self, batch: int = 1) -> Tensor:
        """Return images (batch, channels, resolution, resolution)."""
        return images(batch, self.image_channels, self.resolution)

    @property
    def smallest(self) -> tuple[Any, ...]:
        """Fewest heads and blocks, least ratio."""
        return min(self.heads), min(self.depths), min(self.ratios)

    def describe(self, architecture: Any) -> str:
        """Return the choices with their names."""
        return json.dumps(self.choices(architecture)).replace('"', "").strip("{}")

    def settings(self) -> dict[str, Any]:
        """Return the name of the space and its numbers."""
        return {"space": self.name, **vars(self)}
