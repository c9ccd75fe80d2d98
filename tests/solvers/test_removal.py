"""Removing columns: least squares on what is kept, and block OBS as its bookkeeping."""

from __future__ import annotations

import itertools

import pytest
import torch

from eke.linalg import Metric
from eke.solvers import Consumer, greedy_removal, removal, removal_scores, remove_columns


def problem(m: int = 4, n: int = 9, seed: int = 0, samples: int = 40) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, n, dtype=torch.float64, generator=generator) + 0.7
    x = x @ torch.randn(n, n, dtype=torch.float64, generator=generator)
    g = torch.randn(m, m + 2, dtype=torch.float64, generator=generator)
    return torch.randn(m, n, dtype=torch.float64, generator=generator), x, g @ g.T


def test_removal_is_least_squares_on_the_kept_columns():
    w, x, g = problem()
    remove = torch.tensor([1, 2, 7])
    kept = [0, 3, 4, 5, 6, 8]
    result = remove_columns(w, x.T @ x / 40, remove, g=g, damping=0.0)
    oracle = torch.linalg.lstsq(x[:, kept], x @ w.T).solution.T
    torch.testing.assert_close(result.weight, oracle, rtol=1e-8, atol=1e-8)
    error = x[:, kept] @ oracle.T - x @ w.T
    assert result.loss == pytest.approx(0.5 * float(((error @ g) * error).sum()) / 40, rel=1e-8)
    plain = -x[:, remove] @ w[:, remove].T
    assert result.plain_loss == pytest.approx(0.5 * float(((plain @ g) * plain).sum()) / 40, rel=1e-8)
    assert result.loss < 0.9 * result.plain_loss
    assert result.bias is None


