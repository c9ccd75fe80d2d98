"""Is the network that a search without training finds better than random ones of equal FLOPs, and than log_numel alone?

Question: accuracy on Fashion-MNIST after training, of the winner of a search with the default fusion, of the winner of
a search with `log_numel` alone, and of random networks with exactly the winner's FLOPs.
Goal: the 95 % interval of (winner - random) lies above 0. Also: at least 50 000 proposals a minute against the budget.
Space: cells of NAS-Bench-201 around 8, 16, 32 channels, one cell a stage, images 16 x 16 of one channel; at most the
FLOPs of one convolution 3 x 3 a cell (the table of NAS-Bench-201 has the largest differences at equal FLOPs there) and
at least nine tenths of them.
Rivals: random connected cells with the same FLOPs (counted in closed form), one training each; `log_numel`.
Method: searches of 600 networks, seed 0, batches of 2 x 32 (what spends too little is not scored); then each winner is
trained from 6 seeds and 24 random networks once, 300 steps of 64 (SGD 0.1, Nesterov, cosine, weight decay 5e-4), in
turns; accuracy on the 10 000 test images. Welch's interval.

    python benchmarks/search/winner.py --images FOLDER_WITH_IDX_FILES [--json benchmarks/results/nas_winner.json]
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor
from torch.nn import functional as F

from eke import search
from eke.cost import environment, pinned_threads
from eke.search.spaces import NB201, MobileNet, NasBench201
from eke.training import run

SPACE = NasBench201(classes=10, resolution=16, channels=8, cells=1, image_channels=1)
BUDGETS = {"one convolution 3 x 3": SPACE.flops("daaaaa")}
Data = tuple[Tensor, Tensor]


def load(folder: Path, part: str) -> Data:
    """Return images (n, 1, 16, 16), standardised, and labels."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    x = F.avg_pool2d(F.pad(torch.from_numpy(pixels.copy()).float() / 255, (2, 2, 2, 2)), 2)
    return (x - 0.22) / 0.3, torch.from_numpy(labels.astype(np.int64))


def trained(ops: str, seed: int, train: Data, test: Data, steps: int) -> float:
    """Return the accuracy in per cent of a network trained from a seed."""
    torch.manual_seed(seed)
    model = SPACE.decode(ops).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(_index: int, chosen: Tensor) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(train[0][chosen]), train[1][chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    run(step, samples=len(train[1]), batch_size=64, steps=steps, seed=seed)
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(test[0].split(500), test[1].split(500)))
    return 100 * right / len(test[1])


def difference(a: list[float], b: list[float]) -> dict[str, Any]:
    """Return mean(a) - mean(b) with Welch's 95 % interval."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    mean, half = statistics.fmean(a) - statistics.fmean(b), float(t.ppf(0.975, freedom)) * (va + vb) ** 0.5
    return {"points": round(mean, 3), "interval": [round(mean - half, 3), round(mean + half, 3)]}


def speed() -> dict[str, float]:
    """Return proposals a minute of processor time, each checked against the budget; the score is a constant."""
    rates = {}
    for space, limits in ((NB201, search.Limits(flops=1.5e8)), (MobileNet(), search.Limits(flops=9e8, parameters=6e6))):
        begun = time.thread_time()
        found = search.evolve(space, lambda _: 0.0, limits, evaluations=2000)
        rates[space.name] = round(found.trials[-1].proposals / (time.thread_time() - begun) * 60)
    return rates


def contest(
    flops: float, batches: list[Data], train: Data, test: Data, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the accuracies of both winners within a budget and of random networks with the first one's FLOPs."""
    begun, winners = time.thread_time(), {}
    objectives = {"fusion": search.Scorer(SPACE, batches), "log_numel": search.Scorer(SPACE, batches, ("log_numel",))}
    for name, objective in objectives.items():
        method = search.Evolution(population=64)

        def spending(ops: str, objective: search.Scorer = objective) -> dict[str, float]:
            # what leaves a tenth of the budget unspent ranks last and is not scored
            return objective(ops) if SPACE.flops(ops) >= 0.9 * flops else dict.fromkeys(objective.proxies, math.nan)

        found = search.evolve(
            SPACE, spending, search.Limits(flops=flops), evaluations=arguments.evaluations, method=method
        )
        winners[name] = found.best.architecture
    seconds = time.thread_time() - begun
    equal = SPACE.flops(winners["fusion"])
    every = ("".join(letters) for letters in itertools.product("abcde", repeat=6))
    fits = [ops for ops in every if SPACE.flops(ops) == equal and SPACE.connected(ops) and ops not in winners.values()]
    rivals = random.Random(1).sample(fits, arguments.random)
    accuracy: dict[str, list[float]] = {name: [] for name in (*winners, "random")}
    for seed, rival in enumerate(rivals):
        for name, ops in (*(winners.items() if seed < arguments.seeds else ()), ("random", rival)):
            accuracy[name].append(round(trained(ops, seed, train, test, arguments.steps), 2))
            print(seed, name, ops, accuracy[name][-1], flush=True)
    if min(map(min, accuracy.values())) < 30:
        sys.exit(f"gate: a network was not trained: {accuracy}")
    return {
        "budget_flops": flops,
        "search_seconds": round(seconds, 1),
        "winners": winners,
        "flops": {name: SPACE.flops(ops) for name, ops in winners.items()},
        "random": rivals,
        "accuracy": accuracy,
        "difference": {
            "fusion - random": difference(accuracy["fusion"], accuracy["random"]),
            "log_numel - random": difference(accuracy["log_numel"], accuracy["random"]),
            "fusion - log_numel": difference(accuracy["fusion"], accuracy["log_numel"]),
        },
    }


def main() -> None:
    """Search, draw, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the idx files, gzipped")
    parser.add_argument("--evaluations", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--random", type=int, default=24)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, test = load(arguments.images, "train"), load(arguments.images, "t10k")
    chosen = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))[:64].split(32)
    batches = [(train[0][part], train[1][part]) for part in chosen]
    document: dict[str, Any] = {
        "question": __doc__.splitlines()[0],
        "machine": {"cpu": environment().cpu, "threads": 1, "torch": torch.__version__, "python": sys.version},
        "space": SPACE.settings(), "evaluations": arguments.evaluations, "steps": arguments.steps,
        "proxies": list(search.FUSION), "proposals_per_minute": speed(), "budgets": {},
    }  # fmt: skip
    with pinned_threads(1):
        for name, flops in BUDGETS.items():
            document["budgets"][name] = contest(flops, batches, train, test, arguments)
            print(name, json.dumps(document["budgets"][name]["difference"]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
