"""What several tests of native kernels need."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def sanitized(tmp_path: Path) -> Callable[..., int]:
    """Return a function that runs a program with a folder's kernels under AddressSanitizer and returns its count."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")

    def run(program: str, folder: Path, *flags: str, units: int) -> int:
        source, binary = tmp_path / "main.cpp", tmp_path / "main"
        source.write_text(program)
        files = sorted(folder.glob("cpu*.cpp"))
        assert len(files) == units
        command = ["g++", "-O1", "-w", "-fsanitize=address", *flags, f"-I{folder}", "-o", binary, source, *files]
        subprocess.run(command, check=True)
        done = subprocess.run([binary], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return int(done.stdout.split()[0])

    return run
