"""Clustered attention: exact in the limits, never further than its guarantee, the same on every path."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from eke.ops import clustered_attention
from eke.ops.clustered_attention import Asked, Hamming, KMeans, Spherical, gathered, grouping, lloyd, native, reference

B, L, H, D, M, S = 2, 45, 3, 5, 4, 53
CLUSTERERS = [KMeans(), KMeans(3, "plain"), Spherical(), Hamming(), Hamming(17, 4, thresholds=False)]


def sample(seed=0, length=L, keys=S, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(B, n, H, D, generator=generator, dtype=dtype) for n in (length, keys))
    return q, k, torch.randn(B, keys, H, M, generator=generator, dtype=dtype)


def full(q, k, v, mask=None, causal=False):
    parts = [x.transpose(1, 2) for x in (q, k, v)]
    given = None if mask is None else mask[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=given, is_causal=causal).transpose(1, 2)


def rows(q, k, groups, topk, clusters, mask=None):
    """Weights of the rows, (batch, heads, length, keys), from inputs of the operator's layout."""
    q, k, groups = (x.transpose(1, 2) for x in (q, k, groups))
    centres = reference.means(q, groups, clusters)
    return reference.weights((q, k, centres), groups, topk=[topk] * H, mask=mask, scale=D**-0.5)


def random_groups(clusters, seed=0, length=L):
    return torch.randint(0, clusters, (B, length, H), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("topk", [0, 1, 7, S])
def test_outputs_are_the_weights_of_the_reference(topk):
    q, k, v = sample()
    groups = random_groups(6)
    groups[:, 3] = -1
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < 0.6
    for given in (None, mask):
        expected = (rows(q, k, groups, topk, 6, given) @ v.transpose(1, 2)).transpose(1, 2)
        found = clustered_attention(q, k, v, clusters=6, topk=topk, groups=groups, mask=given)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clusterer", CLUSTERERS, ids=repr)
def test_all_keys_chosen_is_full_attention_for_any_clusters(clusterer):
    q, k, v = sample()
    out = clustered_attention(q, k, v, clusters=4, topk=S, clusterer=clusterer)
    torch.testing.assert_close(out, full(q, k, v), rtol=0, atol=1e-12)


def test_one_cluster_a_query_is_full_attention():
    q, k, v = sample()
    groups = torch.arange(L).view(1, L, 1).expand(B, L, H)
    for topk in (0, 5):
        out = clustered_attention(q, k, v, clusters=L, topk=topk, groups=groups)
        torch.testing.assert_close(out, full(q, k, v), rtol=0, atol=1e-12)


def test_equal_queries_need_one_cluster_and_one_cluster_gives_equal_rows():
    q, k, v = sample()
    same = q[:, :1].expand_as(q)
    torch.testing.assert_close(
        clustered_attention(same, k, v, clusters=1, topk=0), full(same, k, v), rtol=0, atol=1e-12
    )
    out = clustered_attention(q, k, v, clusters=1, topk=0)
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=0, atol=0)


