"""Clustered attention whose keys that were not chosen are one more key: its definition, its limits, what is proved."""

from __future__ import annotations

import re

import pytest
import torch

from eke.ops import clustered_attention
from eke.ops.clustered_attention import KMeans, gathered, native, reference

B, L, H, D, M, S = 2, 45, 3, 5, 4, 53
SCALE = D**-0.5


def sample(seed=0, length=L, keys=S, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(B, n, H, D, generator=generator, dtype=dtype) for n in (length, keys))
    return q, k, torch.randn(B, keys, H, M, generator=generator, dtype=dtype)


def random_groups(clusters, seed=0, length=L):
    return torch.randint(0, clusters, (B, length, H), generator=torch.Generator().manual_seed(seed))


def padded(keys=S):
    return torch.rand(B, keys, generator=torch.Generator().manual_seed(1)) < 0.6


def full(q, k, v, mask=None, causal=False):
    parts = [x.transpose(1, 2) for x in (q, k, v)]
    given = None if mask is None else mask[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=given, is_causal=causal).transpose(1, 2)


def weights(q, k, groups, topk, clusters, mask=None, key=True):
    q, k, groups = (x.transpose(1, 2) for x in (q, k, groups))
    centres = reference.means(q, groups, clusters)
    return reference.weights((q, k, centres), groups, topk=[topk] * H, mask=mask, scale=SCALE, key=key)


def by_hand(q, k, members, topk):
    """Row of the first member of a cluster, one number after the other."""
    logits = [float(SCALE * (members.mean(0) @ x)) for x in k]
    order = sorted(range(len(k)), key=lambda i: -logits[i])
    chosen, rest = order[:topk], order[topk:]
    total = sum(torch.tensor(logits[i]).double().exp() for i in rest)
    shares = {i: torch.tensor(logits[i]).double().exp() / total for i in rest}
    mean = sum(shares[i] * k[i] for i in rest)
    sums = {i: (SCALE * q @ k[i]).exp() for i in chosen}
    left = total * (SCALE * (q - members.mean(0)) @ mean).exp()
    whole = sum(sums.values()) + left
    row = torch.zeros(len(k), dtype=torch.float64)
    for i in chosen:
        row[i] = sums[i] / whole
    for i in rest:
        row[i] = left / whole * shares[i]
    return row


def test_rows_are_the_definition_written_out():
    q, k, _ = sample()
    groups = random_groups(4)
    found = weights(q, k, groups, 7, 4)
    for b, h, i in ((0, 0, 0), (1, 2, 17), (0, 1, 44)):
        members = q[b, groups[b, :, h] == groups[b, i, h], h]
        expected = by_hand(q[b, i, h], k[b, :, h], members, 7)
        torch.testing.assert_close(found[b, h, i], expected, rtol=0, atol=1e-6)  # by_hand's logits are single floats


@pytest.mark.parametrize("topk", [0, 1, 7, S - 1, S])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_are_the_weights_of_the_reference(topk, masked):
    q, k, v = sample()
    groups, mask = random_groups(6), padded() if masked else None
    groups[:, 3] = -1
    expected = (weights(q, k, groups, topk, 6, mask) @ v.transpose(1, 2)).transpose(1, 2)
    options = {"clusters": 6, "topk": topk, "groups": groups, "mask": mask, "rest": "key"}
    torch.testing.assert_close(clustered_attention(q, k, v, **options), expected, rtol=0, atol=1e-12)
    single = clustered_attention(q.float(), k.float(), v.float(), **options)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5)


def test_all_keys_chosen_or_one_query_a_cluster_is_softmax_attention():
    q, k, v = sample()
    alone = torch.arange(L).view(1, L, 1).expand(B, L, H)
    for mask in (None, padded()):
        out = clustered_attention(q, k, v, clusters=4, topk=S, rest="key", mask=mask)
        torch.testing.assert_close(out, full(q, k, v, mask), rtol=0, atol=1e-12)
        for topk in (0, 5):
            out = clustered_attention(q, k, v, clusters=L, topk=topk, groups=alone, rest="key", mask=mask)
            torch.testing.assert_close(out, full(q, k, v, mask), rtol=0, atol=1e-12)


