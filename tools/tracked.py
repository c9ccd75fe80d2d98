"""Check that no tracked file names a package registry, a path of one machine, or weighs more than it should.

    python tools/tracked.py

Prints every finding; exit code 1 if there is one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST_BYTES = 2_000_000
HEAVY = "src/eke/demo/data/"
REGISTRIES = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:" + "|".join(("root", "home", "Users", "work", "opt")) + r")/[\w.]")


def findings(name: str) -> list[str]:
    """Return what is wrong with one tracked file."""
    path = ROOT / name
    if not path.is_file():
        return []
    found = []
    size = path.stat().st_size
    if size > LARGEST_BYTES and not name.startswith(HEAVY):
        found.append(f"{name}: {size} bytes, more than {LARGEST_BYTES}")
    if path.name == "uv" + ".lock":
        found.append(f"{name}: a lock file of one tool; constraints.txt holds the pins")
    if name.startswith(HEAVY):
        return found
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return found
    for number, line in enumerate(text.splitlines(), 1):
        if any(registry in line for registry in REGISTRIES):
            found.append(f"{name}:{number}: names a package registry")
        if MACHINE_PATH.search(line):
            found.append(f"{name}:{number}: names a path of one machine: {line.strip()[:100]}")
    return found


def main() -> int:
    """Check every tracked file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if name]
    found = [finding for name in names for finding in findings(name)]
    print("\n".join(found) if found else f"{len(names)} tracked files are clean")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
