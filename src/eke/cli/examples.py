"""What a model of a known library is called with, where nobody says: one sample of the size it was made for.

timm and torchvision models know their image size, transformers models their vocabulary and inputs. Values are
random with a fixed seed; only shapes, and tokens within the vocabulary, matter for costs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]

_TOKENS = 128
_WAVE = 16000


def example_inputs(model: nn.Module) -> Inputs | None:
    """Return inputs for one forward pass.

    Args:
        model: Any module.

    Returns:
        Positional or keyword inputs; None for a model that does not tell.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    if (config := getattr(model, "config", None)) is not None and hasattr(model, "main_input_name"):
        return _transformers(model, config, generator)
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(settings, Mapping) and settings.get("input_size"):
        return (torch.randn(1, *settings["input_size"], generator=generator),)
    if type(model).__module__.startswith("torchvision.models."):
        return _torchvision(model, generator)
    return None


def described(inputs: Any) -> str:
    """Return the shapes of inputs in words, such as "input_ids 1 x 128 int64"."""
    from torch import Tensor

    if isinstance(inputs, Tensor):
        return f"{' x '.join(map(str, inputs.shape))} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {described(value)}" for name, value in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(described(value) for value in inputs)
    return str(inputs)


def _torchvision(model: nn.Module, generator: torch.Generator) -> Inputs:
    import torch

    def images(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kind = type(model).__module__.split(".")[2]
    if kind == "video":
        return (images(1, 3, 16, 224, 224),)
    if kind == "optical_flow":
        return images(1, 3, 128, 128), images(1, 3, 128, 128)
    if kind == "detection":
        return ([images(3, 320, 320)],)
    size = 299 if "Inception3" in type(model).__name__ else getattr(model, "image_size", 224)
    return (images(1, 3, size, size),)


def _transformers(model: Any, config: Any, generator: torch.Generator) -> Inputs | None:
    taken = inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", None)
    wanted = [model.main_input_name]
    if vision is not None and text is not config:
        wanted += ["input_ids", "pixel_values"]
    if getattr(config, "is_encoder_decoder", False):
        wanted.append("decoder_input_ids")
    makers = {
        "input_ids": lambda: _tokens(text, generator),
        "decoder_input_ids": lambda: _tokens(text, generator),
        "pixel_values": lambda: _pixels(vision or config, generator),
        "input_values": lambda: _sound(config, generator),
        "input_features": lambda: _sound(config, generator),
    }
    made = {name: makers[name]() for name in dict.fromkeys(wanted) if name in taken and name in makers}
    if made:
        return made
    offered = {name: value for name, value in model.dummy_inputs.items() if name in taken}
    return offered or None


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    import torch

    positions = getattr(config, "max_position_embeddings", None) or 0
    length = min(_TOKENS, max(1, positions // 2)) if positions > 0 else _TOKENS  # some number positions from 2 on
    return torch.randint(0, config.vocab_size, (1, length), generator=generator)


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    import torch

    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = getattr(config, "num_frames", None)
    shape = (*([frames] if frames else []), getattr(config, "num_channels", None) or 3, height, width)
    return torch.randn(1, *shape, generator=generator)


def _sound(config: Any, generator: torch.Generator) -> Tensor:
    import torch

    bins = getattr(config, "num_mel_bins", None)
    if bins and hasattr(config, "max_source_positions"):
        return torch.randn(1, bins, 2 * config.max_source_positions, generator=generator)
    if bins and hasattr(config, "max_length"):
        return torch.randn(1, config.max_length, bins, generator=generator)
    return torch.randn(1, _WAVE, generator=generator)