def test_without_chosen_keys_both_rules_are_plain_clustered_attention():
    q, k, v = sample()
    options = {"clusters": 6, "topk": 0, "groups": random_groups(6)}
    found = [clustered_attention(q, k, v, **options, rest=rest) for rest in ("shared", "key")]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_rows_sum_to_one_and_no_weight_is_negative():
    q, k, _ = sample()
    found = weights(q, k, random_groups(6), 9, 6, padded())
    torch.testing.assert_close(found.sum(-1), torch.ones(B, H, L, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(found.min()) >= 0


def chosen_mass(rows, chosen):
    return (rows * chosen).sum(-1)


def test_the_mass_of_the_chosen_keys_is_never_below_the_exact_one_and_where_it_is_below_the_papers_rows_are_nearer():
    nearer = further = 0
    for seed in range(100):
        q, k, _ = sample(seed, length=13, keys=17)
        groups, parts = random_groups(4, seed, 13), None
        parts = [x.transpose(1, 2) for x in (q, k, groups)]
        centres = reference.means(parts[0], parts[2], 4)
        rank = (centres @ parts[1].mT).argsort(-1, descending=True)
        chosen = torch.zeros(rank.shape, dtype=torch.float64).scatter(-1, rank[..., :5], 1)
        chosen = chosen.gather(2, parts[2].unsqueeze(-1).expand(-1, -1, -1, 17))
        exact = reference.exact(parts[0], parts[1], mask=None, scale=SCALE)
        paper, own = (weights(q, k, groups, 5, 4, key=key) for key in (False, True))
        assert bool((chosen_mass(own, chosen) >= chosen_mass(exact, chosen) - 1e-12).all())
        errors = [(rows - exact).abs().sum(-1) for rows in (paper, own)]
        lower = chosen_mass(own, chosen) <= chosen_mass(paper, chosen)
        assert bool((errors[1] <= errors[0] + 1e-12)[lower].all())
        nearer += int((errors[1] < errors[0]).sum())
        further += int((errors[1] > errors[0]).sum())
    assert nearer > further > 0  # the guarantee of every row is the paper's rule's alone


def test_sums_of_exponentials_are_lower_bounds_and_exact_in_the_limits():
    q, k, v = (x.transpose(1, 2) for x in sample())
    groups = random_groups(6).transpose(1, 2)
    centres = gathered.means(q, groups, 6)
    exact = (SCALE * q @ k.mT).logsumexp(-1)
    for topk in (0, 7, S):
        _, lse = gathered.attend((q, k, v, centres), groups, topk=[topk] * H, mask=None, scale=SCALE, key=True)
        assert bool((lse <= exact + 1e-12).all())
    torch.testing.assert_close(lse, exact, rtol=0, atol=1e-12)


def test_masked_keys_weigh_exactly_nothing():
    q, k, v = sample()
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, :3] = True  # three keys, and none at all in the second row
    groups = random_groups(6)
    found = weights(q, k, groups, 2, 6, mask)
    assert bool((found[0, ..., 3:] == 0).all())
    assert bool((found[1] == 0).all())
    for topk in (2, 10):
        for dtype in (torch.float64, torch.float32):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            out = clustered_attention(*leaves, clusters=6, topk=topk, groups=groups, mask=mask, rest="key")
            assert bool((out[1] == 0).all())
            assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.square().sum(), leaves))
            with torch.no_grad():
                again = clustered_attention(*leaves, clusters=6, topk=topk, groups=groups, mask=mask, rest="key")
            torch.testing.assert_close(again, out.detach(), rtol=0, atol=1e-5)


def test_padding_is_truncation():
    q, k, v = sample(keys=L)
    real = torch.ones(B, L, dtype=torch.bool)
    real[0, 30:] = False
    out = clustered_attention(q, k, v, clusters=6, topk=7, mask=real, query_mask=real, rest="key")
    alone = clustered_attention(*(x[:1, :30] for x in (q, k, v)), clusters=6, topk=7, rest="key")
    torch.testing.assert_close(out[:1, :30], alone, rtol=0, atol=1e-11)
    assert bool((out[0, 30:] == 0).all())


def test_derivatives_are_exact():
    q, k, v = (x[:1, :, :2] for x in sample(length=5, keys=6))
    groups = random_groups(2, length=5)[:1, :, :2]
    groups[0, 2] = -1
    mask = torch.tensor([[True] * 5 + [False]])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for topk in (0, 3, 6):
        call = lambda q, k, v, top=topk: clustered_attention(  # noqa: E731
            q, k, v, clusters=2, topk=top, groups=groups, mask=mask, rest="key"
        )
        assert torch.autograd.gradcheck(call, leaves)


