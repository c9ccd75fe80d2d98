"""Build hook for what pyproject.toml cannot say: the optional native kernels.

A kernel is one C or C++ file at src/eke/ops/<operation>/cpu.c or cpu.cpp with a plain C ABI: it includes no header of
Python or torch and is loaded by ctypes from its package folder. It is built only where its source exists, and a machine
without a compiler skips it: eke then takes the reference path and says so.
"""

from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(ROOT.glob("src/eke/ops/*/cpu.c")) + sorted(ROOT.glob("src/eke/ops/*/cpu.cpp"))


def extension(source: Path) -> Extension:
    """Describe one kernel.

    Args:
        source: Its file.

    Returns:
        An extension whose failure does not stop the installation.
    """
    relative = source.relative_to(ROOT)
    return Extension(
        ".".join((*relative.parts[1:-1], "_cpu")),
        [relative.as_posix()],
        extra_compile_args=["-O3", "-fopenmp"],
        extra_link_args=["-fopenmp"],
        optional=True,
    )


setup(ext_modules=[extension(source) for source in SOURCES])
