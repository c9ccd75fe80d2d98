"""Images by sparse coding: eke's solvers against scikit-learn's and sporco's, at equal dictionary and equal problem.

Question: scikit-image's camera (a crop of 128 x 128): noise of 25 grey levels taken off, and half of the pixels filled
in, by patches 8 x 8 with a cosine dictionary and with a learned one (scikit-learn's, from the noisy patches), and noise
taken off by a convolutional dictionary. PSNR and time of the thread, one thread.
Gate: both sides solve the same problem: errors of the fit, or objectives, agree to 1 % (printed beside).
Method: float64 on both sides; the faster of two runs. Rivals come from a folder given with --rivals.

    python benchmarks/sparse_images.py --rivals FOLDER [FOLDER ...] [--json benchmarks/results/sparse_images.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import eke
from eke import unrolled
from eke.cost import environment

SIDE, STRIDE, NOISE, NONZEROS = 8, 2, 25.0, 4


def cosines(per_side: int) -> Tensor:
    """Cosine dictionary of 8 x 8 patches, (64, per_side^2), columns of length one, all but the first without mean."""
    at = torch.arange(SIDE).double()
    one = torch.cos(torch.pi * (at[:, None] + 0.5) * torch.arange(per_side).double() / per_side)
    one[:, 1:] -= one[:, 1:].mean(0)
    both = torch.kron(one, one)
    return both / torch.linalg.vector_norm(both, dim=0)


def patches(image: Tensor, stride: int = STRIDE) -> Tensor:
    """All patches, (count, 64)."""
    return F.unfold(image[None, None], SIDE, stride=stride)[0].T


def averaged(parts: Tensor, shape: tuple[int, int], stride: int = STRIDE) -> Tensor:
    """The image whose pixels are means over the patches that hold them."""
    total = F.fold(parts.T[None], shape, SIDE, stride=stride)[0, 0]
    return total / F.fold(torch.ones_like(parts).T[None], shape, SIDE, stride=stride)[0, 0].clamp_min(1)


def psnr(found: Tensor, truth: Tensor) -> float:
    """Peak signal over error, in decibels."""
    return float(10 * torch.log10(255**2 / (found - truth).square().mean()))


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """A result and the seconds of the faster of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.thread_time()
        result = work()
        best = min(best, time.thread_time() - start)
    return result, best


def row(task: str, dictionary: str, solver: str, seconds: float, image: Tensor, truth: Tensor, fit: float) -> dict:
    """One line of the table, printed."""
    found = {"task": task, "dictionary": dictionary, "solver": solver, "seconds": seconds, "fit": fit}
    found["psnr"] = psnr(image.clamp(0, 255), truth)
    print(f"{task:12} {dictionary:14} {solver:34} {found['psnr']:6.2f} dB {seconds:8.3f} s  fit {fit:.5g}", flush=True)
    return found


def denoised(clean: Tensor, noisy: Tensor, name: str, a: Tensor, linear: Any) -> list[dict]:
    """Noise off by matching pursuit with four columns a patch, and by the lasso."""
    parts = patches(noisy)
    mean = parts.mean(1, keepdim=True)
    b, an = (parts - mean).contiguous(), a.numpy()
    table, level = [], 2.2 * NOISE

    def add(solver: str, work: Callable[[], Tensor], penalty: float) -> None:
        x, seconds = timed(work)
        fit = float(((b - x @ a.T).square().sum(1) / 2 + penalty * x.abs().sum(1)).mean())
        table.append(row("denoise", name, solver, seconds, averaged(x @ a.T + mean, clean.shape), clean, fit))

    omp = unrolled.OMP(a, sparsity=NONZEROS)
    add("eke OMP, 4 columns", lambda: omp(b), 0.0)
    add("scikit-learn OMP, 4 columns", lambda: torch.from_numpy(
        linear.orthogonal_mp(an, b.numpy().T, n_nonzero_coefs=NONZEROS).T.copy()), 0.0)  # fmt: skip
    fista = unrolled.FISTA(a, penalty=level, iterations=2000)
    add("eke FISTA, lasso", lambda: fista.solve(b, tolerance=1e-4).x, level)
    add("scikit-learn coordinate descent", lambda: torch.from_numpy(importlib.import_module(
        "sklearn.decomposition").sparse_encode(b.numpy(), an.T, algorithm="lasso_cd", alpha=level)), level)  # fmt: skip
    return table