def test_with_a_mean_the_bias_is_fitted_too():
    w, x, _ = problem()
    remove, kept = torch.tensor([0, 4]), [1, 2, 3, 5, 6, 7, 8]
    bias = torch.randn(4, dtype=torch.float64)
    a = 3 * x.T @ x / 40  # three locations a sample
    result = remove_columns(w, a, remove, mean=x.mean(0), bias=bias, locations=3.0, damping=0.0)
    design = torch.cat([x[:, kept], torch.ones(40, 1, dtype=torch.float64)], 1)
    oracle = torch.linalg.lstsq(design, x @ w.T + bias).solution.T
    torch.testing.assert_close(result.weight, oracle[:, :-1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.bias, oracle[:, -1], rtol=1e-7, atol=1e-7)
    error = design @ oracle.T - (x @ w.T + bias)
    assert result.loss == pytest.approx(0.5 * 3 * float((error**2).sum()) / 40, rel=1e-7)
    assert result.loss < remove_columns(w, a, remove, damping=0.0).loss


def test_a_missing_bias_is_created_and_a_given_one_kept_without_a_mean():
    w, x, _ = problem()
    a = x.T @ x / 40
    assert remove_columns(w, a, torch.tensor([1]), mean=x.mean(0)).bias.shape == (4,)
    bias = torch.ones(4, dtype=torch.float64)
    assert torch.equal(remove_columns(w, a, torch.tensor([1]), bias=bias).bias, bias)


def test_a_column_that_others_reproduce_costs_nothing():
    w, x, _ = problem()
    x[:, 3] = x[:, 0] - 2 * x[:, 5]
    assert remove_columns(w, x.T @ x / 40, torch.tensor([3]), damping=0.0).loss == pytest.approx(0, abs=1e-9)


def test_heavy_damping_falls_back_to_no_compensation_at_worst():
    w, x, _ = problem()
    result = remove_columns(w, x.T @ x / 40, torch.tensor([3]), damping=1e9)
    assert result.loss <= result.plain_loss * (1 + 1e-12)


def test_removing_nothing_or_everything():
    w, x, _ = problem()
    a = x.T @ x / 40
    none = remove_columns(w, a, torch.tensor([], dtype=torch.int64))
    torch.testing.assert_close(none.weight, w)
    assert none.loss == pytest.approx(0, abs=1e-12)
    every = remove_columns(w, a, torch.arange(9), mean=x.mean(0))
    assert every.weight.shape == (4, 0)
    torch.testing.assert_close(every.bias, w @ x.mean(0))


BLOCKS = torch.tensor([[0, 3], [1, 4], [2, 8], [5, 6]])  # column 7 belongs to no channel


@pytest.mark.parametrize("with_g", [False, True])
def test_scores_are_the_losses_of_removing_one_channel(with_g):
    w, x, g = problem()
    g = g if with_g else None
    a = x.T @ x / 40
    scores = removal_scores(w, a, BLOCKS, g, damping=0.0)
    for channel, block in enumerate(BLOCKS):
        assert float(scores[channel]) == pytest.approx(remove_columns(w, a, block, g=g, damping=0.0).loss, rel=1e-8)


def test_greedy_losses_are_those_of_removing_the_channels_together():
    """Also after the inner matrices were made smaller, and with columns that belong to no channel."""
    w, x, g = problem(n=15, samples=60)
    blocks = torch.randperm(15, generator=torch.Generator().manual_seed(1))[:14].view(7, 2)
    a = x.T @ x / 60
    order = greedy_removal([Consumer(w, a, blocks, g)], 6, damping=0.0)
    for count in range(1, 7):
        together = remove_columns(w, a, blocks[order.channels[:count]].flatten(), g=g, damping=0.0).loss
        assert float(order.losses[count - 1]) == pytest.approx(together, rel=1e-7)


def test_each_greedy_step_removes_the_cheapest_channel():
    w, x, g = problem(n=15, samples=60)
    a, blocks = x.T @ x / 60, torch.arange(14).view(7, 2)
    order = greedy_removal([Consumer(w, a, blocks, g)], 5, damping=0.0)
    for count in range(5):
        before = order.channels[:count].tolist()
        rest = [channel for channel in range(7) if channel not in before]
        losses = [remove_columns(w, a, blocks[[*before, channel]].flatten(), g=g, damping=0.0).loss for channel in rest]
        assert int(order.channels[count]) == rest[min(range(len(rest)), key=losses.__getitem__)]


def test_several_consumers_of_different_widths_add_their_losses():
    w1, x1, g1 = problem(m=4, n=8, seed=2)
    w2, x2, g2 = problem(m=3, n=4, seed=3)
    first = Consumer(w1, x1.T @ x1 / 40, torch.arange(8).view(4, 2), g1)
    second = Consumer(w2, x2.T @ x2 / 40, torch.arange(4).view(4, 1), g2)
    order = greedy_removal([first, second], 2, damping=0.0)
    pair = order.channels
    total = sum(
        remove_columns(c.weight, c.a, c.blocks[pair].flatten(), g=c.g, damping=0.0).loss for c in (first, second)
    )
    assert float(order.losses[-1]) == pytest.approx(total, rel=1e-8)
    alone = greedy_removal([first, second], 4, extra=torch.tensor([0.0, 1e6, 0.0, 0.0]))
    assert int(alone.channels[-1]) == 1


def test_greedy_is_the_best_pair_where_channels_do_not_interact():
    w, _, _ = problem(n=6)
    a = torch.diag(torch.rand(6, dtype=torch.float64) + 0.5)
    blocks = torch.arange(6).view(3, 2)
    order = greedy_removal([Consumer(w, a, blocks)], 2, damping=0.0)
    best = min(
        Metric(a).loss(
            torch.zeros_like(w).index_copy_(1, blocks[list(pair)].flatten(), w[:, blocks[list(pair)].flatten()])
        )
        for pair in itertools.combinations(range(3), 2)
    )
    assert float(order.losses[-1]) == pytest.approx(best, rel=1e-10)


def test_bad_arguments_are_named():
    w, x, _ = problem()
    a = x.T @ x
    with pytest.raises(ValueError, match="columns from 2 to 9, the matrix has 9"):
        remove_columns(w, a, torch.tensor([2, 9]))
    with pytest.raises(ValueError, match=r"any rows and 9 columns, got \(4, 8\)"):
        remove_columns(w[:, :8], a, torch.tensor([2]))
    with pytest.raises(ValueError, match=r"not positive definite.*larger damping"):
        remove_columns(w, torch.zeros_like(a), torch.tensor([2]), damping=0.0)
    with pytest.raises(ValueError, match="damping must be >= 0"):
        remove_columns(w, a, torch.tensor([2]), damping=-1.0)
    with pytest.raises(ValueError, match=r"int64 \(channels, columns a channel\), got torch.float32"):
        Consumer(w, a, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="blocks hold columns 0 to 9, the matrix has 9"):
        Consumer(w, a, torch.arange(10).view(5, 2))
    with pytest.raises(ValueError, match="blocks name 1 columns twice"):
        Consumer(w, a, torch.tensor([[0, 1], [1, 2]]))
    consumer = Consumer(w, a, torch.arange(8).view(4, 2))
    with pytest.raises(ValueError, match="count must be from 0 to the 4 channels, got 5"):
        greedy_removal([consumer], 5)
    with pytest.raises(ValueError, match=r"same channels, got channel numbers \[4, 8\]"):
        greedy_removal([consumer, Consumer(w, a, torch.arange(8).view(8, 1))], 1)


def test_many_channels_go_in_lots_and_losses_at_their_ends_are_those_of_the_set(monkeypatch):
    monkeypatch.setattr(removal, "_LOTS", 3)
    w, x, g = problem(n=18, samples=60)
    blocks = torch.arange(18).view(9, 2)
    consumer = Consumer(w, x.T @ x / 60, blocks, g)
    order = greedy_removal([consumer], 8, damping=0.0)
    assert sorted(order.channels.tolist()) == sorted(set(order.channels.tolist()))
    ends, left = [], 9
    while left > 1:
        left -= min(max(1, left // 3), left - 1)
        ends.append(9 - left)
    assert ends[:3] == [3, 5, 6]
    for count in ends:
        gone = blocks[order.channels[:count]].flatten()
        wanted = remove_columns(w, x.T @ x / 60, gone, g=g, damping=0.0).loss
        assert float(order.losses[count - 1]) == pytest.approx(wanted, rel=1e-6)
    assert bool((order.losses.diff() >= 0).all())


def test_a_lot_is_the_cheapest_channels_and_shares_its_loss_by_their_scores(monkeypatch):
    monkeypatch.setattr(removal, "_LOTS", 3)
    w, x, g = problem(n=9)
    a, extra = x.T @ x / 40, torch.linspace(0, 5, 9, dtype=torch.float64)
    blocks = torch.arange(9).view(9, 1)
    alone = removal_scores(w, a, blocks, g) + extra
    order = greedy_removal([Consumer(w, a, blocks, g)], 3, extra=extra)
    assert order.channels.tolist() == alone.argsort()[:3].tolist()
    shares = alone.sort().values[:3].cumsum(0)
    torch.testing.assert_close(order.losses / order.losses[-1], shares / shares[-1], rtol=1e-9, atol=0)
    joint = remove_columns(w, a, order.channels, g=g).loss + float(extra[order.channels].sum())
    assert float(order.losses[-1]) == pytest.approx(joint, rel=1e-2)


def test_inputs_that_hardly_vary_are_compensated_as_far_as_rounding_allows():
    """In float32 the covariance of such inputs is mostly rounding, and not positive definite."""
    generator = torch.Generator().manual_seed(0)
    mean = 1 + torch.rand(64, dtype=torch.float64, generator=generator)
    x = (mean + 1e-4 * torch.randn(200, 64, dtype=torch.float64, generator=generator)).float()
    w = torch.randn(5, 64, generator=generator)
    a, remove = x.T @ x / 200, torch.arange(20)
    covariance = a.double() - torch.outer(x.mean(0), x.mean(0)).double()
    assert float(torch.linalg.eigvalsh(covariance)[0]) < -1e-3 * float(covariance.diagonal().mean())
    found = remove_columns(w, a, remove, mean=x.mean(0), bias=torch.zeros(5))
    error = x[:, 20:] @ found.weight.T + found.bias - x @ w.T
    assert float(error.abs().max()) < 0.02 * float((x @ w.T).abs().max())


@pytest.mark.parametrize("waiting", [1, 5, 256])
def test_changes_on_the_way_are_those_of_removing_the_channels_together(waiting, monkeypatch):
    monkeypatch.setattr(removal, "_WAITING", waiting)
    w, x, g = problem(n=18, samples=60)
    second = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    a = x.T @ x / 60
    consumers = [
        Consumer(w, a, torch.arange(18).view(9, 2), g),
        Consumer(second, a[::2, ::2], torch.arange(9).view(9, 1)),
    ]
    seen = {}

    def visit(channels, changes):
        seen[len(channels)] = channels, [change() for change in changes]

    order = greedy_removal(consumers, 7, damping=0.0, stops={2: visit, 3: visit, 6: visit, 7: visit, 8: visit})
    plain = greedy_removal(consumers, 7, damping=0.0)
    assert torch.equal(order.channels, plain.channels)
    torch.testing.assert_close(order.losses, plain.losses, rtol=1e-9, atol=0)
    assert sorted(seen) == [2, 3, 6, 7]
    for count, (channels, changes) in seen.items():
        assert torch.equal(channels, order.channels[:count])
        for consumer, change in zip(consumers, changes):
            gone = consumer.blocks[channels].flatten()
            left = remove_columns(consumer.weight, consumer.a, gone, damping=0.0).weight
            wanted = -consumer.weight
            wanted[:, [i for i in range(wanted.shape[1]) if i not in gone]] += left
            torch.testing.assert_close(change, wanted, rtol=1e-6, atol=1e-8)


def test_lots_end_where_the_way_stops(monkeypatch):
    monkeypatch.setattr(removal, "_LOTS", 2)
    w, x, _ = problem(n=9)
    seen = []
    stops = dict.fromkeys((1, 3, 5), lambda channels, changes: seen.append(len(channels)))
    greedy_removal([Consumer(w, x.T @ x / 40, torch.arange(9).view(9, 1))], 6, stops=stops)
    assert seen == [1, 3, 5]
