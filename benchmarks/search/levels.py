"""Is the network that scores without training choose better than random ones of exactly equal FLOPs, over many levels?

Question: accuracy on Fashion-MNIST after training, of the fusion's best among networks of one FLOPs level, less that of
random networks of the same level; levels are the replicates. (`winner.py` asks it at one budget, whose single winner
is mostly luck.)
Goal: the 95 % interval of the mean difference over levels lies above 0.
Space: that of `winner.py`, cells of NAS-Bench-201 around 8, 16, 32 channels, one cell a stage, images 16 x 16.
Levels: all that 600 connected networks or more share exactly, counted in closed form. There are nine: none, one or two
convolutions 3 x 3 with none, one or two 1 x 1, at any of the six places.
Contestants, all fixed before any training:
  winner     the first of the fusion of ranks (the default proxies) among 300 connected networks of the level, drawn
             with seed 0, scored on two batches of 32; trained from seeds 0 and 1;
  random     five other connected networks of the level, drawn with seed 1, one training each from seeds 0 to 4;
  log_numel  the largest `log_numel` of all connected networks of the level, ties at random with seed 2, one training.
Training: 300 steps of 64 (SGD 0.1, Nesterov, cosine, weight decay 5e-4); accuracy on the 10 000 test images. Where a
training fails, what it reached is its accuracy: no network is replaced.
Result: for each level the mean of the winner less the mean of the random ones, and whether it is above their median;
over levels the mean with Student's interval (8 degrees of freedom). The same for log_numel, and for the fusion less
log_numel. One run; nothing here was chosen by its result.

    python benchmarks/search/levels.py --images FOLDER_WITH_IDX_FILES [--json benchmarks/results/nas_levels.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from winner import SPACE, Data, load, trained

from eke import search
from eke.cost import environment, pinned_threads

SHARED = 600
"""Connected networks that a level needs."""


def levels(at_least: int) -> dict[int, list[str]]:
    """Return the connected networks of every FLOPs level that so many share, in order."""
    found: dict[int, list[str]] = {}
    for letters in itertools.product("abcde", repeat=6):
        ops = "".join(letters)
        if SPACE.connected(ops):
            found.setdefault(SPACE.flops(ops), []).append(ops)
    return {flops: found[flops] for flops in sorted(found) if len(found[flops]) >= at_least}


def chosen(networks: list[str], batches: list[Data], *, scored: int, rivals: int) -> dict[str, Any]:
    """Return the contestants of a level, before any training."""
    pool = random.Random(0).sample(networks, min(scored, len(networks)))
    objective = search.Scorer(SPACE, batches)
    rows = [objective(ops) for ops in pool]
    fused = search.fuse({name: [row[name] for row in rows] for name in rows[0]})
    winner = pool[int(fused.argmax())]
    others = [ops for ops in networks if ops != winner]
    sizes = {ops: SPACE.log_numel(ops) for ops in networks}
    largest = [ops for ops in networks if sizes[ops] == max(sizes.values())]
    return {
        "networks": len(networks),
        "scored": len(pool),
        "largest_log_numel_shared_by": len(largest),
        "winner": winner,
        "log_numel": random.Random(2).choice(largest),
        "random": random.Random(1).sample(others, rivals),
    }


def over_levels(differences: list[float]) -> dict[str, Any]:
    """Return the mean over levels with Student's 95 % interval."""
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(student.ppf(0.975, len(differences) - 1)) * spread
    return {
        "points": round(mean, 3),
        "interval": [round(mean - half, 3), round(mean + half, 3)],
        "above_0": sum(difference > 0 for difference in differences),
        "levels": len(differences),
    }


def pooled(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the differences over all levels, and how often the winner is above the median of its random networks."""
    means = [{name: statistics.fmean(values) for name, values in row["accuracy"].items()} for row in found]
    pairs = (("winner", "random"), ("log_numel", "random"), ("winner", "log_numel"))
    return {
        **{f"{one} - {two}": over_levels([row[one] - row[two] for row in means]) for one, two in pairs},
        "winner_above_median": sum(
            mean["winner"] > statistics.median(row["accuracy"]["random"]) for mean, row in zip(means, found)
        ),
    }


def main() -> None:
    """Choose, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the idx files, gzipped")
    parser.add_argument("--scored", type=int, default=300)
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--most", type=int, help="levels, for a small run without conclusions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.time()
    train, test = load(arguments.images, "train"), load(arguments.images, "t10k")
    drawn = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))[:64].split(32)
    batches = [(train[0][part], train[1][part]) for part in drawn]
    rows: list[dict[str, Any]] = []
    with pinned_threads(1):
        for flops, networks in itertools.islice(levels(SHARED).items(), arguments.most):
            contest = chosen(networks, batches, scored=arguments.scored, rivals=arguments.random)
            turns = [("winner", contest["winner"], 0), ("winner", contest["winner"], 1)]
            turns += [("log_numel", contest["log_numel"], 0)]
            turns += [("random", ops, seed) for seed, ops in enumerate(contest["random"])]
            accuracy: dict[str, list[float]] = {"winner": [], "log_numel": [], "random": []}
            for name, ops, seed in turns:
                accuracy[name].append(round(trained(ops, seed, train, test, arguments.steps), 2))
            rows.append({"flops": flops, **contest, "accuracy": accuracy})
            print(round(time.time() - begun), json.dumps(rows[-1]), flush=True)
    document: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "machine": {"cpu": environment().cpu, "threads": 1, "torch": torch.__version__, "python": sys.version},
        "space": SPACE.settings(), "steps": arguments.steps, "proxies": list(search.FUSION), "levels": rows,
    }  # fmt: skip
    if len(rows) > 1:
        document["pooled"] = pooled(rows)
        print(json.dumps(document["pooled"], indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