def test_rows_sum_to_one():
    q, k, _ = sample()
    for topk in (0, 9):
        torch.testing.assert_close(
            rows(q, k, random_groups(6), topk, 6).sum(-1), torch.ones(B, H, L, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_improved_rows_are_never_further_than_clustered_ones_and_more_keys_never_hurt():
    for seed in range(200):  # 200 x B x H x L rows
        q, k, _ = sample(seed, length=13, keys=17)
        groups = random_groups(4, seed, 13)
        exact = reference.exact(q.transpose(1, 2), k.transpose(1, 2), mask=None, scale=D**-0.5)
        errors = [(rows(q, k, groups, topk, 4) - exact).abs().sum(-1) for topk in (0, 1, 3, 8, 17)]
        for less, more in itertools.pairwise(errors):
            assert bool((more <= less + 1e-12).all())
        assert float(errors[-1].max()) < 1e-12


def test_rows_move_no_more_than_queries_times_the_norm_of_the_keys():
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        a, b = torch.randn(2, D, generator=generator, dtype=torch.float64)
        k = torch.randn(S, D, generator=generator, dtype=torch.float64)
        moved = ((k @ a / D**0.5).softmax(0) - (k @ b / D**0.5).softmax(0)).norm()
        assert float(moved) <= float((a - b).norm() * torch.linalg.matrix_norm(k, 2) / D**0.5) + 1e-6


@pytest.mark.parametrize("clusterer", CLUSTERERS, ids=repr)
def test_order_of_keys_does_not_matter(clusterer):
    q, k, v = sample()
    order = torch.randperm(S, generator=torch.Generator().manual_seed(5))
    out = clustered_attention(q, k, v, clusters=6, topk=7, clusterer=clusterer)
    again = clustered_attention(q, k[:, order], v[:, order], clusters=6, topk=7, clusterer=clusterer)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-11)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("clusterer", CLUSTERERS, ids=repr)
def test_padding_is_truncation(clusterer, left):
    q, k, v = sample(keys=L)
    lengths, real = (30, L), torch.ones(B, L, dtype=torch.bool)
    real[0, : L - 30] = False
    if not left:
        real = real.flip(1)
    out = clustered_attention(q, k, v, clusters=6, topk=7, clusterer=clusterer, mask=real, query_mask=real)
    for row, length in enumerate(lengths):
        cut = [x[row : row + 1, real[row]] for x in (q, k, v)]
        alone = clustered_attention(*cut, clusters=6, topk=7, clusterer=clusterer)
        assert alone.shape[1] == length
        torch.testing.assert_close(out[row : row + 1, real[row]], alone, rtol=0, atol=1e-11)
    assert bool((out[~real] == 0).all())


def test_masked_keys_weigh_exactly_nothing_even_where_more_are_chosen_than_real():
    q, k, v = sample()
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, :3] = True  # three keys, and none at all in the second row
    groups = random_groups(6)
    weights = rows(q, k, groups, 10, 6, mask)
    assert bool((weights[0, ..., 3:] == 0).all())
    assert bool((weights[1] == 0).all())
    v = torch.where(mask[:, :, None, None], v, 1e30)
    for leaf in (x.requires_grad_() for x in (q, k)):
        out = clustered_attention(q, k, v, clusters=6, topk=10, groups=groups, mask=mask)
        torch.testing.assert_close(out[0], full(q, k, v, mask)[0], rtol=0, atol=1e-12)
        assert bool((out[1] == 0).all())
        assert bool(torch.autograd.grad(out.sum(), leaf)[0].isfinite().all())


def test_derivatives_are_exact_with_the_mass_of_the_chosen_keys():
    q, k, v = (x[:1, :, :2] for x in sample(length=5, keys=6))
    groups = random_groups(2, length=5)[:1, :, :2]
    groups[0, 2] = -1
    mask = torch.tensor([[True] * 5 + [False]])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for topk in (0, 3):
        call = lambda q, k, v, top=topk: clustered_attention(  # noqa: E731
            q, k, v, clusters=2, topk=top, groups=groups, mask=mask
        )
        assert torch.autograd.gradcheck(call, leaves)


