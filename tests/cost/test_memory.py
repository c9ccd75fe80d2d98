"""Peak memory of small nets, byte by byte, and the same number with shapes alone and with data."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eke.cost import forward as rehearsal
from eke.cost import give_back, peak_memory

X = torch.zeros(3, 10)
WEIGHTS = (10 * 20 + 20) + (20 * 5 + 5)


class Apply(nn.Module):
    """A module around a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def residual(x: Tensor) -> Tensor:
    return F.relu(x) + x


def chain(x: Tensor) -> Tensor:
    for _ in range(10):
        x = torch.sin(x)
    return x


def kept(x: Tensor) -> Tensor:
    return torch.stack([torch.sin(x) for _ in range(4)])


SHARED = nn.Linear(10, 10)

# (name, module, entries of 4 bytes at the peak, input of 30 included)
CASES = [
    ("linear", nn.Linear(10, 20), 220 + 30 + 60),
    (
        "two layers, second activation alive with the first",
        nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5)),
        WEIGHTS + 30 + 75,
    ),
    ("activation out of place", nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)), WEIGHTS + 30 + 120),
    ("activation in place", nn.Sequential(nn.Linear(10, 20), nn.ReLU(True), nn.Linear(20, 5)), WEIGHTS + 30 + 75),
    ("view", nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (10, 3)), nn.Identity()), 30),
    ("chain frees what it passed", Apply(chain), 30 + 60),
    ("kept activations add up", Apply(kept), 30 + 4 * 30 + 120),
    ("residual", Apply(residual), 30 + 60),
    ("tied modules", nn.Sequential(SHARED, SHARED), 110 + 30 + 60),
    ("buffers", nn.Sequential(nn.BatchNorm1d(10, affine=False)), 20 + 30 + 30),
]


@pytest.mark.parametrize(("module", "entries"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("path", ["shapes", "data"])
def test_peak_equals_the_bytes_by_hand(module, entries, path, monkeypatch):
    if path == "data":
        monkeypatch.setattr(rehearsal, "_has_only_plain_tensors", lambda *_: False)
    counter = 8 if any(isinstance(layer, nn.BatchNorm1d) for layer in module.modules()) else 0
    assert peak_memory(module, X) == 4 * entries + counter


def test_half_precision_halves_the_bytes():
    net = nn.Linear(10, 20)
    assert 2 * peak_memory(net.half(), X.half()) == peak_memory(net.float(), X)


def test_weights_that_view_one_storage_count_it_once():
    net = nn.Linear(10, 10, bias=False)
    other = nn.Linear(10, 10, bias=False)
    other.weight = net.weight
    assert peak_memory(nn.Sequential(net, other), X) == 4 * (100 + 30 + 60)


def test_sparse_weights_count_their_indices_and_values():
    weight = torch.eye(10).to_sparse_csr()
    net = Apply(lambda x: weight @ x.T)
    net.register_buffer("weight", weight)
    stored = 11 * 8 + 10 * 8 + 10 * 4
    assert peak_memory(net, X) == stored + 4 * (30 + 30)


def test_batch_scales_the_activations_alone():
    net = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    sizes = [peak_memory(net, torch.zeros(batch, 10)) for batch in (1, 2, 3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 4 * (10 + 20 + 5)


def test_nothing_changes_and_every_run_gives_the_same():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(10), nn.Dropout()).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = -torch.ones(3, 10)
    generator = torch.get_rng_state()
    assert len({peak_memory(net, x) for _ in range(5)}) == 1
    assert net.training
    assert torch.equal(x, -torch.ones(3, 10))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_mapping_is_keyword_inputs():
    assert peak_memory(nn.Linear(10, 20), {"input": X}) == 4 * 310


def test_freed_memory_goes_back_to_the_system():
    status = pathlib.Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("the size of the process is read from /proc")

    def pages() -> int:
        return int(status.read_text().split()[1])

    held = [torch.ones(1 << 18) for _ in range(200)]  # 1 MB each
    kept = held[::50]
    held.clear()
    before = pages()
    give_back()
    assert pages() <= before
    assert all(float(tensor.sum()) == 1 << 18 for tensor in kept)
