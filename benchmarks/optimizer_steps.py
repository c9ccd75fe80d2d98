"""What does a step of EKFAC cost against one of Adam, and how many operations is that?

Question: forward, backward and step on the autoencoder 784-256-128-64-16 and back (images of Fashion-MNIST, summed
binary cross entropy), bases every 50 steps, one thread.
Goal: at most 3 times Adam's step at batch 128, at most 2 times for `ekfac_ra` at batch 1024 (published reference
implementation of EKFAC, measured before: 4.3 times; SOAP's: 10 times).
Gate: every optimizer has lowered the loss when it is timed.
Rivals: Adam (torch, the unit), SOAP (pytorch-optimizer, bases every 10 steps, its default).
Method: processor time of periods of 50 steps (one refresh of all bases each), after 51 steps, in turns; medians of the
ratios to Adam, round by round. Operations: torch's counter for products of matrices over the same 50 steps, plus 9 n^3
for eigenvectors and 4/3 n q^2 + 2 n q^2 for an orthogonal basis of q columns, as 2 operations a multiply-add.

    python benchmarks/optimizer_steps.py --images FOLDER_WITH_IDX_FILES [--rivals FOLDER_OF_PACKAGES] [--rounds 7]
        [--json benchmarks/results/optimizer_steps.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from optimizers import autoencoder, images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from eke.cost import environment
from eke.optim import EKFAC

PERIOD = 50


def loss(net: nn.Module, x: Tensor) -> Tensor:
    """Binary cross entropy, summed over pixels."""
    return F.binary_cross_entropy_with_logits(net(x), x, reduction="sum") / len(x)


def makers(batch: int) -> dict[str, Callable[[nn.Module], Any]]:
    """Optimizers that are timed at a batch size."""
    found: dict[str, Callable[[nn.Module], Any]] = {"Adam": lambda net: torch.optim.Adam(net.parameters(), 1e-3)}
    for variant in ("ekfac", "ekfac_ra", "kfac") if batch == 128 else ("ekfac_ra",):
        ranks: tuple[Any, ...] = (None, 128, "auto") if batch == 128 else (None, "auto")
        for rank in ranks:
            label = f"{variant}, {'all' if rank is None else 64 if rank == 'auto' else rank} directions"
            found[label] = lambda net, variant=variant, rank=rank: EKFAC(net, variant=variant, rank=rank)
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        return found
    if batch > 128:
        return found
    return found | {"SOAP": lambda net: SOAP(net.parameters())}


def eigen_operations(optimizer: Any) -> float:
    """Operations of one refresh of all bases that are no products of matrices."""
    total = 0.0
    for state in optimizer.state.values():
        for key in ("a_basis", "g_basis"):
            if key in state:
                groups, n, q = state[key].shape
                total += groups * (9 * n**3 if n == q else (4 / 3 + 2) * n * q**2 + 9 * q**3)
    return total


def main() -> None:
    """Time, count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the idx files, gzipped")
    parser.add_argument("--rivals", type=Path, help="folder with pytorch-optimizer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.rivals:
        sys.path.append(str(arguments.rivals))
    x, _ = images(arguments.images)
    document: dict[str, Any] = {
        "question": __doc__.splitlines()[0], "rounds": arguments.rounds,
        "machine": {"cpu": environment().cpu, "threads": 1, "torch": torch.__version__, "python": sys.version},
        "batches": {},
    }  # fmt: skip
    for batch in arguments.batches:
        order = torch.Generator().manual_seed(0)
        running: dict[str, Callable[[int], float]] = {}
        rows: dict[str, dict[str, float]] = {}
        for name, make in makers(batch).items():
            torch.manual_seed(0)
            net = autoencoder()
            optimizer = make(net)

            def go(
                steps: int,
                net: nn.Module = net,
                optimizer: Any = optimizer,
                batch: int = batch,
                order: torch.Generator = order,
            ) -> float:
                start = time.thread_time()
                for _ in range(steps):
                    part = x[torch.randint(len(x), (batch,), generator=order)]
                    optimizer.zero_grad()
                    loss(net, part).backward()
                    optimizer.step()
                return (time.thread_time() - start) / steps

            first = loss(net, x[:500]).item()
            go(PERIOD + 1)
            if not loss(net, x[:500]).item() < first:
                sys.exit(f"gate: {name} has not lowered the loss of {first:.1f} in {PERIOD + 1} steps")
            with FlopCounterMode(display=False) as counter:
                go(PERIOD)
            operations = counter.get_total_flops() + (
                eigen_operations(optimizer) if isinstance(optimizer, EKFAC) else 0
            )
            rows[name] = {"operations": operations / PERIOD}
            running[name] = go
        samples: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(arguments.rounds):
            for name, go in running.items():
                samples[name].append(go(PERIOD))
        for name, row in rows.items():
            row["milliseconds"] = 1e3 * statistics.median(samples[name])
            row["ratio"] = statistics.median(a / b for a, b in zip(samples[name], samples["Adam"]))
            row["ratio_of_operations"] = row["operations"] / rows["Adam"]["operations"]
            print(f"batch {batch:4} {name:26} {row['milliseconds']:7.2f} ms, {row['ratio']:.2f} times Adam, "
                  f"{row['operations'] / 1e6:.0f} million operations, {row['ratio_of_operations']:.2f} times",
                  flush=True)  # fmt: skip
        document["batches"][str(batch)] = rows
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
