"""Does a model of the loss prune better, and does the loss kept decide what fine-tuning reaches?

Question: the two findings of Laurent et al., "Revisiting loss modelling for unstructured pruning", 2020, on
Fashion-MNIST: (1) small steps (140 against 1) keep far more of the network when entries are chosen by a model of the
loss; (2) what keeps the loss best before fine-tuning need not be best after it.
Networks: "mlp", 784-300-100-10 tanh, 98.847 % removed; "vgg", three pairs of 3 x 3 convolutions with pooling between
and two linear layers, without normalisation, on images of 14 x 14, 95.6 % removed.
Rivals: magnitude; LinearModel, QuadraticModel, OBD in 1, 14 and 140 steps; QuadraticModel with steps and damping by
trust; optimal brain compression (every row's inverse Hessian, survivors refitted) with the same calibration images and
the densities by layer that QuadraticModel in 140 steps found (it has no way of its own to share them out).
Retraining: the schedule of the training anew (learning-rate rewinding), masks on, the same number of steps for all.
Gates: every mask keeps the number of entries asked for, and they are the only ones that differ from 0 after training.
Intervals: 95 % of Student's t over the seeds, of differences within a seed where two are compared.

    python benchmarks/pruning.py [--nets mlp vgg] [--seeds 3] [--retrain-epochs 3]
        [--json benchmarks/results/pruning.json] [--smoke]

Needs Debian's package dataset-fashion-mnist (or its four files in --images).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gzip
import itertools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eke
from eke.cost import environment
from eke.sparsity import (
    OBD,
    LinearModel,
    MaskSet,
    QuadraticModel,
    Training,
    magnitude,
    obc,
    prune,
    prune_by_trust,
    rewind_rate_,
)

MEAN, DEVIATION = 0.2860, 0.3530
VALIDATION = 5_000
"""Training images at the end that choose nothing here but are measured beside the test set."""


@dataclasses.dataclass(frozen=True)
class Net:
    """One network and how it is trained and pruned."""

    make: Callable[[], nn.Module]
    density: float
    images: int
    epochs: int
    retrain_epochs: int
    calibration: int
    fisher: str
    flat: bool


def mlp() -> nn.Module:
    """The paper's first network."""
    return nn.Sequential(nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 10))


