"""Is clustered attention on the CPU faster than softmax attention, from which length on, and what does k-means cost?

Question: time and memory of `ops.clustered_attention` against `scaled_dot_product_attention`; a step of its k-means
against FAISS; the length from which clusters are faster, and what `break_even.pays` thinks of it; derivatives.
Goals: N = 8 192, 8 heads of 64, C = 128, k = 32, one thread: >= 8 times softmax attention, peak memory < 1/10 of the
scores of all pairs; a step of k-means >= 3 times FAISS.
Gates: the kernel agrees with torch's operations in float64 (1e-4 of the largest output); k = all keys is softmax
attention.
Method: random queries, keys and values (time does not depend on them but for the choice of the largest keys); one
thread, time of the thread, in turns, medians. Memory: the peak of a fresh process' resident set over what it held
before the call. A step: the time of 41 iterations less that of 1, by 40.

    uv pip install --target FOLDER faiss-cpu
    python benchmarks/clustered_attention.py [--faiss FOLDER] [--seconds 2]
        [--json benchmarks/results/clustered_attention.json] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from linear_attention import Runs, interleaved
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from eke.cost import environment
from eke.ops import clustered_attention
from eke.ops.clustered_attention import Asked, Hamming, KMeans, native, reference
from eke.ops.clustered_attention.break_even import pays

MEMORY = """
import torch
from eke.ops import clustered_attention
torch.set_num_threads(1)
q, k, v = (torch.randn(1, {n}, {h}, {d}) for _ in range(3))
with torch.no_grad():
    clustered_attention(*(x[:, :256] for x in (q, k, v)), clusters=8, topk=8)  # what the first call loads
    torch.nn.functional.scaled_dot_product_attention(*(x[:, :256].transpose(1, 2) for x in (q, k, v)))
    def held(what):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = held("VmRSS")
    {call}
print(held("VmHWM") - before)
"""


def inputs(length: int, heads: int, dim: int) -> list[Tensor]:
    """Random queries, keys and values, (1, length, heads, dim)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, heads, dim, generator=generator) for _ in range(3)]


def gates() -> None:
    """Stop unless the kernel is right."""
    q, k, v = inputs(500, 2, 64)
    wide = [x.double() for x in (q, k, v)]
    exact = scaled_dot_product_attention(*(x.transpose(1, 2) for x in wide)).transpose(1, 2)
    groups = KMeans()(Asked(q.transpose(1, 2), k.transpose(1, 2), [32] * 2)).transpose(1, 2)
    cases = ((32, None, "shared"), (0, None, "shared"), (500, exact, "shared"), (32, None, "key"), (500, exact, "key"))
    for topk, expected, rest in cases:
        out = clustered_attention(q, k, v, clusters=32, topk=topk, groups=groups, rest=rest)
        if expected is None:
            parts, own = [x.transpose(1, 2) for x in wide], groups.transpose(1, 2)
            centres = reference.means(parts[0], own, 32)
            options = {"topk": [topk] * 2, "mask": None, "scale": 0.125, "key": rest == "key"}
            weights = reference.weights((parts[0], parts[1], centres), own, **options)
            expected = (weights @ parts[2]).transpose(1, 2)
        error = float((out.double() - expected).abs().max() / expected.abs().max())
        if not error < 1e-4:
            sys.exit(f"gate: with k={topk}, rest {rest}, the kernel is off by {error:.1e}")


