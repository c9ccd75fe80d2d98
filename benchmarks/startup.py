"""How fast does eke start?

Question: what do `eke --help` and `import eke` cost a person at a terminal, and what of it is torch?
Goals: `eke --help` below 0.5 s; importing eke with all of its rooms at most 150 ms more than importing torch.
Gate: `eke --help` must exit 0, name its verbs and leave torch unimported.
Method: fresh processes, the commands interleaved, median and spread (10th to 90th percentile) over the rounds.

    python benchmarks/startup.py [--rounds 15] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HELP = "import sys; sys.argv = ['eke', '--help']; from eke.cli.main import main; main()"
ROOMS = "import eke; [getattr(eke, name) for name in dir(eke)]"
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "eke --help": [sys.executable, "-c", HELP],
    "import eke": [sys.executable, "-c", "import eke"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import eke and every room": [sys.executable, "-c", ROOMS],
}


def gate() -> None:
    """Stop unless the help works without torch."""
    report = "import atexit, sys; atexit.register(lambda: print('torch', 'torch' in sys.modules, file=sys.stderr))"
    done = subprocess.run([sys.executable, "-c", f"{report}\n{HELP}"], capture_output=True, text=True)
    if done.returncode or "compress" not in done.stdout or "torch False" not in done.stderr:
        sys.exit(f"gate: eke --help exited {done.returncode}: {done.stderr[-500:]}")


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gate()
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.rounds):
        for name, command in COMMANDS.items():
            samples[name].append(seconds(command))
    rows = {
        name: {"median_seconds": statistics.median(times), "spread_seconds": [quantiles[0], quantiles[-1]]}
        for name, times in samples.items()
        if (quantiles := statistics.quantiles(times, n=10))
    }
    above_torch = rows["import eke and every room"]["median_seconds"] - rows["import torch"]["median_seconds"]
    document = {
        "question": "how fast does eke start",
        "rounds": arguments.rounds,
        "rows": rows,
        "goals": {
            "help_below_0.5_s": rows["eke --help"]["median_seconds"] < 0.5,
            "rooms_at_most_0.15_s_above_torch": above_torch <= 0.15,
        },
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("eke", "torch")}},
    }
    for name, row in rows.items():
        low, high = row["spread_seconds"]
        print(f"{name:28} {1000 * row['median_seconds']:7.0f} ms   {1000 * low:.0f} to {1000 * high:.0f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document["goals"]))


if __name__ == "__main__":
    main()
