"""Files that are either whole or absent.

Every file is written under another name and moved into place, so a process that is killed at any moment leaves what was
there before, or the new file, and at most one hidden `.part`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write a file as a whole.

    Args:
        path: Where it will be.
        content: Its bytes.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        advice = ". Free space and try again (a run continues with --resume)" if error.errno in _DISK_FULL else ""
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}); what was there before stays{advice}",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_tensors(path: pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as a whole.

    Args:
        path: Where they will be.
        tensors: By name; made contiguous.
        metadata: Stored in the header.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, dict(metadata)))


def read_tensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata.

    Args:
        path: The file.

    Returns:
        Tensors by name, and the header's metadata.

    Raises:
        ValueError: if it is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); restore it or start again in a new folder."
        ) from error
