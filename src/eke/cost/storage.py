"""What a model weighs: parameters, bytes of its weights as a file, bytes of files that exist.

Tied tensors count once. Compression is quoted against `model_bytes`, the float32 safetensors file of the model, and
never against a formula: both sides are real files with their headers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".onnx", ".data", ".npz", ".gguf")
"""File names with these endings hold weights."""

ARTIFACT_WEIGHTS = "model.safetensors"
"""The weights file of an eke artifact folder."""


def parameters(model: nn.Module) -> int:
    """Count the entries of a model's parameters, tied ones once.

    Args:
        model: Any module; buffers are not counted.

    Returns:
        Number of scalar parameters.
    """
    return sum(tensor.numel() for tensor in distinct(model.parameters()))


def model_bytes(model: nn.Module) -> int:
    """Return the size of the model's state as a float32 safetensors file, by serialising it in memory.

    Args:
        model: Module; floating-point tensors count as float32 whatever they are, integers as they are.

    Returns:
        Bytes, header included; tied tensors once.

    Raises:
        ValueError: if a tensor holds no data or is not a plain dense tensor.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(
                f"model_bytes serialises dense tensors with data, but {name!r} is {tensor.layout} on {tensor.device}; "
                "load or densify the model first, or measure its own file with stored_bytes."
            )
    kept = {id(tensor) for tensor in distinct(state.values())}
    file = {name: _as_float32(tensor) for name, tensor in state.items() if id(tensor) in kept}
    return len(save(file))


def stored_bytes(path: str | Path) -> int:
    """Return the bytes on disk of a weights file, or of the weights in a folder.

    In a folder with `model.safetensors`, as eke's artifacts have it, that file alone counts; otherwise all files that
    end in one of `WEIGHT_SUFFIXES`, in subfolders too. Links count as what they point to.

    Args:
        path: A file, whatever its name, or a folder.

    Returns:
        Bytes.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if the folder holds no weights.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        raise FileNotFoundError(f"stored_bytes needs a file or a folder, and there is nothing at '{path}'.")
    artifact = path / ARTIFACT_WEIGHTS
    if artifact.is_file():
        return artifact.stat().st_size
    files = [file for file in path.rglob("*") if file.is_file() and file.suffix in WEIGHT_SUFFIXES]
    if not files:
        raise ValueError(
            f"no weights in the folder '{path}': stored_bytes counts {ARTIFACT_WEIGHTS}, or else files that end in "
            f"{', '.join(WEIGHT_SUFFIXES)}. Pass the file itself if its name ends otherwise."
        )
    return sum(file.stat().st_size for file in files)


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that are not the same memory seen the same way as an earlier one.

    Args:
        tensors: Any tensors; those without plain memory (sparse, meta) are told apart by identity.

    Returns:
        The first of each set of tied tensors, in order.
    """
    seen: set[object] = set()
    kept = []
    for tensor in tensors:
        key = _identity(tensor)
        if key not in seen:
            seen.add(key)
            kept.append(tensor)
    return kept


def _identity(tensor: Tensor) -> object:
    if tensor.layout is not torch.strided or tensor.is_meta or type(tensor) not in {Tensor, nn.Parameter}:
        return id(tensor)
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _as_float32(tensor: Tensor) -> Tensor:
    """Return a fresh dense copy, since safetensors refuses tensors that share memory."""
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device="cpu", dtype=kind, copy=True).contiguous()
