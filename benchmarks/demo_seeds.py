"""What does the demo's command give, seed by seed, and does it hold on images that nobody looked at?

For each seed `eke compress --task demo` runs in a fresh process. Speed, bytes and drop are those of its report. The
demo's defaults were chosen while its report split was in sight, so each result is scored once more on the other 5 000
test images of Fashion-MNIST, which neither the demo nor its making ever used.
Gate: the command must have verified its result, and the images must not be those of the report split.

    python benchmarks/demo_seeds.py --images FOLDER_WITH_IDX_FILES [--seeds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eke
from eke.compression.intervals import paired_outcomes
from eke.cost import environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
demo = importlib.import_module("eke.demo.task")


def untouched(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the test images that are not in the report split, normalised, and their classes."""
    from train_demo import read_idx

    pixels = torch.from_numpy(read_idx(folder / "t10k-images-idx3-ubyte.gz"))
    classes = torch.from_numpy(read_idx(folder / "t10k-labels-idx1-ubyte.gz")).long()
    report = (demo.images("report")[0][:, 0] * demo.DEVIATION + demo.MEAN).mul(255).round().byte()
    known = {image.numpy().tobytes() for image in report}
    rest = torch.tensor([i for i in range(len(pixels)) if pixels[i].numpy().tobytes() not in known])
    if len(rest) + len(report) != len(pixels):
        raise SystemExit(f"gate: {len(rest)} of {len(pixels)} images are left beside {len(report)} report images")
    return ((pixels[rest].float() / 255 - demo.MEAN) / demo.DEVIATION)[:, None], classes[rest]


def right(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return which images a model gets right."""
    with torch.inference_mode():
        parts = zip(images.split(250), classes.split(250))
        return torch.cat([model(x).argmax(1) == y for x, y in parts])


def one_seed(seed: int, images: Tensor, classes: Tensor) -> dict[str, Any]:
    """Run the command and score its result."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = ["compress", "--task", "demo", "--seed", str(seed), "--out", f"{folder}/out", "--json"]
        done = subprocess.run([sys.executable, "-m", "eke", *words], capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if not done.stdout.startswith("{") or "error" in (report := json.loads(done.stdout)):
            raise SystemExit(f"gate: seed {seed}: {done.stdout[-500:]}{done.stderr[-500:]}")
        if not report["verdict"]["verified"]:
            raise SystemExit(f"gate: seed {seed} was not verified: {report['verdict']}")
        ours = right(eke.load(f"{folder}/out", demo.build()), images, classes)
    base = right(demo.build(), images, classes)
    difference, interval = paired_outcomes(base, ours)
    return {
        "seed": seed,
        "seconds": seconds,
        "met": report["verdict"]["met"],
        "speedups": [{k: s[k] for k in ("against", "ratio", "interval", "threads")} for s in report["speedups"]],
        "smaller": report["before"]["bytes"] / report["after"]["bytes"],
        "drop on the report split": {k: report["drop"][k] for k in ("points", "interval")},
        "drop on untouched images": {
            "original": int(base.sum()),
            "result": int(ours.sum()),
            "images": len(base),
            "points": 100 * difference,
            "interval": [100 * end for end in interval],
        },
    }


def main() -> None:
    """Run all seeds, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    images, classes = untouched(arguments.images)
    rows = []
    for seed in range(arguments.seeds):
        rows.append(one_seed(seed, images, classes))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        document = {"benchmark": "demo_seeds", "environment": environment().to_json(), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
