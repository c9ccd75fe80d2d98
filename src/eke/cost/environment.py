"""The machine and the versions a number was measured with; every report and benchmark carries it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

INSTRUCTION_SETS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""Instruction sets that decide how fast inference is, as Linux names them."""


@dataclass(frozen=True)
class Environment:
    """Where a measurement was taken.

    Args:
        cpu: Model of the processor.
        cores: Cores this process may use.
        threads: Threads of torch's operations.
        load_average: Running processes over the last minute, this one included; `None` where unknown.
        instruction_sets: Those of `INSTRUCTION_SETS` that the processor has.
        torch_kernels: Instruction set that torch's own kernels use.
        torch: Version of torch.
        python: Version of Python.
        system: Operating system and architecture.
        accelerator: Name of the first CUDA device, or `None`.
    """

    cpu: str
    cores: int
    threads: int
    load_average: float | None
    instruction_sets: tuple[str, ...]
    torch_kernels: str
    torch: str
    python: str
    system: str
    accelerator: str | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return asdict(self) | {"instruction_sets": list(self.instruction_sets)}


def environment() -> Environment:
    """Describe this machine and the versions that run, now.

    Returns:
        The description; what the system does not tell is "unknown", `None` or empty.
    """
    cpu = _cpu_information()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return Environment(
        cpu=cpu.get("model name") or platform.processor() or "unknown",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        torch_kernels=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        accelerator=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    )


def _cpu_information() -> dict[str, str]:
    """Return what Linux lists about the first processor; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