def vgg() -> nn.Module:
    """A small network in the manner of VGG: pairs of convolutions, pooling, linear layers, no normalisation."""
    layers: list[nn.Module] = []
    last = 1
    for width in (16, 32, 64):
        layers += [nn.Conv2d(last, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        last = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


NETS = {
    "mlp": Net(mlp, 1 - 0.98847, 55_000, 8, 3, 1000, "exact", True),
    "vgg": Net(vgg, 1 - 0.956, 20_000, 8, 3, 500, "mc", False),
}


def read(path: Path) -> Tensor:
    """One gzipped IDX file of bytes."""
    with gzip.open(path) as file:
        file.read(3)
        dimensions = file.read(1)[0]
        shape = np.frombuffer(file.read(4 * dimensions), dtype=">u4").astype(int)
        return torch.from_numpy(np.frombuffer(file.read(), dtype=np.uint8).reshape(shape).copy())


def load(folder: Path, net: Net) -> dict[str, tuple[Tensor, Tensor]]:
    """Normalised images and labels: train, validation, test."""
    parts = {}
    for name, stem in (("train", "train"), ("test", "t10k")):
        images = (read(folder / f"{stem}-images-idx3-ubyte.gz").float() / 255 - MEAN) / DEVIATION
        images = images.flatten(1) if net.flat else F.avg_pool2d(images[:, None], 2)
        parts[name] = (images, read(folder / f"{stem}-labels-idx1-ubyte.gz").long())
    x, y = parts["train"]
    return {
        "train": (x[: net.images], y[: net.images]), "validation": (x[-VALIDATION:], y[-VALIDATION:]),
        "test": parts["test"],
    }  # fmt: skip


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def scored(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Loss and accuracy on validation and test images."""
    found = {}
    model.eval()
    for name in ("validation", "test"):
        x, y = data[name]
        z = torch.cat([model(part) for part in x.split(1000)])
        found[f"{name}_loss"] = round(float(F.cross_entropy(z, y)), 5)
        found[f"{name}_accuracy"] = round(100 * float((z.argmax(1) == y).double().mean()), 3)
    return found


def training(net: Net, data: dict[str, tuple[Tensor, Tensor]], *, epochs: int, seed: int) -> Training:
    """SGD with momentum as in the paper, the rate divided by ten after two thirds."""
    x, y = data["train"]
    rate = 0.01 if net.flat else 0.03
    return Training(
        cross_entropy, lambda i: (x[i], y[i]), samples=len(x), batch_size=100, steps=epochs * (len(x) // 100),
        seed=seed, optimizer=lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, weight_decay=5e-4),
        rate=lambda share: 1.0 if share < 2 / 3 else 0.1,
    )  # fmt: skip


def initialised(net: Net, seed: int) -> nn.Module:
    """A network with He's normal weights, as in the paper."""
    torch.manual_seed(seed)
    model = net.make()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="tanh" if net.flat else "relu")
            nn.init.zeros_(module.bias)
    return model


def ways(
    net: Net, calibration: list[Any], *, smoke: bool
) -> dict[str, Callable[[nn.Module, dict[str, MaskSet]], MaskSet]]:
    """Every rival by name; the dictionary holds the masks of those before it."""
    kinds = {"LM": LinearModel, "QM": QuadraticModel, "OBD": OBD}

    def modelled(kind: str, steps: int) -> Callable[[nn.Module, dict[str, MaskSet]], MaskSet]:
        def run(model: nn.Module, _: dict[str, MaskSet]) -> MaskSet:
            generator = torch.Generator().manual_seed(0)
            criterion = kinds[kind](cross_entropy, calibration, fisher=net.fisher, generator=generator)
            return prune(model, criterion, net.density, steps=steps)

        return run

    def by_trust(model: nn.Module, _: dict[str, MaskSet]) -> MaskSet:
        generator = torch.Generator().manual_seed(0)
        criterion = QuadraticModel(cross_entropy, calibration, fisher=net.fisher, generator=generator)
        return prune_by_trust(model, criterion, net.density)

    def same_densities(model: nn.Module, known: dict[str, MaskSet]) -> MaskSet:
        shares = {name: float(mask.double().mean()) for name, mask in known[f"QM {most}"].items()}
        return obc(model, cross_entropy, calibration, density=shares)

    most = 14 if smoke else 140
    found: dict[str, Callable[[nn.Module, dict[str, MaskSet]], MaskSet]] = {
        "MP": lambda model, _: prune(model, magnitude, net.density, steps=1)
    }
    for kind, steps in itertools.product(kinds, (1, most) if smoke else (1, 14, 140)):
        found[f"{kind} {steps}"] = modelled(kind, steps)
    found["QM by trust"] = by_trust
    found["OBC"] = same_densities
    return found


def one_seed(name: str, net: Net, seed: int, folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Train, prune in every way, retrain."""
    data = load(folder, net)
    if smoke:
        data["train"] = tuple(part[:2000] for part in data["train"])  # type: ignore[assignment]
    epochs, again = (1, 1) if smoke else (net.epochs, net.retrain_epochs)
    model = initialised(net, seed)
    start = time.thread_time()
    training(net, data, epochs=epochs, seed=seed).train_(model)
    dense = scored(model, data) | {"cpu_seconds": round(time.thread_time() - start, 1)}
    print(f"{name} seed {seed}: dense {dense}", flush=True)
    generator = torch.Generator().manual_seed(seed)
    count = 100 if smoke else net.calibration
    picked = torch.randperm(len(data["train"][0]), generator=generator)[:count]
    x, y = data["train"]
    calibration = [(x[i], y[i]) for i in picked.split(count if net.flat else 100)]
    total = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight"))
    wanted = total - round(total * (1 - net.density))
    masks: dict[str, MaskSet] = {}
    rows = {}
    for way, run in ways(net, calibration, smoke=smoke).items():
        start = time.thread_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # layers that one step would empty keep one entry
            masks[way] = run(model, masks)
        seconds = time.thread_time() - start
        if abs(masks[way].kept - wanted) > len(masks[way]):  # rounded layer by layer where densities are given by layer
            sys.exit(f"gate: {way} keeps {masks[way].kept} entries instead of {wanted}")
        pruned = copy.deepcopy(model)
        masks[way].apply_(pruned)
        before = scored(pruned, data)
        start = time.thread_time()
        schedule = training(net, data, epochs=again, seed=1000 + seed)
        rewind_rate_(pruned, masks[way], schedule, steps=schedule.steps)
        known = dict(pruned.named_parameters())
        if any(bool(known[n].detach()[~mask].any()) for n, mask in masks[way].items()):
            sys.exit(f"gate: {way} has entries that were removed after training")
        steps = masks[way].steps
        rows[way] = {
            "kept": {n: int(mask.sum()) for n, mask in masks[way].items()}, "cpu_seconds": round(seconds, 2),
            "retrain_cpu_seconds": round(time.thread_time() - start, 1), "before": before,
            "after": scored(pruned, data), "steps": len(steps),
            "predicted": round(math.fsum(s.predicted or 0.0 for s in steps), 5) if steps and steps[0].after else None,
            "actual": round(steps[-1].after - steps[0].before, 5) if steps and steps[0].after else None,
        }  # fmt: skip
        print(
            f"{name} seed {seed} {way:20s} {before['test_accuracy']:6.2f} % -> "
            f"{rows[way]['after']['test_accuracy']:6.2f} % in {seconds:.1f} + {rows[way]['retrain_cpu_seconds']} s",
            flush=True,
        )  # fmt: skip
    return {"seed": seed, "dense": dense, "total": total, "kept": wanted, "ways": rows}


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean and 95 % interval of Student's t; no interval for one value."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": round(mean, 3), "low": None, "high": None}
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3)}


def summarized(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The two findings, with intervals over seeds."""
    from scipy import stats

    names = list(runs[0]["ways"])

    def series(way: str, when: str, what: str) -> list[float]:
        return [run["ways"][way][when][what] for run in runs]

    locality = {}
    for kind in ("LM", "QM", "OBD"):
        most = max(
            (name for name in names if name.startswith(f"{kind} ") and name[-1].isdigit()),
            key=lambda n: int(n.split()[1]),
        )
        pairs = zip(series(most, "before", "test_accuracy"), series(f"{kind} 1", "before", "test_accuracy"))
        locality[kind] = interval([a - b for a, b in pairs])
    orders, winners = [], []
    for k in range(len(runs)):
        before = [series(name, "before", "validation_loss")[k] for name in names]
        after = [series(name, "after", "validation_loss")[k] for name in names]
        orders.append(float(stats.spearmanr(before, after).statistic))
        best, final = names[before.index(min(before))], names[after.index(min(after))]
        winners.append({
            "best_before": best,
            "best_after": final,
            "rank_of_best_before": sorted(after).index(after[before.index(min(before))]) + 1,
        })
    return {
        "dense_test_accuracy": interval([run["dense"]["test_accuracy"] for run in runs]),
        "test_accuracy": {
            name: {when: interval(series(name, when, "test_accuracy")) for when in ("before", "after")}
            for name in names
        },
        "locality_points_before": locality,
        "spearman_of_validation_loss_before_and_after": interval(orders),
        "winners": winners,
    }  # fmt: skip


def main() -> None:
    """Run, print, write JSON after each seed, so that a run that is cut leaves what it had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--retrain-epochs", type=int, help="of every way; None for those of the network")
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--smoke", action="store_true", help="few images, few steps: seconds, no conclusions")
    parser.add_argument("--json", type=Path, help="other networks and seeds in the file are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.nets:
        net = NETS[name]
        if arguments.retrain_epochs:
            net = dataclasses.replace(net, retrain_epochs=arguments.retrain_epochs)
        settings = {k: v for k, v in vars(net).items() if k != "make"}
        runs = []
        for seed in range(arguments.first_seed, arguments.first_seed + (1 if arguments.smoke else arguments.seeds)):
            runs.append(one_seed(name, net, seed, arguments.images, smoke=arguments.smoke))
            if arguments.json:
                write(arguments.json, name, settings, runs, smoke=arguments.smoke)
        print(json.dumps(summarized(runs), indent=1), flush=True)


def write(path: Path, name: str, settings: dict[str, Any], runs: list[dict[str, Any]], *, smoke: bool) -> None:
    """Put seeds beside those that the file has of the same network and settings."""
    old = json.loads(path.read_text())["nets"] if path.exists() and not smoke else {}
    kept = old.get(name, {})
    seeds = {run["seed"]: run for run in (kept["seeds"] if kept.get("settings") == settings else [])}
    every = [run for _, run in sorted((seeds | {run["seed"]: run for run in runs}).items())]
    document = {
        "question": __doc__.splitlines()[0], "smoke": smoke, "eke": eke.__version__,
        "environment": environment().to_json(),
        "nets": old | {name: {"settings": settings, "summary": summarized(every), "seeds": every}},
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