def speed(length: int, heads: int, dim: int, settings: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Times of one length."""
    q, k, v = inputs(length, heads, dim)
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    runs: Runs = {name: lambda s=s: clustered_attention(q, k, v, **s) for name, s in settings.items()}
    with torch.no_grad():
        times = interleaved({**runs, "softmax": lambda: scaled_dot_product_attention(*turned)}, seconds)
    found = {
        "length": length, "heads": heads, "dim": dim, "milliseconds": times,
        "times_faster": {name: times["softmax"]["median"] / times[name]["median"] for name in settings},
    }  # fmt: skip
    print(length, heads, dim, {n: round(t["median"], 2) for n, t in times.items()},
          {n: round(t, 2) for n, t in found["times_faster"].items()}, flush=True)  # fmt: skip
    return found


def derivatives(length: int, seconds: float) -> dict[str, Any]:
    """Forward and backward together."""
    q, k, v = (x.requires_grad_() for x in inputs(length, 8, 64))
    turned = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]

    def eke() -> Any:
        return torch.autograd.grad(clustered_attention(q, k, v, clusters=128, topk=32).sum(), (q, k, v))

    def softmax() -> Any:
        return torch.autograd.grad(scaled_dot_product_attention(*turned).sum(), turned)

    times = interleaved({"eke": eke, "softmax": softmax}, seconds)
    found = {
        "length": length,
        "milliseconds": times,
        "times_faster": times["softmax"]["median"] / times["eke"]["median"],
    }
    print("forward and backward", length, round(found["times_faster"], 2), flush=True)
    return found


def memory(length: int, heads: int, dim: int) -> dict[str, float]:
    """Peak megabytes of one call, of all scores, and the quotient."""
    calls = {
        "eke": "clustered_attention(q, k, v, clusters=128, topk=32)",
        "softmax": "torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))",
    }
    found = {}
    for name, call in calls.items():
        program = MEMORY.format(n=length, h=heads, d=dim, call=call)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.split()[-1]) / 1024
    scores = 4 * length**2 * heads / 2**20
    result = {"length": length, **found, "scores_of_all_pairs": scores, "share": found["eke"] / scores}
    print("memory in MB", result, flush=True)
    return result


def steps(length: int, clusters: int, dim: int, faiss_folder: Path | None, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step of k-means, one head."""
    q = inputs(length, 1, dim)[0].transpose(1, 2)
    runs: Runs = {}
    for name, make in (
        ("eke, points", lambda n: KMeans(n, "plain")), ("eke, points in the keys' metric", KMeans),
        ("eke, hashes", lambda n: Hamming(iterations=n)),
    ):  # fmt: skip
        for n in (1, 41):
            runs[f"{name} {n}"] = lambda make=make, n=n: make(n)(Asked(q, q, [clusters]))
    if faiss_folder is not None:
        sys.path.append(str(faiss_folder))
        import faiss
        import numpy as np

        faiss.omp_set_num_threads(1)
        points = q[0, 0].numpy()

        def train(n: int) -> None:
            clustering = faiss.Clustering(dim, clusters)
            clustering.niter, clustering.max_points_per_centroid = n, length
            clustering.min_points_per_centroid = 1
            clustering.train(points, faiss.IndexFlatL2(dim))

        for n in (1, 41):
            runs[f"FAISS, points {n}"] = lambda n=n: train(n)
        hashes = np.random.default_rng(0).integers(0, 256, (length, 8), dtype=np.uint8)
        index = faiss.IndexBinaryFlat(64)
        index.add(hashes[:clusters])
        runs["FAISS, hashes, assignment alone"] = lambda: index.search(hashes, 1)
    with torch.no_grad():
        times = interleaved(runs, seconds)
    found: dict[str, Any] = {}
    for name in runs:
        if name.endswith(" 1"):
            base = name[:-2]
            found[base] = (times[f"{base} 41"]["median"] - times[name]["median"]) / 40
        elif not name.endswith(" 41"):
            found[name] = times[name]["median"]
    result = {"length": length, "clusters": clusters, "dim": dim, "milliseconds": found}
    if faiss_folder is not None:
        result["times_faster"] = {
            "hashes than FAISS on points": found["FAISS, points"] / found["eke, hashes"],
            "hashes than FAISS' assignment of hashes": found["FAISS, hashes, assignment alone"] / found["eke, hashes"],
            "points than FAISS on points": found["FAISS, points"] / found["eke, points"],
        }
        result["faiss"] = faiss.__version__
    print("step of k-means", result, flush=True)
    return result


def main() -> None:
    """Gate, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faiss", type=Path, help="folder with the package faiss-cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each table row")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only-main", action="store_true", help="measure the largest length anew, keep the rest")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gates()
    seconds, longest = arguments.seconds, 512 if arguments.smoke else 8192
    document: dict[str, Any] = {}
    if arguments.json and arguments.json.exists() and arguments.only_main:
        document = json.loads(arguments.json.read_text())
    document |= {
        "question": __doc__.splitlines()[0], "environment": environment().to_json(), "kernel": native.describe(),
        "threads": 1, "smoke": arguments.smoke, "main": main_case(longest, seconds),
    }  # fmt: skip
    if not arguments.only_main:
        document |= the_rest(longest, seconds, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def main_case(longest: int, seconds: float) -> dict[str, Any]:
    """All ways at the largest length."""
    found = speed(
        longest, 8, 64, {
            "k-means in the keys' metric, 5 steps": {"clusters": 128, "topk": 32},
            "k-means, 5 steps": {"clusters": 128, "topk": 32, "clusterer": KMeans(metric="plain")},
            "k-means, 1 step (warm)": {"clusters": 128, "topk": 32, "clusterer": KMeans(1)},
            "hashes, 10 steps": {"clusters": 128, "topk": 32, "clusterer": Hamming()},
            "plain clustered, k = 0": {"clusters": 128, "topk": 0},
            "k-means in the keys' metric, 5 steps, rest as a key": {"clusters": 128, "topk": 32, "rest": "key"},
            "hashes, 10 steps, rest as a key": {
                "clusters": 128, "topk": 32, "clusterer": Hamming(), "rest": "key",
            },
            "causal, blocks of 1024": {"clusters": 128, "topk": 32, "causal": True, "block": max(128, longest // 8)},
        }, 10 * seconds,
    )  # fmt: skip
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(longest, 8, 64))
    with torch.no_grad():
        causal = interleaved({"causal": lambda: scaled_dot_product_attention(q, k, v, is_causal=True)}, seconds)
    found["softmax_causal_milliseconds"] = causal["causal"]["median"]
    return found


def the_rest(longest: int, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Lengths, memory, steps, derivatives."""
    lengths = (256, 512) if arguments.smoke else (256, 384, 512, 768, 1024, 1536, 2048, 4096)
    even = []
    for heads, dim in ((12, 32), (8, 64)):
        for clusters, topk in ((25, 32), (100, 32)):
            rows = [speed(n, heads, dim, {"eke": {"clusters": clusters, "topk": topk}}, seconds / 2) for n in lengths]
            first = next((row["length"] for row in rows if row["times_faster"]["eke"] > 1), None)
            expected = next(
                (n for n in range(64, 65536, 64) if pays((n, n, 2 * dim), clusters=clusters, topk=topk)), None
            )
            even.append({
                "heads": heads, "dim": dim, "clusters": clusters, "topk": topk, "break_even": first,
                "break_even_expected": expected, "rows": rows,
            })  # fmt: skip
            print("break-even", heads, dim, clusters, first, "expected", expected, flush=True)
    return {
        "memory": memory(longest, 8, 64), "steps": steps(longest, 128, 64, arguments.faiss, 2 * seconds),
        "break_even": even,
        "derivatives": [derivatives(n, seconds) for n in ((256,) if arguments.smoke else (1024, 4096))],
    }  # fmt: skip


if __name__ == "__main__":
    main()
