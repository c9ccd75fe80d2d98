"""Does EKFAC's curvature agree with two other implementations, as matrix and as direction?

Question: largest relative difference of eke's layers' matrices, damped directions and Kronecker factors to those of
curvlinops-for-pytorch 3 (empirical and exact Fisher, linear layers and convolutions) and nngeometry 0.4 (exact Fisher).
Goal: at most 1e-6, float64.
Gate: all of it; the script fails above the goal.
Method: one net and batch for all; eke's statistics are those of one step with `statistics_decay=0, basis_every=1`.
Matrices are written out whole, so signs and order of eigenvectors do not matter.

    python benchmarks/curvature_oracles.py --oracles FOLDER_OF_PACKAGES
        [--json benchmarks/results/curvature_oracles.json]
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eke.optim import EKFAC

GOAL, DAMPING, EXAMPLES = 1e-6, 0.01, 40
PLAIN: dict[str, Any] = {
    "momentum": 0.0, "kl_clip": None, "statistics_decay": 0.0, "basis_every": 1, "damping": DAMPING,
}  # fmt: skip


def perceptron() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def convolutional() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2, stride=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


def data(kind: str) -> tuple[Tensor, Tensor]:
    """A batch for a net."""
    shape = (EXAMPLES, 7) if kind == "perceptron" else (EXAMPLES, 2, 4, 4)
    return torch.randn(shape), torch.randint(4, (EXAMPLES,))


def split(dense: Tensor, m: int, n: int) -> Tensor:
    """From rows of [W b] to W's entries and then b's."""
    places = torch.arange(m * n).reshape(m, n)
    order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
    return dense[order][:, order]


def ours(net: nn.Module, x: Tensor, y: Tensor, fisher: Any) -> tuple[EKFAC, dict[str, Tensor], dict[str, Tensor]]:
    """Matrices and directions by layer, as eke has them."""
    here = copy.deepcopy(net)
    opt = EKFAC(here, lr=1.0, fisher=fisher, **PLAIN)
    z = here(x)
    if fisher == "exact":
        opt.observe(z)
    F.cross_entropy(z, y).backward()
    before = {name: p.detach().clone() for name, p in here.named_parameters()}
    opt.step()
    matrices, directions = {}, {}
    for name, module in here.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            basis = opt.basis(name)
            m, n = basis.g_vectors.shape[1], basis.a_vectors.shape[1]
            matrices[name] = split(basis.dense(), m, n)
            moved = [before[f"{name}.{key}"] - getattr(module, key).detach() for key in ("weight", "bias")]
            directions[name] = torch.cat([part.flatten() for part in moved])
    return opt, matrices, directions


def difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((one - other).norm() / other.norm())


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient of each layer, weight before bias."""
    found = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    named = dict(zip([name for name, _ in net.named_parameters()], found))
    names = dict.fromkeys(name.rpartition(".")[0] for name in named)
    return {name: torch.cat([named[f"{name}.{key}"].flatten() for key in ("weight", "bias")]) for name in names}


def curvlinops_rows(net: nn.Module, x: Tensor, y: Tensor, fisher: str) -> dict[str, float]:
    """Differences to curvlinops' EKFAC operator."""
    from curvlinops import EKFACLinearOperator, FisherType

    kind = FisherType.EMPIRICAL if fisher == "empirical" else FisherType.TYPE2
    theirs = EKFACLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)], fisher_type=kind, separate_weight_and_bias=False,
        check_deterministic=False,
    )  # fmt: skip
    size = sum(p.numel() for p in net.parameters())
    dense = (theirs @ torch.eye(size)).detach()
    _, matrices, directions = ours(net, x, y, fisher)
    slopes, start, found = gradients(net, x, y), 0, {"matrix": 0.0, "direction": 0.0, "outside the blocks": 0.0}
    for name, matrix in matrices.items():
        part = slice(start, start + len(matrix))
        block = dense[part, part]
        found["matrix"] = max(found["matrix"], difference(matrix, block))
        expected = torch.linalg.solve(block + DAMPING * torch.eye(len(block)), slopes[name])
        found["direction"] = max(found["direction"], difference(directions[name], expected))
        dense[part, part] = 0
        start += len(matrix)
    found["outside the blocks"] = float(dense.norm())
    return found


def nngeometry_rows(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Differences to nngeometry's K-FAC factors, EKFAC matrix and solve; exact Fisher."""
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PVector
    from nngeometry.object.pspace import PMatEKFAC, PMatKFAC

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
    layers = LayerCollection.from_model(net)
    theirs = FIM(net, loader, PMatEKFAC, variant="classif_logits", layer_collection=layers)
    theirs.update_diag(loader)
    factors = FIM(net, loader, PMatKFAC, variant="classif_logits", layer_collection=layers)
    opt, matrices, directions = ours(net, x, y, "exact")
    dense, slopes = theirs.to_torch().detach(), gradients(net, x, y)
    vector = PVector(layers, vector_repr=torch.cat(list(slopes.values())))
    solved = theirs.solve(vector, regul=DAMPING).to_torch().detach()
    found, start = {"matrix": 0.0, "direction": 0.0, "factors": 0.0}, 0
    pairs = list(factors.data.values())
    for number, (name, matrix) in enumerate(matrices.items()):
        part = slice(start, start + len(matrix))
        found["matrix"] = max(found["matrix"], difference(matrix, dense[part, part]))
        found["direction"] = max(found["direction"], difference(directions[name], solved[part]))
        state = opt.state[next(p for key, p in _layers(opt) if key == name)]
        # The product alone has a scale: each factor is compared with a trace of 1.
        for mine, other in zip((state["a_factor"][0], state["g_factor"][0]), pairs[number]):
            other = other.detach()
            found["factors"] = max(found["factors"], difference(mine / mine.trace(), other / other.trace()))
        start += len(matrix)
    return found


def _layers(opt: EKFAC) -> list[tuple[str, Any]]:
    return [(layer.name, layer.weight) for layer in opt._layers.values()]


def compare() -> dict[str, dict[str, float]]:
    """All differences by row."""
    rows = {}
    for kind, make in (("perceptron", perceptron), ("convolutional", convolutional)):
        torch.manual_seed(0)
        net, (x, y) = make(), data(kind)
        for fisher in ("empirical", "exact"):
            rows[f"curvlinops, {kind}, {fisher}"] = curvlinops_rows(net, x, y, fisher)
        rows[f"nngeometry, {kind}, exact"] = nngeometry_rows(net, x, y)
    return rows


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracles", type=Path, help="folder with curvlinops-for-pytorch and nngeometry")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.oracles:
        sys.path.append(str(arguments.oracles))
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rows = compare()
    for name, found in rows.items():
        print(f"{name:40} " + ", ".join(f"{key} {value:.1e}" for key, value in found.items()))
    if arguments.json:
        versions = {
            name: importlib.metadata.version(name) for name in ("curvlinops-for-pytorch", "nngeometry", "torch")
        }
        document = {"question": __doc__.splitlines()[0], "goal": GOAL, "versions": versions, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    worst = max(value for found in rows.values() for value in found.values())
    if worst > GOAL:
        sys.exit(f"gate: {worst:.1e} exceeds {GOAL:.0e}")


if __name__ == "__main__":
    main()
