"""Is compressing the demo's network better than what anyone could do without eke?

For three seeds, eke's result against (a) the same small architecture from random weights with the same distillation,
images, steps and structures; (b) the untouched network, folded and in the same memory format: its speed; (c) the small
architecture trained on all 55 000 images. All are scored on the 5 000 report images, in pairs.

Gate: a saved result that is loaded again answers every report image as it did before.

    python benchmarks/demo_controls.py [--images FOLDER_WITH_IDX_FILES] [--write benchmarks/results/demo_controls.json]

Without --images, row (c) is left out. Needs about 20 minutes on two cores with it, 8 without.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eke
from eke import demo
from eke.compression import Recovery, accuracy
from eke.compression.apply import deploy_, on_structures
from eke.compression.intervals import paired_outcomes, wilson
from eke.compression.lessons import collect
from eke.compression.recover import recover_
from eke.compression.task import forward
from eke.cost import environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

BUDGET = {"max_drop": "1%", "latency": "0.27x", "size": "1/15.1x"}


def scored(model: nn.Module, task: eke.Task) -> eke.Counts:
    """Count the report images that a model gets right."""
    return accuracy(model, task.report)


def fresh(result: eke.Result, seed: int) -> nn.Module:
    """Return the result's architecture, not folded, with seeded random weights."""
    net = demo.build()
    result.blueprint.shape_(net)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return net


def deployed(net: nn.Module, result: eke.Result) -> nn.Module:
    """Fold a trained net and project it on the result's structures."""
    deploy_(net, result.blueprint)
    return net.eval()


def row(counts: eke.Counts, rival: eke.Counts | None = None) -> dict[str, Any]:
    """Write a score, and by how much a rival is below it, for the JSON."""
    found: dict[str, Any] = {
        "correct": counts.correct,
        "total": counts.total,
        "wilson": wilson(counts.correct, counts.total),
    }
    if rival is not None:
        assert counts.outcomes is not None
        assert rival.outcomes is not None
        difference, interval = paired_outcomes(counts.outcomes, rival.outcomes)
        found["points_above_rival"] = 100 * difference
        found["interval"] = [100 * end for end in interval]
    return found


def reloaded(result: eke.Result, task: eke.Task) -> bool:
    """Save, load into a new network and compare the answers: the gate."""
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        again = eke.load(folder, demo.Network())
    ours, theirs = scored(result.model, task).outcomes, scored(again, task).outcomes
    return ours is not None and theirs is not None and bool((ours == theirs).all())


def trained_on_all(net: nn.Module, folder: Path, *, seed: int) -> nn.Module:
    """Train an architecture as the demo's network was trained, on all 55 000 images."""
    from train_demo import TRAINED_ON, read_idx, train

    images: Tensor = torch.from_numpy(read_idx(folder / "train-images-idx3-ubyte.gz"))
    labels = torch.from_numpy(read_idx(folder / "train-labels-idx1-ubyte.gz")).long()
    return train(net, images[:TRAINED_ON], labels[:TRAINED_ON], epochs=6, seed=seed)


def one_seed(seed: int, *, steps: int, images: Path | None) -> dict[str, Any]:
    """Run eke and the controls for one seed."""
    task, original, recovery = demo.task(), demo.build(), Recovery(steps=steps)
    result = eke.compress(original, task, budget=eke.Budget(**BUDGET), recovery=recovery, seed=seed)
    if not reloaded(result, task):
        raise SystemExit("gate failed: the loaded model answers differently")
    ours = scored(result.model, task)
    lessons = collect(original, task.calibration, forward=forward)
    scratch = fresh(result, seed)
    forms = on_structures(scratch, result.blueprint.structures)
    recover_(scratch, lessons, recovery, forms=forms, forward=forward, seed=seed)
    from_scratch = scored(deployed(scratch, result), task)
    speedups = [
        {"against": s.against, "ratio": s.ratio, "interval": s.interval, "threads": s.threads, "batch": s.batch}
        for s in result.evidence.speedups
    ]
    found: dict[str, Any] = {
        "seed": seed,
        "original": row(scored(original, task)),
        "eke": row(ours),
        "drop_points": result.document().drop.points if result.document().drop else None,
        "drop_interval": result.document().drop.interval if result.document().drop else None,
        "bytes": result.evidence.after["size"],
        "smaller": result.evidence.before["size"] / result.evidence.after["size"],
        "speedups": speedups,
        "a: same architecture, random weights, same distillation": row(ours, from_scratch)
        | {"correct": from_scratch.correct, "wilson": wilson(from_scratch.correct, from_scratch.total)},
    }
    if images is not None:
        full = scored(deployed(trained_on_all(fresh(result, seed), images, seed=seed), result), task)
        found["c: same architecture, trained on all 55 000 images"] = row(ours, full) | {
            "correct": full.correct,
            "wilson": wilson(full.correct, full.total),
        }
    return found


def main() -> None:
    """Run all seeds and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Recovery().steps)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        rows.append(one_seed(seed, steps=arguments.steps, images=arguments.images))
        print(json.dumps(rows[-1]), flush=True)
    document = {
        "question": __doc__.split("\n", 1)[0] if __doc__ else "",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "budget": BUDGET,
        "steps": arguments.steps,
        "environment": environment().to_json(),
        "rows": rows,
    }
    if arguments.write:
        arguments.write.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
