"""Build hook for what pyproject.toml cannot say: the optional native kernels.

A kernel is the C or C++ files src/eke/ops/<operation>/cpu*.c or cpu*.cpp with a plain C ABI, one of them for each
instruction set: they need no header of Python or torch (kernels share src/eke/ops/*.h; cpu_calls.cpp takes Python's
where it is found) and are loaded by ctypes from their package folder. A kernel is built only where its sources exist,
and a machine without a compiler skips it: eke then takes the reference path and says so.
"""

import os
import re
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
FOLDERS = sorted({
    source.parent for pattern in ("cpu*.c", "cpu*.cpp") for source in ROOT.glob(f"src/eke/ops/*/{pattern}")
})


def extension(folder: Path) -> Extension:
    """Describe one kernel.

    Args:
        folder: The operation's package.

    Returns:
        An extension whose failure does not stop the installation.
    """
    relative = folder.relative_to(ROOT)
    files = [(relative / file.name).as_posix() for file in sorted(folder.iterdir())]
    code = "".join((ROOT / file).read_text() for file in files if file.endswith((".c", ".cpp", ".h")))
    shared = [f"src/eke/ops/{name}" for name in sorted(set(re.findall(r'#include "\.\./(\w+\.h)"', code)))]
    return Extension(
        ".".join((*relative.parts[1:], "_cpu")),
        [file for file in files if Path(file).stem.startswith("cpu") and file.endswith((".c", ".cpp"))],
        depends=[file for file in files if file.endswith(".h")] + shared,
        # gcc 12 takes the undefined operand inside its own AVX-512 intrinsics for a variable of ours.
        extra_compile_args=["-O3", "-fopenmp", "-Wno-maybe-uninitialized"],
        extra_link_args=["-fopenmp"],
        optional=True,
    )


setup(
    ext_modules=[extension(folder) for folder in FOLDERS],
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
)
