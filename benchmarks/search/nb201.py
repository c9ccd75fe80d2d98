"""Which scores of untrained networks rank the networks of NAS-Bench-201, and what do they know beyond size?

Question: rank correlation of every proxy with the true accuracy (CIFAR-10, CIFAR-100, ImageNet16-120), the partial one
given `log_numel`, the top region (CIFAR-10 above 92 %), seconds a network, and a fusion whose rule is fixed on half of
the networks and read on the others.
Goals: ZiCo's interval contains 0.80 on CIFAR-10 (published); at most 0.5 s a network for ZiCo at 16 x 16, batch 32, two
batches, one thread; fusion at least 0.88 (CIFAR-10) and 0.85 (ImageNet16-120) on networks that did not choose its rule.
Gate: closed forms of parameters and paths equal the table for all 15 625 networks.
Rivals: #params and `log_numel` (no data at all) in the same table.
Method: Fashion-MNIST padded to 32 x 32, averaged to 16 x 16, on three channels; the same two batches of 32 for all;
networks drawn without replacement by seed 0; one initialisation each. Intervals: bootstrap over networks.

    python benchmarks/search/nb201.py --images FOLDER_WITH_IDX_FILES [--count 1500] [--scores FILE.csv.gz]
        [--json benchmarks/results/nb201.json]

Scores go to the file as they come, and a run goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
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
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional as F

from eke import search
from eke.cost import environment, pinned_threads
from eke.search.spaces import NB201

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent / "data" / "nb201_tss_accuracy.csv.gz"
SCORES = HERE.parent / "results" / "nb201_scores.csv.gz"
DATASETS = {"CIFAR-10": "c10", "CIFAR-100": "c100", "ImageNet16-120": "in16"}
SPACE = dataclasses.replace(NB201, resolution=16)
CLOSED = {"params": SPACE.parameters, "flops": SPACE.flops, "log_numel": SPACE.log_numel}
MEASURED = tuple(name for name in search.PROXIES if name not in CLOSED)
TOP = 92.0
EXTRA = (("partial", "partial"), ("top", "spearman"))


def fashion(folder: Path, *, batches: int = 2, size: int = 32, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return batches of images (size, 3, 16, 16), standardised, and labels."""
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: batches * size].numpy()
    x = torch.from_numpy(pixels[chosen].copy()).float()[:, None] / 255
    x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 2)
    x = ((x - x.mean()) / x.std()).expand(-1, 3, -1, -1).contiguous()
    y = torch.from_numpy(labels[chosen].astype(np.int64))
    return list(zip(x.split(size), y.split(size)))


def table() -> dict[str, dict[str, float]]:
    """Return accuracies by architecture, after the gate."""
    with gzip.open(TABLE, "rt") as file:
        rows = {
            row["ops"]: {key: float(row[key]) for key in (*DATASETS.values(), "params_M")}
            for row in csv.DictReader(file)
        }
    wrong = [ops for ops, row in rows.items() if NB201.parameters(ops) != round(1e6 * row["params_M"])]
    wrong += [ops for ops, row in rows.items() if NB201.connected(ops) == (row["c10"] == 10.0)]
    if wrong or len(rows) != 15_625:
        sys.exit(f"gate: {len(wrong)} of {len(rows)} networks disagree with the table, such as {wrong[:3]}")
    return rows


def gather(order: list[str], images: Path, path: Path, known: dict[str, dict[str, float]]) -> None:
    """Score the networks of `order` that are not known yet, and keep them in `path` every 20."""
    data = fashion(images)
    begun = time.time()
    left = [ops for ops in order if ops not in known]
    with pinned_threads(1):
        search.score(
            lambda: SPACE.decode(order[0]), data, proxies=MEASURED
        )  # the first call of some operations is slow
        for number, ops in enumerate(left, start=1):
            found = search.score(lambda ops=ops: SPACE.decode(ops), data, proxies=MEASURED)
            known[ops] = {row.name: row.mean for row in found.rows}
            known[ops] |= {f"seconds.{row.name}": row.seconds for row in found.rows if row.name.count(".") == 0}
            if number % 20 == 0 or number == len(left):
                write(path, known)
                print(f"{number} of {len(left)}, {(time.time() - begun) / number:.2f} s a network", flush=True)