def test_derivatives_of_the_operator_are_those_of_the_reference():
    q, k, v = (x.requires_grad_() for x in sample(length=300))
    groups = random_groups(6, length=300)
    out = clustered_attention(q, k, v, clusters=6, topk=7, groups=groups)
    expected = (rows(q, k, groups, 7, 6) @ v.transpose(1, 2)).transpose(1, 2)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    found, wanted = (torch.autograd.grad(x, (q, k, v), g) for x in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def test_heads_may_have_numbers_of_their_own():
    q, k, v = sample()
    counts, tops = [3, 9, 5], [0, 4, S]
    for clusterer in CLUSTERERS:
        out = clustered_attention(q, k, v, clusters=counts, topk=tops, clusterer=clusterer)
        for h in range(H):
            cut = [x[:, :, h : h + 1] for x in (q, k, v)]
            alone = clustered_attention(*cut, clusters=counts[h], topk=tops[h], clusterer=clusterer)
            torch.testing.assert_close(out[:, :, h : h + 1], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("clusterer", CLUSTERERS, ids=repr)
def test_calls_repeat_themselves_and_rows_of_a_batch_do_not_meet(clusterer):
    q, k, v = sample()
    options = {"clusters": 6, "topk": 7, "clusterer": clusterer}
    seeded = [clustered_attention(q, k, v, generator=torch.Generator().manual_seed(4), **options) for _ in range(2)]
    assert torch.equal(*seeded)
    before = torch.get_rng_state()
    out = clustered_attention(q, k, v, **options)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(out, clustered_attention(q, k, v, **options))
    torch.testing.assert_close(clustered_attention(q[1:], k[1:], v[1:], **options), out[1:], rtol=0, atol=1e-12)


# Clusterers


def test_hashes_are_signs_and_distances_are_popcounts():
    hashing = Hamming(bits=63)
    w, t = hashing.planes(D, torch.Generator().manual_seed(3))
    q = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
    packed = lloyd.pack(q @ w.T > t)
    w, t = w.numpy(), t.numpy()
    brute = [sum(int(np.dot(w[b], x) > t[b]) << b for b in range(63)) for x in q.numpy()]
    assert packed.tolist() == brute
    distances = np.array([[bin(a ^ b).count("1") for b in brute[:5]] for a in brute])
    groups = lloyd.assign_hashes(
        packed.view(1, 1, -1), packed[:5].view(1, 1, -1), None, clusters=[5], iterations=1, bits=63
    )
    assert groups.flatten().tolist() == distances.argmin(1).tolist()


def objective(points, groups, clusters):
    return sum(float((p - p.mean(0)).square().sum()) for c in range(clusters) if len(p := points[groups == c]))


def test_the_objective_of_k_means_never_rises_and_fixed_points_stay():
    q, _, _ = sample(length=200)
    points = q[:1, :, :1].transpose(1, 2)
    start = points[:, :, :8]
    found = [
        lloyd.assign(points, start, None, clusters=[8], iterations=n, sphere=False)[0, 0] for n in (1, 2, 3, 6, 60, 61)
    ]
    values = [objective(points[0, 0], groups, 8) for groups in found]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(values))
    assert torch.equal(found[-1], found[-2])
    centres = reference.means(points, found[-1].view(1, 1, -1), 8)
    again = lloyd.assign(points, centres, None, clusters=[8], iterations=3, sphere=False)
    assert torch.equal(again[0, 0], found[-1])


def test_the_objective_of_hashes_never_rises():
    hashes = torch.randint(0, 2**62, (1, 1, 300), generator=torch.Generator().manual_seed(0))
    total = []
    for n in range(1, 7):
        groups = lloyd.assign_hashes(hashes, hashes[..., :7], None, clusters=[7], iterations=n, bits=63)
        bits, value = lloyd.unpack(hashes, 63)[0, 0].float(), 0.0
        for c in range(7):
            mine = bits[groups[0, 0] == c]
            value += float((mine - (2 * mine.sum(0) > len(mine)).float()).abs().sum())
        total.append(value)
    assert all(b <= a for a, b in itertools.pairwise(total))


def test_an_even_vote_is_no_majority():
    hashes = torch.tensor([[[0b01, 0b11, 0b00]]])
    # All three go to the first centre, where each bit has at most two votes of three; then two of them vote evenly.
    groups = lloyd.assign_hashes(
        hashes[..., :2], torch.tensor([[[0b01, 0b1 << 40]]]), None, clusters=[2], iterations=2, bits=63
    )
    assert groups.flatten().tolist() == [0, 0]
    centre = lloyd.pack((2 * lloyd.unpack(hashes[0, 0, :2], 2) - 1).sum(0) > 0)
    assert int(centre) == 0b01  # the second bit has one vote of two


def test_the_metric_of_the_keys_is_the_variance_of_logits():
    q, k, _ = sample()
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < 0.7
    metric = grouping.covariance(k, mask)
    for row in range(B):
        logits = q[row, 0] @ k[row, 0][mask[row]].T
        expected = (logits[0] - logits[7]).var(correction=0)
        difference = q[row, 0, 0] - q[row, 0, 7]
        torch.testing.assert_close(difference @ metric[row, 0] @ difference, expected, rtol=1e-12, atol=0)


def test_the_metric_of_the_keys_lowers_the_error_where_keys_have_few_directions():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 400, 16, generator=generator)
    k = torch.randn(1, 1, 400, 16, generator=generator) * torch.tensor([3.0] * 2 + [0.1] * 14)
    exact = reference.exact(q, k, mask=None, scale=0.25)
    error = {}
    for metric in ("plain", "keys"):
        groups = KMeans(metric=metric)(Asked(q, k, [20]))
        centres = reference.means(q, groups, 20)
        found = reference.weights((q, k, centres), groups, topk=[0], mask=None, scale=0.25)
        error[metric] = float((found - exact).abs().sum(-1).mean())
    assert error["keys"] < 0.6 * error["plain"]


