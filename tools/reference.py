"""Check that a built site documents every public name of eke's rooms.

    python tools/reference.py SITE_FOLDER

Prints every missing name; exit code 1 if there is one.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import eke


def main(site: Path) -> int:
    """Compare the anchors of the reference pages with what the rooms offer."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted((site / "reference").glob("*.html")))
    anchors = re.findall(r'id="(eke[\w.]*)"', pages)
    missing, names = [], 0
    for room in (
        value for value in (getattr(eke, name) for name in eke.__all__) if isinstance(value, types.ModuleType)
    ):
        for name in room.__all__:
            names += 1
            if not any(a.startswith(room.__name__ + ".") and a.endswith(f".{name}") for a in anchors):
                missing.append(f"{room.__name__}.{name} is missing in the reference")
    print("\n".join(missing) if missing else f"{names} public names are documented")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
