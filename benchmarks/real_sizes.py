"""Does compressing a model of real size stay within ten minutes and six times its own memory on two cores?

ResNet-50, ViT-B/16 (torchvision's and timm's), ConvNeXt-T and a BERT-base, all with random weights, are compressed to
0.3 of their bytes, and to 0.3 of their bytes and 0.7 of their time, without recovery.
Method: every run is a fresh process. A stage lasts from the first call of `progress` that names it to the first one
that names another; peak memory is the process's ru_maxrss (Python and torch, some 0.3 GB, included) when a stage ends,
so it never falls. CPU seconds of the process stand beside the clock's. Memory is held against weights + activations:
bytes of all parameters and buffers, plus bytes of the outputs of all modules without children in one forward pass of
one calibration batch, those in the storage of an input not counted. Nothing is trained: running statistics are those of
the images, the head is scaled so that logits spread by 3, and labels are the model's own most likely classes, with
every fourth one drawn at random.
Gate: the result keeps every limit of its budget as `verify` measured it, and gives finite outputs.
Other work on the machine counts against the seconds: the load average before and after stands beside them.

    python benchmarks/real_sizes.py [--smoke] [--models resnet50 ...] [--budgets size both] [--threads 2]
                                    [--json benchmarks/results/real_sizes.json]

Needs about an hour for everything; the smoke run takes a small net and less than a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SECONDS, TIMES = 600.0, 6.0
BATCHES, SAMPLES = 4, 8
BUDGETS: dict[str, dict[str, str]] = {"size": {"size": "0.3x"}, "both": {"size": "0.3x", "latency": "0.7x"}}
MODELS = ("resnet50", "vit_b_16", "timm_vit_b", "convnext_t", "bert_base")
SMOKE = ("resnet18_64",)


def build(name: str) -> Any:
    """Return an untrained model in evaluation mode."""
    import torch

    torch.manual_seed(0)
    if name == "bert_base":
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(BertConfig(num_labels=1000, attn_implementation="eager")).eval()
    if name == "timm_vit_b":
        import timm

        return timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    import torchvision.models as zoo

    made = {
        "resnet50": zoo.resnet50, "vit_b_16": zoo.vit_b_16, "convnext_t": zoo.convnext_tiny,
        "resnet18_64": zoo.resnet18,
    }  # fmt: skip
    return made[name](weights=None).eval()


def inputs(name: str, count: int) -> list[Any]:
    """Return random batches of what the model takes."""
    import torch

    generator = torch.Generator().manual_seed(1)
    if name == "bert_base":
        return [torch.randint(1000, 30000, (SAMPLES, 128), generator=generator) for _ in range(count)]
    side = 64 if name.endswith("_64") else 224
    return [torch.randn(SAMPLES, 3, side, side, generator=generator) for _ in range(count)]


def answers(model: Any, x: Any) -> Any:
    """Return the logits of a model of any of the zoos."""
    found = model(x)
    return found if not hasattr(found, "logits") else found.logits


def enliven(model: Any, batches: list[Any]) -> list[Any]:
    """Give normalisations the statistics of the images and the head a scale; return labels."""
    import torch
    from torch import nn

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for x in batches if norms else ():
            answers(model, x)
        model.eval()
        logits = torch.cat([answers(model, x) for x in batches])
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        if float(logits.std(0).mean()) == 0:  # timm and torchvision start some heads at zero
            nn.init.normal_(head.weight, std=0.02)
            logits = torch.cat([answers(model, x) for x in batches])
        spread = 3.0 / float(logits.std())
        head.weight.mul_(spread)
        head.bias.mul_(spread)
        labels = (logits * spread).argmax(1)
        generator = torch.Generator().manual_seed(2)
        labels[::4] = torch.randint(logits.shape[1], labels[::4].shape, generator=generator)
    return list(labels.split(SAMPLES))


def own_bytes(model: Any, x: Any) -> tuple[int, int]:
    """Return the bytes of the weights, and of the outputs of all innermost modules on one batch."""
    import torch
    from torch import Tensor

    total = 0

    def note(_module: Any, given: Any, output: Any) -> None:
        nonlocal total
        known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                total += tensor.nbytes

    handles = [m.register_forward_hook(note) for m in model.modules() if not list(m.children())]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), total


class Stages:
    """Seconds of each stage and the peak memory at its end, from calls of `progress`."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.begun, self.begun_cpu = time.perf_counter(), time.process_time()
        self.name = "prepare"

    def __call__(self, stage: str, _share: float, text: str) -> None:
        """Note the change of stage; the steps of finding candidates count as stages."""
        kind = text.split(",")[0].split(" at ")[0].split(":")[0] if stage == "candidates" else ""
        name = f"{stage}, {kind}" if kind else stage
        if name != self.name:
            self.close(name)

    def close(self, name: str = "") -> None:
        """End the present stage and begin another one."""
        now, cpu = time.perf_counter(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        same = next((row for row in self.rows if row["stage"] == self.name), None)
        if same is None:
            same = {"stage": self.name, "seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": peak}
            self.rows.append(same)
        same["seconds"] = round(same["seconds"] + now - self.begun, 2)
        same["cpu_seconds"] = round(same["cpu_seconds"] + cpu - self.begun_cpu, 2)
        same["peak_bytes"] = peak
        spent = f"{now - self.begun:8.1f} s {cpu - self.begun_cpu:8.1f} s of CPU"
        print(f"  {self.name:44s} {spent}  peak {peak / 1e9:.2f} GB", file=sys.stderr, flush=True)
        self.name, self.begun, self.begun_cpu = name, now, cpu


def worker(name: str, budget: str, threads: int) -> Row:
    """Compress one model in this process."""
    import torch

    import eke
    from eke.compression import Recovery

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model = build(name)
    given = inputs(name, BATCHES)
    labels = enliven(model, given)
    weights, activations = own_bytes(model, given[0])

    def loss(net: Any, batch: Any) -> Any:
        return torch.nn.functional.cross_entropy(answers(net, batch[0]), batch[1])

    limits = BUDGETS[budget]
    stages, load = Stages(), os.getloadavg()[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begun, begun_cpu = time.perf_counter(), time.process_time()
    result = eke.compress(
        model, list(zip(given, labels)), loss=loss, budget=eke.Budget(**limits), recovery=Recovery(steps=0),
        threads=threads, progress=stages,
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    stages.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    evidence = result.evidence
    shares = {key: evidence.after[key] / evidence.before[key] for key in ("size", "latency", "macs")}
    kept = all(shares[key] <= float(limit.rstrip("x")) for key, limit in limits.items())
    with torch.no_grad():
        finite = bool(torch.isfinite(answers(result.model, given[0])).all())
    return {
        "model": name, "budget": limits, "threads": threads, "verified": kept and finite, "shares": shares,
        "losses": {k: float(v) for k, v in evidence.scores.items()},
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "weights_bytes": weights, "activations_bytes": activations,
        "peak_bytes": peak, "peak_before_bytes": before, "times_own_memory": round(peak / (weights + activations), 2),
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)], "stages": stages.rows,
    }  # fmt: skip


def fresh(name: str, budget: str, threads: int) -> Row:
    """Return what `worker` returns in a process of its own."""
    call = [sys.executable, __file__, "--worker", name, budget, "--threads", str(threads)]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"model": name, "budget": BUDGETS[budget], "failed": done.returncode}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small net")
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(*options.worker, options.threads)))
        return
    from eke import __version__
    from eke.cost import environment

    rows = []
    for name in options.models or (SMOKE if options.smoke else MODELS):
        for budget in options.budgets:
            print(f"{name}, {BUDGETS[budget]}", file=sys.stderr, flush=True)
            rows.append(fresh(name, budget, options.threads))
            shown = {k: v for k, v in rows[-1].items() if k != "stages"}
            print(json.dumps(shown), flush=True)
            document = {
                "question": "seconds and peak memory of compressing models of real size",
                "smoke": options.smoke,
                "goals": {"seconds": SECONDS, "times_own_memory": TIMES},
                "reached": {
                    f"{r['model']}, {', '.join(r['budget'])}": "failed" not in r
                    and r["verified"] and r["seconds"] <= SECONDS and r["times_own_memory"] <= TIMES
                    for r in rows
                },
                "settings": {"batches": BATCHES, "samples": SAMPLES, "recovery": 0},
                "eke": __version__,
                "environment": environment().to_json(),
                "rows": rows,
            }  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
