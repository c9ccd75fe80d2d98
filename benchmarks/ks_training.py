"""Do structure-aware learning rates train Kronecker-sparse layers better than one rate for all?

Question: the digits of scikit-learn, a net 64-256-256-256-10 whose two inner layers are dense, Monarch (16 blocks of
16 x 16 in each factor) or a butterfly of eight factors, 150 steps of Adam at batch 128, over a grid of learning rates.
Goals: with the groups of `nn.param_groups` the Monarch net ends at a lower training loss than with one rate for all, at
equal rate and best against best; and the rate that is best for the dense net is best, or next to it on the grid, for
the Monarch net with groups.
Gate: the groups hold every parameter once, with the multipliers of the formula (8 for Monarch, 16 for the butterfly).
Method: five seeds, which draw the weights, the split and the order of the batches; loss over the whole training set at
the end, median and range; paired comparison at each rate.
Source of the rule: Qiu, Potapczynski, Finzi, Goldblum, Wilson, "Compute better spent", 2024.
scikit-learn is no dependency of eke: pip install --target FOLDER scikit-learn, then --packages FOLDER.

    python benchmarks/ks_training.py [--packages FOLDER] [--json benchmarks/results/ks_training.json] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eke import Chain
from eke.cost import environment
from eke.nn import KSLinear, initial_std, param_groups

WIDTH, STEPS, BATCH = 256, 150, 128
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = 5
CHAINS = {"monarch": Chain.monarch(WIDTH, WIDTH, 16), "butterfly": Chain.butterfly(WIDTH)}
MULTIPLIERS = {"monarch": 8.0, "butterfly": 16.0}
RUNS = ("dense", "monarch, one rate", "monarch, groups", "butterfly, one rate", "butterfly, groups")


def net(kind: str) -> nn.Sequential:
    """A new net; dense layers start by the same rule as cores."""
    inner = [
        nn.Linear(WIDTH, WIDTH) if kind == "dense" else KSLinear(WIDTH, WIDTH, chain=CHAINS[kind]) for _ in range(2)
    ]
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), inner[0], nn.ReLU(), inner[1], nn.ReLU(), nn.Linear(WIDTH, 10)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=initial_std(layer.in_features, layer.out_features))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def gate() -> None:
    """Stop unless the groups are those of the formula."""
    for kind, multiplier in MULTIPLIERS.items():
        model = net(kind)
        groups = param_groups(model, lr=1.0)
        names = [id(p) for group in groups for p in group["params"]]
        cores = {id(p) for layer in model if isinstance(layer, KSLinear) for p in layer.factors}
        right = all(group["lr"] == (multiplier if id(p) in cores else 1.0) for group in groups for p in group["params"])
        if sorted(names) != sorted(id(p) for p in model.parameters()) or not right:
            sys.exit(f"gate: the groups of {kind} are {[(group['lr'], len(group['params'])) for group in groups]}")


def train(run: str, data: tuple[Tensor, Tensor], *, rate: float, steps: int, seed: int) -> dict[str, float]:
    """Train one net and score it."""
    kind, _, how = run.partition(", ")
    x, y = data
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=draw)
    test, seen = order[:360], order[360:]
    torch.manual_seed(seed)
    model = net(kind)
    groups: Any = param_groups(model, lr=rate) if how == "groups" else model.parameters()
    optimizer = torch.optim.Adam(groups, lr=rate)
    for _ in range(steps):
        index = seen[torch.randint(len(seen), (BATCH,), generator=draw)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(x[seen]), y[seen]))
        accuracy = float((model(x[test]).argmax(1) == y[test]).float().mean())
    return {"loss": loss if math.isfinite(loss) else math.inf, "test": accuracy}


def summary(table: dict[str, dict[float, list[dict[str, float]]]]) -> dict[str, Any]:
    """What the goals ask for."""
    middle = {
        run: {rate: statistics.median(r["loss"] for r in rows) for rate, rows in rates.items()}
        for run, rates in table.items()
    }
    best = {run: min(losses, key=lambda rate: losses[rate]) for run, losses in middle.items()}
    found: dict[str, Any] = {"best_rate": best, "best_loss": {run: middle[run][best[run]] for run in middle}}
    rates = list(next(iter(table.values())))
    for kind in CHAINS:
        one, groups = table[f"{kind}, one rate"], table[f"{kind}, groups"]
        found[kind] = {
            "lower_at_the_dense_rate": [
                sum(b["loss"] < a["loss"] for a, b in zip(one[best["dense"]], groups[best["dense"]])),
                len(one[best["dense"]]),
            ],
            "rates_where_the_median_is_lower": sum(
                middle[f"{kind}, groups"][r] < middle[f"{kind}, one rate"][r] for r in rates
            ),
            "best_against_best": middle[f"{kind}, one rate"][best[f"{kind}, one rate"]]
            / middle[f"{kind}, groups"][best[f"{kind}, groups"]],
            "steps_on_the_grid_from_the_dense_rate": {
                how: rates.index(best[f"{kind}, {how}"]) - rates.index(best["dense"]) for how in ("one rate", "groups")
            },
        }
    return found


def main() -> None:
    """Gate, train, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder with scikit-learn")
    parser.add_argument("--smoke", action="store_true", help="two seeds, three rates, ten steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.packages:
        sys.path.append(str(arguments.packages))
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        sys.exit(f"The digits come with scikit-learn ({error}): see --packages.")
    torch.set_num_threads(1)
    gate()
    pixels, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float() / 16
    data = (x - x.mean()) / x.std(), torch.from_numpy(classes).long()
    rates, seeds, steps = (RATES[1:4], 2, 10) if arguments.smoke else (RATES, SEEDS, STEPS)
    table = {
        run: {rate: [train(run, data, rate=rate, steps=steps, seed=s) for s in range(seeds)] for rate in rates}
        for run in RUNS
    }
    for run, by_rate in table.items():
        for rate, rows in by_rate.items():
            losses = sorted(row["loss"] for row in rows)
            test = statistics.median(row["test"] for row in rows)
            print(f"{run:20} {rate:7g} loss {statistics.median(losses):8.5f} [{losses[0]:.5f}, {losses[-1]:.5f}] "
                  f"test {test:.3f}")  # fmt: skip
    found = summary(table)
    print(json.dumps(found, indent=1))
    if arguments.json:
        machine = {"cpu": environment().cpu, "threads": 1, "torch": torch.__version__, "python": sys.version}
        parameters = {kind: sum(p.numel() for p in net(kind).parameters()) for kind in ("dense", *CHAINS)}
        document = {
            "question": __doc__.splitlines()[0], "machine": machine, "smoke": arguments.smoke, "steps": steps,
            "batch": BATCH, "seeds": seeds, "parameters": parameters, "summary": found,
            "runs": {run: {str(rate): rows for rate, rows in by_rate.items()} for run, by_rate in table.items()},
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