def test_derivatives_of_the_operator_are_those_of_the_reference():
    q, k, v = (x.requires_grad_() for x in sample(length=300))
    groups = random_groups(6, length=300)
    out = clustered_attention(q, k, v, clusters=6, topk=7, groups=groups, rest="key")
    expected = (weights(q, k, groups, 7, 6) @ v.transpose(1, 2)).transpose(1, 2)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    found, wanted = (torch.autograd.grad(x, (q, k, v), g) for x in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def test_causal_outputs_depend_on_the_past_alone_and_are_exact_with_all_keys():
    q, k, v = sample(length=70, keys=70)
    options = {"clusters": 5, "causal": True, "block": 16, "rest": "key"}
    torch.testing.assert_close(
        clustered_attention(q, k, v, topk=70, **options), full(q, k, v, causal=True), rtol=0, atol=1e-11
    )
    out = clustered_attention(q, k, v, topk=6, **options)
    for t in (3, 40, 69):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t:] = torch.randn(x[:, t:].shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        assert torch.equal(clustered_attention(*changed, topk=6, **options)[:, :t], out[:, :t])


@pytest.mark.parametrize("level", range(native.level() + 1))
@pytest.mark.parametrize(("clusters", "topk", "dim", "values"), [(6, 7, 5, 4), (130, 33, 64, 32), (3, 0, 17, 64)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_is_the_reference(level, clusters, topk, dim, values, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, d, generator=generator) for n, d in ((300, dim), (S, dim), (S, values)))
    groups = torch.randint(-1, clusters, (B, H, 300), generator=generator)
    mask = padded() if masked else None
    if masked:
        mask[1] = False
        k[1, :, 0], v[1, :, 0] = torch.inf, torch.inf
    options = {"topk": [topk, 0, S + 3], "mask": mask, "scale": dim**-0.5, "key": True}
    out, lse = native.attend((q, k, v, gathered.means(q, groups, clusters)), groups, instructions=level, **options)
    wide = [x.nan_to_num(posinf=0).double() for x in (q, k, v)]
    centres = gathered.means(wide[0], groups, clusters)
    expected, sums = gathered.attend((*wide, centres), groups, **options)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), sums, rtol=0, atol=2e-5)


def test_what_is_not_a_number_is_not_hidden():
    q, k, v = sample(dtype=torch.float32)
    q[0, 3] = torch.nan
    groups = random_groups(6)
    out = clustered_attention(q, k, v, clusters=6, topk=7, groups=groups, rest="key")
    bad = (groups[0] == groups[0, 3:4]).unsqueeze(-1).expand_as(out[0])
    assert torch.equal(out[0].isnan(), bad)
    assert bool(out[1].isfinite().all())


def test_a_rest_that_vanishes_in_single_precision_weighs_nothing():
    q, k, v = sample(dtype=torch.float32)
    k[:, 1:] = -k[:, :1] * torch.linspace(0.5, 1, S - 1).view(1, -1, 1, 1)
    q = 400 * k[:, :1] + 0.01 * q  # the first key has all of it, by more than exp can hold
    for topk in (1, 5):
        out = clustered_attention(q, k, v, clusters=4, topk=topk, rest="key")
        torch.testing.assert_close(out, v[:, :1].expand_as(out), rtol=0, atol=1e-5)


def test_rows_are_nearer_where_queries_of_a_cluster_differ_in_how_much_the_rest_weighs():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 400, 1, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    k[:, :20, :, 0] += 6  # keys that all clusters choose, and that queries seek more or less
    q[..., 0] *= 2
    v = torch.eye(400, dtype=torch.float64).view(1, 400, 1, 400)
    exact = full(q, k, v)
    errors = {
        rest: float((clustered_attention(q, k, v, clusters=20, topk=32, rest=rest) - exact).abs().sum(-1).mean())
        for rest in ("shared", "key")
    }
    assert errors["key"] < 0.95 * errors["shared"]


def test_torch_compiles_it_checks_it_and_counts_it():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = sample(dtype=torch.float32)
    clusterer = KMeans(2)  # made outside: torch 2.14 cannot call what it has seen being made
    call = lambda q, k, v: clustered_attention(q, k, v, clusters=6, topk=7, rest="key", clusterer=clusterer)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(compiled(*leaves), call(*leaves), rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, call))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    parts = [x.transpose(1, 2) for x in sample(length=9, keys=11)]
    parts = [x.requires_grad_() for x in parts]
    groups = random_groups(3, length=9).transpose(1, 2)
    centres = gathered.means(parts[0], groups, 3).detach().requires_grad_()
    arguments = (*parts, centres, groups, None, [4] * H, 0.5, True)
    torch.library.opcheck(torch.ops.eke.clustered_attention.default, arguments)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        clustered_attention(q, k, v, clusters=6, topk=7, groups=random_groups(6), rest="key")
    wanted = 2 * B * H * ((D + M) * (6 * S + L * 8) + 6 * S * D)
    assert counter.get_flop_counts()["Global"][torch.ops.eke.clustered_attention] == wanted


def test_an_unknown_rule_is_refused():
    q, k, v = sample()
    with pytest.raises(ValueError, match=re.escape("rest is 'shared' or 'key', got 'centre'")):
        clustered_attention(q, k, v, clusters=6, topk=7, rest="centre")