def write(path: Path, known: dict[str, dict[str, float]]) -> None:
    """Write scores as a table."""
    names = sorted({name for row in known.values() for name in row})
    partial = path.with_name(f".{path.name}")
    with gzip.open(partial, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ops", *names])
        for ops, row in known.items():
            writer.writerow([ops, *(f"{row[name]:.6g}" for name in names)])
    partial.replace(path)


def read(path: Path) -> dict[str, dict[str, float]]:
    """Return scores by architecture and proxy."""
    if not path.exists():
        return {}
    with gzip.open(path, "rt") as file:
        return {row.pop("ops"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}


def correlations(scores: np.ndarray, accuracy: np.ndarray, size: np.ndarray) -> dict[str, Any]:
    """Return Spearman, Kendall and the partial correlation given size, with intervals."""
    made = {
        "spearman": search.rank_correlation(scores, accuracy, resamples=300),
        "kendall": search.rank_correlation(scores, accuracy, kind="kendall", resamples=100),
        "partial": search.rank_correlation(scores, accuracy, given=size, resamples=300),
    }
    return {
        name: {"value": finite(r.value, 4), "interval": [finite(end, 4) for end in r.interval]}
        for name, r in made.items()
    }


def finite(value: float, digits: int) -> float | None:
    """Return a number for JSON."""
    return round(value, digits) if math.isfinite(value) else None


def choose(columns: dict[str, np.ndarray], accuracy: np.ndarray) -> list[tuple[list[str], float]]:
    """Return the path of greedy forward selection by Spearman: proxies so far and their correlation."""
    chosen: list[str] = []
    path: list[tuple[list[str], float]] = []
    while len(chosen) < 8:
        trials = {
            name: search.rank_correlation(
                search.fuse({key: columns[key] for key in [*chosen, name]}), accuracy, resamples=0
            ).value
            for name in columns
            if name not in chosen
        }
        best = max(trials, key=lambda name: trials[name])
        chosen = [*chosen, best]
        path.append((chosen, trials[best]))
    return path


def fused(columns: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> dict[str, Any]:
    """Fix a fusion on the even networks' CIFAR-10 accuracies and read it on the odd ones."""
    half = np.arange(len(targets["CIFAR-10"])) % 2 == 0
    path = choose({name: values[half] for name, values in columns.items()}, targets["CIFAR-10"][half])
    # the shortest rule within 0.003 of the best on the half that chooses
    best = max(value for _, value in path)
    rule, value = next((names, value) for names, value in path if value >= best - 0.003)
    rules = {"chosen": rule, "AZ-NAS with FLOPs": [*(name for name in columns if "az_nas" in name), "flops"],
             "all": list(columns)}  # fmt: skip
    result: dict[str, Any] = {
        "path": [{"proxies": names, "spearman_on_choosing_half": round(r, 4)} for names, r in path],
        "rule": rule, "spearman_on_choosing_half": round(value, 4), "rules": {},
    }  # fmt: skip
    for name, names in rules.items():
        rest = search.fuse({key: columns[key][~half] for key in names})
        size = columns["log_numel"][~half]
        result["rules"][name] = {
            "proxies": names,
            "networks": int((~half).sum()),
            **{dataset: correlations(rest, accuracy[~half], size) for dataset, accuracy in targets.items()},
        }
    return result


def within_levels(
    names: list[str], columns: dict[str, np.ndarray], rule: list[str], truth: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return the accuracy of the fusion's best less the mean of its level, on every dataset, over levels of FLOPs.

    Levels have at least 10 scored connected networks, and the mean is over these; "unseen" counts the networks alone
    that did not choose the rule (levels have at least 10 of those).
    """
    found: dict[str, Any] = {}
    halves = {"all": list(range(len(names))), "unseen": list(range(1, len(names), 2))}
    for half, places in halves.items():
        kept = [place for place in places if NB201.connected(names[place])]
        levels: dict[int, list[int]] = {}
        for place in kept:
            levels.setdefault(SPACE.flops(names[place]), []).append(place)
        inside = [level for _, level in sorted(levels.items()) if len(level) >= 10]
        best = [level[int(np.argmax(search.fuse({key: columns[key][level] for key in rule})))] for level in inside]
        found[half] = {"networks": sum(map(len, inside))}
        for dataset, key in DATASETS.items():
            accuracy = [truth[ops][key] for ops in names]
            gains = [accuracy[one] - statistics.fmean(accuracy[i] for i in level) for one, level in zip(best, inside)]
            found[half][dataset] = {**over(gains), "levels": len(gains), "above_median": sum(
                accuracy[one] > statistics.median(accuracy[i] for i in level) for one, level in zip(best, inside)
            )}  # fmt: skip
    return found


def over(gains: list[float]) -> dict[str, Any]:
    """Return the mean with Student's 95 % interval, and how many are positive; no numbers for fewer than two."""
    if len(gains) < 2:
        return {"points": None, "interval": None, "better_in": None}
    half = float(student.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5
    mean = statistics.fmean(gains)
    return {"points": round(mean, 3), "interval": [round(mean - half, 3), round(mean + half, 3)],
            "better_in": sum(gain > 0 for gain in gains)}  # fmt: skip


def equal_flops(
    names: list[str], columns: dict[str, np.ndarray], rule: list[str], truth: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return by how many points the best scored network of each class of equal FLOPs beats the class's mean accuracy.

    The mean is over all connected networks of the table with these FLOPs; classes have at least 10 scored networks.
    """
    kept = [place for place, ops in enumerate(names) if NB201.connected(ops)]
    flops = np.array([SPACE.flops(names[place]) for place in kept])
    scores = {
        "fusion": search.fuse({key: columns[key][kept] for key in rule}),
        **{key: columns[key][kept] for key in ("log_numel", "zico", "naswot", "meco")},
    }
    every: dict[int, list[float]] = {}
    for ops, row in truth.items():
        if NB201.connected(ops):
            every.setdefault(SPACE.flops(ops), []).append(row["c10"])
    gains: dict[str, list[float]] = {name: [] for name in scores}
    for value in sorted(set(flops.tolist())):
        inside = np.flatnonzero(flops == value)
        if len(inside) >= 10:
            for name, found in scores.items():
                best = names[kept[inside[int(np.argmax(found[inside]))]]]
                gains[name].append(truth[best]["c10"] - statistics.fmean(every[value]))
    result: dict[str, Any] = {"classes": len(gains["fusion"])}
    result |= {name: over(found) for name, found in gains.items()}
    return result


def summary(known: dict[str, dict[str, float]], truth: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the document from the scores."""
    names = list(known)
    columns = {
        name: np.array([known[ops][name] for ops in names])
        for name in next(iter(known.values()))
        if not name.startswith("seconds.")
    }
    columns |= {name: np.array([float(formula(ops)) for ops in names]) for name, formula in CLOSED.items()}
    targets = {dataset: np.array([truth[ops][key] for ops in names]) for dataset, key in DATASETS.items()}
    top = targets["CIFAR-10"] > TOP
    rows = {}
    for name, values in sorted(columns.items()):
        seconds = [row[f"seconds.{name}"] for row in known.values() if f"seconds.{name}" in row]
        rows[name] = {
            "seconds_mean": round(statistics.fmean(seconds), 4) if seconds else None,
            "seconds_95": round(float(np.quantile(seconds, 0.95)), 4) if seconds else None,
            "spearman_with_log_numel": finite(
                search.rank_correlation(values, columns["log_numel"], resamples=0).value, 4
            ),
            **{dataset: correlations(values, accuracy, columns["log_numel"]) for dataset, accuracy in targets.items()},
            "top": correlations(values[top], targets["CIFAR-10"][top], columns["log_numel"][top]),
        }
    whole = {}
    for name in ("params", "log_numel"):
        every = [CLOSED[name](ops) for ops in truth]
        whole[name] = {
            dataset: round(search.rank_correlation(every, [row[key] for row in truth.values()], resamples=0).value, 4)
            for dataset, key in DATASETS.items()
        }
    fusion = fused(columns, targets)
    return {"networks": len(names), "in_top_region": int(top.sum()), "proxies": rows, "whole_table": whole,
            "fusion": fusion, "equal_flops": equal_flops(names, columns, fusion["rule"], truth),
            "within_levels": within_levels(names, columns, fusion["rule"], truth)}  # fmt: skip


def main() -> None:
    """Score, correlate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with the idx files of Fashion-MNIST, gzipped")
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--scores", type=Path, default=SCORES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    truth = table()
    order = random.Random(0).sample(sorted(truth), len(truth))[: arguments.count]
    known = read(arguments.scores)
    if arguments.images:
        gather(order, arguments.images, arguments.scores, known)
    known = dict(itertools.islice(((ops, known[ops]) for ops in order if ops in known), arguments.count))
    machine = {"cpu": environment().cpu, "threads": 1, "torch": torch.__version__, "python": sys.version.split()[0]}
    document = {"question": __doc__.splitlines()[0], "machine": machine, **summary(known, truth)}
    for name, row in document["proxies"].items():
        cells = [str(row[dataset]["spearman"]["value"]) for dataset in DATASETS]
        cells += [f"{key} {row[key if key == 'top' else 'CIFAR-10'][kind]['value']}" for key, kind in EXTRA]
        print(f"{name:<22}{'  '.join(cells)}")
    print(json.dumps(document["fusion"], indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