def test_a_warm_start_needs_fewer_iterations():
    q, k, _ = (x.transpose(1, 2) for x in sample(length=400))
    settled = KMeans(50, "plain")(Asked(q, k, [10] * H))
    centres = reference.means(q, settled, 10)
    near = q + 0.01 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    warm, cold = (KMeans(1, "plain")(Asked(near, k, [10] * H, start=start)) for start in (centres, None))
    value = [sum(objective(near[b, h], g[b, h], 10) for b in range(B) for h in range(H)) for g in (warm, cold)]
    assert value[0] < 0.9 * value[1]


# Causal


@pytest.mark.parametrize("block", [None, 16])
def test_causal_outputs_depend_on_the_past_alone(block):
    q, k, v = sample(length=70, keys=70)
    options = {"clusters": 5, "topk": 6, "causal": True, "block": block}
    out = clustered_attention(q, k, v, **options)
    for t in (3, 17, 40, 69):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t:] = torch.randn(x[:, t:].shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        assert torch.equal(clustered_attention(*changed, **options)[:, :t], out[:, :t])


def test_causal_attention_is_exact_where_all_keys_are_chosen_or_one_block_holds_all():
    q, k, v = sample(length=70, keys=70)
    expected = full(q, k, v, causal=True)
    for options in ({"topk": 70, "block": 16}, {"topk": 0, "block": 70}):
        out = clustered_attention(q, k, v, clusters=5, causal=True, **options)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = clustered_attention(*leaves, clusters=5, topk=70, causal=True, block=16)
    found = torch.autograd.grad(out.square().sum(), leaves)
    expected = torch.autograd.grad(full(*leaves, causal=True).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("values", [D, M])
def test_causal_outputs_are_the_same_with_and_without_derivatives(values):
    q, k, _ = sample(length=70, keys=70)
    v = torch.randn(B, 70, H, values, generator=torch.Generator().manual_seed(9), dtype=q.dtype)
    options = {"clusters": 5, "topk": 6, "causal": True, "block": 16}
    out = clustered_attention(q, k, v, **options)
    torch.testing.assert_close(
        out, clustered_attention(q, k, v.clone().requires_grad_(), **options), rtol=0, atol=1e-12
    )


def test_causal_error_falls_with_clusters_and_keys():
    q, k, v = sample(length=256, keys=256)
    exact = full(q, k, v, causal=True)
    error = [
        float((clustered_attention(q, k, v, clusters=c, topk=t, causal=True, block=64) - exact).abs().mean())
        for c, t in ((2, 0), (16, 0), (16, 32))
    ]
    assert error[2] < error[1] < error[0]


# The native kernel

LEVELS = [0, 1, 2]


def needs(level):
    if native.level() < level:
        pytest.skip("needs the compiled kernel and its instructions")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("length", "keys", "dim", "values", "clusters", "topk"),
    [
        (1, 1, 1, 1, 1, 1),
        (45, 53, 5, 4, 6, 7),
        (200, 130, 64, 64, 60, 32),
        (130, 700, 17, 33, 49, 300),
        (70, 64, 16, 8, 9, 0),
    ],
)
def test_the_kernel_is_the_reference(level, length, keys, dim, values, clusters, topk):
    needs(level)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 3, dim, generator=generator).transpose(1, 2) for n in (length, keys))
    v = torch.randn(2, keys, 3, values, generator=generator).transpose(1, 2)
    groups = torch.randint(-1, clusters, (2, 3, length), generator=generator)
    groups[0, 0] = clusters - 1  # one full cluster, the others empty
    mask = torch.rand(2, keys, generator=generator) < 0.5
    for given in (None, mask):
        centres = reference.means(q, groups, clusters)
        tops = [topk, min(1, topk), topk // 2]
        options = {"topk": tops, "mask": given, "scale": 1.7 * dim**-0.5}
        out, lse = native.attend((q, k, v, centres), groups, instructions=level, **options)
        wide = [x.double() for x in (q, k, v, centres)]
        expected, sums = gathered.attend((wide[0], wide[1], wide[2], wide[3]), groups, **options)
        torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse.double(), sums, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(native.means(q, groups, clusters, instructions=level), centres, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        native.metric(k, mask, instructions=level), lloyd.covariance(k, mask), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("length", "dim", "clusters"), [(1, 1, 1), (47, 5, 7), (300, 16, 70), (130, 33, 130)])
def test_the_kernel_finds_the_groups_of_the_reference(level, length, dim, clusters):
    needs(level)
    generator = torch.Generator().manual_seed(0)
    # Small integers and one assignment: sums are exact and ties are true ties.
    x = torch.randint(-3, 4, (2, length, 3, dim), generator=generator).float().transpose(1, 2)
    real = torch.rand(2, length, generator=generator) < 0.8
    counts = [clusters, max(1, clusters // 2), 1]
    start = x[:, :, torch.randint(0, length, (clusters,), generator=generator)]
    metric = torch.randint(-2, 3, (2, 3, dim, dim), generator=generator).float()
    metric = metric @ metric.mT
    for given in (None, metric):
        options = {"clusters": counts, "sphere": False, "metric": given}
        found = native.lloyd(x, start, real, iterations=1, instructions=level, **options)
        assert torch.equal(found, lloyd.assign(x, start, real, iterations=1, **options))
    for sphere in (False, True):
        points = torch.nn.functional.normalize(x + 0.1, dim=-1) if sphere else x
        options = {"clusters": counts, "sphere": sphere, "metric": None, "iterations": 5}
        found = native.lloyd(points, start, real, instructions=level, **options)
        wide = lloyd.assign(points.double(), start.double(), real, **options)
        assert float((found == wide).float().mean()) > 0.97  # rounding decides where two are as near
    planes = torch.randint(-3, 4, (63, dim), generator=generator).float(), torch.arange(63.0) % 5 - 2
    hashed = lloyd.pack(x @ planes[0].T > planes[1])
    places = torch.randint(0, length, (2, 3, clusters), generator=generator)
    options = {"clusters": counts, "iterations": 4}
    expected = lloyd.assign_hashes(hashed, hashed.gather(2, places), real, bits=63, **options)
    assert torch.equal(native.hashed(x, planes, places, real, instructions=level, **options), expected)
    given = hashed.gather(2, places).view(torch.uint64)
    assert torch.equal(native.hashed(x, planes, given, real, instructions=level, **options), expected)


def test_what_is_not_a_number_is_not_hidden():
    q, k, v = sample(dtype=torch.float32)
    q[0, 3] = torch.nan
    groups = random_groups(6)
    out = clustered_attention(q, k, v, clusters=6, topk=7, groups=groups)
    bad = (groups[0] == groups[0, 3:4]).unsqueeze(-1).expand_as(out[0])
    assert torch.equal(out[0].isnan(), bad)
    assert bool(out[1].isfinite().all())
    assert clustered_attention(q, k, v, clusters=6, topk=7)[0, 3].isnan().all()


def test_the_kernel_reads_within_its_tensors_alone():
    q, k, v = (x.transpose(1, 2) for x in sample(dtype=torch.float32))
    centres, groups = torch.zeros(B, H, 6, D), torch.zeros(B, H, L, dtype=torch.int64)
    if not native.available():
        pytest.skip("needs the compiled kernel")
    options = {"topk": [1] * H, "mask": None, "scale": 1.0}
    with pytest.raises(ValueError, match="takes tensors of one attention"):
        native.attend((q, k[:, :2], v, centres), groups, **options)
    with pytest.raises(ValueError, match="groups must lie in -1 to 5, got 6 to 6"):
        native.attend((q, k, v, centres), groups + 6, **options)


# Torch


def test_fullgraph_compiles_and_types_are_kept():
    q, k, v = sample(dtype=torch.float32)
    call = lambda q, k, v: clustered_attention(q, k, v, clusters=6, topk=7)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(compiled(*leaves), call(*leaves), rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, call))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        out = call(*(x.detach().to(dtype) for x in (q, k, v)))
        assert out.dtype == dtype
        exact = call(*(x.detach().to(dtype).double() for x in (q, k, v)))
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def test_operators_keep_torchs_rules():
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in sample(length=9, keys=11))
    groups = random_groups(3, length=9).transpose(1, 2)
    centres = gathered.means(q, groups, 3).detach().requires_grad_()
    arguments = (q, k, v, centres, groups, None, [4] * H, 0.5)
    torch.library.opcheck(torch.ops.eke.clustered_attention.default, arguments)


def test_operations_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = sample()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        clustered_attention(q, k, v, clusters=6, topk=7, groups=random_groups(6))
    wanted = 2 * B * H * (D + M) * (6 * S + L * 7)
    assert counter.get_flop_counts()["Global"][torch.ops.eke.clustered_attention] == wanted


# Wrong calls


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(B, L, H)}, "needs q, k, v of shape (batch, length, heads, dim), got q (2, 45, 3)"),
        ({"q": torch.zeros(B, L, H, D + 1)}, "the same heads and dim, got q (2, 45, 3, 6)"),
        ({"v": torch.zeros(B, S, H, M)}, "one floating-point type, got torch.float64, torch.float64 and torch.float32"),
        ({"clusters": 0}, "clusters must be an integer from 1 to the number of queries, 45, got 0"),
        ({"clusters": L + 1}, "from 1 to the number of queries, 45, got 46"),
        ({"clusters": [3, 3]}, "clusters needs one number or one for each of 3 heads, got 2"),
        ({"topk": -1}, "topk must be an integer at least 0, got -1"),
        ({"topk": 2.5}, "topk must be an integer at least 0, got 2.5"),
        ({"mask": torch.ones(B, L, S, dtype=torch.bool)}, "Masks of pairs of positions do not exist"),
        ({"mask": torch.ones(B, S)}, "bool of shape (2, 53), got torch.float32"),
        ({"query_mask": torch.ones(B, S, dtype=torch.bool)}, "query_mask says which positions are real"),
        (
            {"groups": torch.zeros(B, L, H)},
            "groups must be integers (batch, length, heads) = (2, 45, 3), got torch.float32",
        ),
        (
            {"groups": torch.full((B, L, H), 6)},
            "groups of head 0 must lie in -1 to 5 (clusters=6), got values from 6 to 6",
        ),
        ({"groups": torch.full((B, L, H), -2)}, "must lie in -1 to 5"),
        (
            {"start": torch.zeros(1, H, 5, D)},
            "start must be centres (1 or 2, heads, clusters, dim) = (..., 3, 6, 5), got",
        ),
        ({"causal": True}, "as many keys as queries, got 53 and 45"),
        ({"k": torch.zeros(B, 0, H, D), "v": torch.zeros(B, 0, H, M)}, "at least one key"),
    ],
)
def test_wrong_calls_are_refused(change, says):
    q, k, v = sample()
    arguments = {"q": q, "k": k, "v": v, "clusters": 6, "topk": 7, **change}
    with pytest.raises(ValueError, match=re.escape(says)):
        clustered_attention(**arguments)


def test_wrong_causal_calls_are_refused():
    q, k, v = sample(keys=L)
    with pytest.raises(ValueError, match="at least as many positions as there are clusters, 6, got 4"):
        clustered_attention(q, k, v, clusters=6, topk=1, causal=True, block=4)
    with pytest.raises(ValueError, match="takes no groups, mask or query_mask"):
        clustered_attention(q, k, v, clusters=6, topk=1, causal=True, mask=torch.ones(B, L, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KMeans(0), "at least one iteration, got 0"),
        (lambda: KMeans(metric="cosine"), "KMeans.metric is 'keys' or 'plain', got 'cosine'"),
        (lambda: Spherical(-1), "at least one iteration, got -1"),
        (lambda: Hamming(64), "Hamming.bits must lie in 1 to 63 (a hash is one 64-bit integer), got 64"),
        (lambda: Hamming(0), "1 to 63 (a hash is one 64-bit integer), got 0"),
    ],
)
def test_wrong_clusterers_are_refused(make, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()
