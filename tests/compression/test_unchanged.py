"""What no plan makes smaller is named with its reason where a budget is too small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import eke
from eke.compression import InfeasibleError, Recovery, cross_entropy
from eke.compression.candidates import Block, Decisions, Forms
from eke.compression.unchanged import unchanged
from eke.sites import find


class Own(nn.Module):
    """A matrix that no layer of torch holds, beside layers that eke reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 32))
        self.table, self.last = nn.Parameter(torch.randn(32, 24) / 6), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x))) @ self.table))


def decisions(model: nn.Module, *names: str, blocks: tuple[Block, ...] = ()) -> Decisions:
    sites = {site.name: site for site in find(model)}
    return Decisions((), tuple(Forms(sites[name], (None,), (0.0,)) for name in names), blocks)


def test_the_largest_parameters_without_an_option_are_named_with_the_reason():
    model = Own()
    found = unchanged(model, decisions(model, "first", "last"))
    share = 100 * (32 * 24 + 32 * 16 + 32) / sum(p.numel() for p in model.parameters())
    assert found == (
        f" {share:.0f} % of the parameters have no option: 'table' (parameter of Own, kept whole), "
        "'second.parametrizations.weight.original1' (weight is parametrized), "
        "'second.parametrizations.weight.original0' (weight is parametrized)."
    )


def test_no_more_than_three_are_named():
    model = nn.Sequential(*(nn.Linear(6 + i, 7 + i) for i in range(5)))
    found = unchanged(model, decisions(model), skip=["4"])
    assert "'4.weight' (in skip=), '3.weight' (no structure saves bytes in it, no cut of it is proved)" in found
    assert found.endswith("and 2 more.")
    assert found.count("(") == 3


def test_what_has_options_or_is_small_is_not_named():
    model = nn.Sequential(nn.Linear(30, 40), nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), nn.Linear(40, 1))
    known = decisions(model, "0", blocks=(Block("1", "identity", 1.0),))
    assert unchanged(model, known) == ""  # 40 of some 4 500 entries are not worth a word


def test_a_budget_below_the_smallest_plan_says_what_is_in_the_way():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator))]
    with (
        pytest.warns(UserWarning, match="parametrized"),
        pytest.raises(InfeasibleError, match=r"structures\. \d+ % of the parameters have no option: 'table'"),
    ):
        eke.compress(
            Own(), batches, loss=cross_entropy, budget=eke.Budget(size="0.1x"), recovery=Recovery(steps=0), seconds=0.02
        )