def filled(clean: Tensor, name: str, a: Tensor, linear: Any) -> list[dict]:
    """Half of the pixels filled in: each patch has the rows of the dictionary that it shows."""
    generator = torch.Generator().manual_seed(1)
    seen = (torch.rand(clean.shape, generator=generator) < 0.5).double()
    parts, shown = patches(clean * seen, 4), patches(seen, 4)
    mean = parts.sum(1, keepdim=True) / shown.sum(1, keepdim=True)
    b, table = (parts - mean) * shown, []
    each = a * shown.unsqueeze(-1)

    def add(solver: str, work: Callable[[], Tensor]) -> None:
        x, seconds = timed(work)
        fit = float(((b - (each @ x.unsqueeze(-1)).squeeze(-1)) ** 2).sum(1).mean())
        whole = torch.where(shown > 0, parts, x @ a.T + mean)
        table.append(row("half filled", name, solver, seconds, averaged(whole, clean.shape, 4), clean, fit))

    def one_by_one() -> Tensor:
        rows, out = (shown > 0).numpy(), []
        for at, right in zip(rows, b.numpy(), strict=True):
            out.append(linear.orthogonal_mp(a.numpy()[at], right[at], n_nonzero_coefs=NONZEROS))
        return torch.from_numpy(np.stack(out))

    add("eke OMP, 4 columns", lambda: unrolled.OMP(each, sparsity=NONZEROS)(b))
    add("scikit-learn OMP, 4 columns", one_by_one)
    return table


def convolved(clean: Tensor, noisy: Tensor, found: dict[str, Any]) -> list[dict]:
    """Noise off by 16 circular filters: the lasso of the image without its smooth part, 200 steps on both sides."""
    filters = cosines(4).T.reshape(16, 1, SIDE, SIDE)[1:].contiguous()
    smooth = F.avg_pool2d(F.pad(noisy[None, None], (4, 4, 4, 4), mode="reflect"), 9, stride=1)[0, 0]
    detail, level = (noisy - smooth).reshape(1, -1), 3.0 * NOISE
    operator = unrolled.Convolutional(filters, tuple(clean.shape), circular=True)
    table = []

    def add(solver: str, work: Callable[[], Tensor]) -> None:
        x, seconds = timed(work)
        image = operator.forward(x)
        fit = float((detail - image).square().sum() / 2 + level * x.abs().sum())
        table.append(row("denoise", "convolutional", solver, seconds, image.reshape(clean.shape) + smooth, clean, fit))

    fista = unrolled.FISTA(operator, penalty=level, iterations=200)
    add("eke FISTA, 200 steps", lambda: fista(detail))
    if "sporco.pgm.cbpdn" in found:
        cbpdn = found["sporco.pgm.cbpdn"]
        size = float(operator.norm_squared())

        def rival() -> Tensor:
            settings = {"Verbose": False, "MaxMainIter": 200, "L": size, "RelStopTol": 0.0}
            options = cbpdn.ConvBPDN.Options(settings)
            solver = cbpdn.ConvBPDN(
                filters[:, 0].permute(1, 2, 0).numpy(), detail.reshape(clean.shape).numpy(), level, options
            )
            return torch.from_numpy(solver.solve().squeeze().transpose(2, 0, 1).reshape(1, -1).copy())

        add("sporco FISTA, 200 steps", rival)
    return table


def main() -> None:
    """Run all tasks, print them and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", type=Path, nargs="+", required=True, help="folders with scikit-image and rivals")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sys.path.extend(str(folder) for folder in given.rivals)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in ("skimage.data", "sklearn.linear_model", "sklearn.decomposition", "sporco.pgm.cbpdn"):
        try:
            found[name] = importlib.import_module(name)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    clean = torch.from_numpy(found["skimage.data"].camera()[64:192, 192:320].astype(np.float64))
    noisy = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    print(f"noisy: {psnr(noisy.clamp(0, 255), clean):.2f} dB")
    centred = patches(noisy) - patches(noisy).mean(1, keepdim=True)
    learner = found["sklearn.decomposition"].MiniBatchDictionaryLearning(
        144, alpha=2.2 * NOISE, max_iter=10, batch_size=256, random_state=0
    )
    atoms = torch.from_numpy(learner.fit(centred.numpy()).components_).T
    learned = torch.nn.functional.normalize(atoms[:, torch.linalg.vector_norm(atoms, dim=0) > 1e-6], dim=0)
    linear, rows = found["sklearn.linear_model"], []
    with torch.no_grad():
        for name, a in (("cosines", cosines(12)[:, 1:]), ("learned", learned.contiguous())):
            rows += denoised(clean, noisy, name, a, linear)
            rows += filled(clean, name, a, linear)
        rows += convolved(clean, noisy, found)
    if given.json:
        document = {
            "benchmark": "sparse_images", "eke": eke.__version__, "environment": environment().to_json(),
            "versions": {name.split(".")[0]: sys.modules[name.split(".")[0]].__version__ for name in found},
            "noisy_psnr": psnr(noisy.clamp(0, 255), clean), "rows": rows,
        }  # fmt: skip
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
