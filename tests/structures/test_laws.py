"""Every structure crossed with every law."""

from __future__ import annotations

import itertools

import pytest
import torch

from eke.patterns import Chain
from eke.structures import (
    NM,
    Both,
    EntrySparse,
    KroneckerSparse,
    LowRank,
    Rows,
    Structure,
    Supported,
    Sweepable,
    UniformGrid,
    Unstructured,
    grids,
    low_rank,
    sparse,
)

SHAPE = (6, 16)
MEMBERS = [
    Unstructured(0.1),
    Unstructured(1.0),
    NM(1, 2),
    NM(2, 4),
    NM(3, 8),
    Rows(0.5),
    LowRank(1),
    LowRank(3),
    LowRank(0.4),
    KroneckerSparse(Chain.monarch(6, 16, 2)),
    KroneckerSparse(Chain([(1, 2, 2, 3), (2, 3, 4, 1), (2, 4, 8, 1)])),
    KroneckerSparse(Chain.radix((2, 3, 1), (2, 2, 4)).transpose.transpose),
    KroneckerSparse(Chain.radix((4, 2, 2), (3, 2, 1)).transpose),
    UniformGrid(bits=1),
    UniformGrid(bits=4),
    UniformGrid(bits=8, group=5),
    Both(NM(2, 4), UniformGrid(bits=3)),
    Both(Unstructured(0.3), UniformGrid(bits=4, group=8)),
    Both(Rows(0.5), UniformGrid(bits=2)),
    EntrySparse(0.2),
    EntrySparse(0.3, UniformGrid(bits=4)),
]
every_member = pytest.mark.parametrize("structure", MEMBERS, ids=repr)


def matrix(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def separable(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(SHAPE[0], 1, dtype=torch.float64, generator=generator) + 0.1
    return rows * (torch.rand(SHAPE[1], dtype=torch.float64, generator=generator) + 0.1)


def distance(v: torch.Tensor, p: torch.Tensor, score: torch.Tensor | None) -> float:
    squares = (v - p) ** 2
    return float((squares if score is None else squares * score).sum())


@every_member
def test_members_are_structures(structure):
    assert isinstance(structure, Structure)
    assert isinstance(structure, Sweepable) != isinstance(structure, LowRank | KroneckerSparse)
    assert isinstance(structure, Supported) == isinstance(structure, Unstructured | NM | Rows | Both | EntrySparse)


@every_member
@pytest.mark.parametrize("weighted", [False, True])
def test_projection_is_idempotent(structure, weighted):
    score = separable(1) if weighted else None
    once = structure.project(matrix(0), score)
    torch.testing.assert_close(structure.project(once, score), once, rtol=0, atol=1e-12)
    torch.testing.assert_close(structure.project(once), once, rtol=0, atol=1e-12)


@every_member
def test_projection_keeps_shape_and_dtype_and_the_argument(structure):
    for dtype in (torch.float32, torch.float64):
        v = matrix(2, dtype)
        before = v.clone()
        p = structure.project(v)
        assert p.shape == v.shape
        assert p.dtype == dtype
        assert torch.equal(v, before)


@every_member
def test_zero_is_its_own_projection(structure):
    assert torch.equal(structure.project(torch.zeros(SHAPE)), torch.zeros(SHAPE))


@every_member
def test_projection_is_no_farther_than_other_members(structure):
    """The projections of other matrices are members; none may be closer if `project` is declared exact."""
    v = matrix(3)
    for score in (None, separable(4)):
        ours = distance(v, structure.project(v, score), score)
        others = [
            distance(v, structure.project(matrix(seed) + k * v), score) for seed in range(5, 25) for k in (0, 1, 5)
        ]
        factor = {"exact": 1.0, "heuristic": 1.1}.get(structure.exactness, structure.exactness)
        # Distances are squared.
        factor = factor if isinstance(structure.exactness, str) else factor**2
        assert ours <= factor * min(others) + 1e-9


@every_member
def test_scaling_by_a_power_of_two_commutes(structure):
    v = matrix(6)
    torch.testing.assert_close(structure.project(4 * v), 4 * structure.project(v), rtol=0, atol=1e-12)


@every_member
def test_bits_are_eight_times_the_packed_bytes(structure):
    v = matrix(7, torch.float32)
    packed = structure.encode(v)
    assert structure.bits(SHAPE) == 8 * sum(tensor.nbytes for tensor in packed.values())


@every_member
def test_decode_inverts_encode(structure):
    p = structure.project(matrix(8, torch.float32))
    again = structure.decode(structure.encode(p), SHAPE)
    if isinstance(structure, LowRank | KroneckerSparse):
        torch.testing.assert_close(again, p, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(again, p)


@every_member
def test_shapes_that_are_no_matrix_are_refused(structure):
    with pytest.raises(ValueError, match=r"matrices \(m, n\)"):
        structure.check((3, 4, 5))


@pytest.mark.parametrize("structure", [s for s in MEMBERS if isinstance(s, Sweepable)], ids=repr)
def test_column_rules_reproduce_the_projection(structure):
    v = matrix(9)
    rule = structure.by_columns(v)
    torch.testing.assert_close(torch.stack([rule(v[:, j], j) for j in range(SHAPE[1])], 1), structure.project(v))


@pytest.mark.parametrize("structure", [Unstructured(0.34), NM(2, 3), Rows(0.5)], ids=repr)
def test_sparse_projections_are_closest_among_all_supports(structure):
    generator = torch.Generator().manual_seed(10)
    v = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    score = torch.rand(2, 6, dtype=torch.float64, generator=generator)
    kept = structure.kept((2, 6))
    best = float("inf")
    for support in itertools.product((0.0, 1.0), repeat=12):
        mask = torch.tensor(support, dtype=torch.float64).view(2, 6)
        allowed = {
            Unstructured: mask.sum() == kept,
            NM: (mask.view(-1, 3).sum(1) == 2).all(),
            Rows: ((mask.sum(1) == 0) | (mask.sum(1) == 6)).all() and mask.sum() == kept,
        }[type(structure)]
        if allowed:
            best = min(best, distance(v, mask * v, score))
    assert distance(v, structure.project(v, score), score) == pytest.approx(best, rel=1e-12)
    assert int(structure.support(v, score).sum()) == kept


def test_low_rank_error_is_the_sum_of_the_dropped_singular_values():
    v = matrix(11)
    s = torch.linalg.svdvals(v)
    assert distance(v, LowRank(2).project(v), None) == pytest.approx(float((s[2:] ** 2).sum()), rel=1e-10)


def test_weighted_low_rank_beats_gradient_steps_from_it():
    """No small change of the factors lowers the weighted distance: the gradient in both factors vanishes."""
    v, score = matrix(12), separable(13)
    p = LowRank(2).project(v, score)
    u, _, vh = torch.linalg.svd(p)
    residual = score * (p - v)
    assert float((residual @ vh[:2].T).abs().max()) < 1e-9
    assert float((u[:, :2].T @ residual).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Unstructured(0.0), ValueError, r"Unstructured needs a density in \(0, 1\], got 0.0"),
        (lambda: Rows(1.5), ValueError, r"Rows needs a density in \(0, 1\], got 1.5"),
        (lambda: NM(5, 4), ValueError, "got n=5, m=4"),
        (lambda: LowRank(0), ValueError, r"rank of at least 1 or a share in \(0, 1\), got 0"),
        (lambda: LowRank(1.5), ValueError, r"share in \(0, 1\), got 1.5"),
        (lambda: LowRank(2, 4), TypeError, "UniformGrid or in float32, got 4"),
        (lambda: NM(2, 4).project(torch.ones(2, 6)), ValueError, r"columns divisible by 4, got \(2, 6\)"),
        (lambda: LowRank(3).project(torch.ones(2, 6)), ValueError, r"min\(m, n\) >= 3, got \(2, 6\)"),
        (lambda: Both(LowRank(2), UniformGrid(4)), TypeError, r"Unstructured, NM or Rows.*got LowRank\(rank=2\)"),
        (lambda: Both(NM(2, 4), UniformGrid(1)), TypeError, r"at least 2 bits, got UniformGrid\(bits=1\)"),
        (lambda: LowRank(1).project(torch.ones(2, 2), torch.eye(2)), ValueError, "row weight times a column weight"),
        (
            lambda: LowRank(1).decode(LowRank(1).encode(torch.ones(2, 3)), (3, 2)),
            ValueError,
            r"factors of a matrix \(3, 2\), got \(2, 1\) and \(1, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("rank", [2, 0.4])
def test_factors_on_a_grid_are_stored_as_they_are_projected(rank):
    v, structure = matrix(12, torch.float32), LowRank(rank, UniformGrid(4))
    packed = structure.encode(v)
    assert structure.bits(SHAPE) == 8 * sum(tensor.nbytes for tensor in packed.values())
    torch.testing.assert_close(structure.decode(packed, SHAPE), structure.project(v), rtol=1e-5, atol=1e-5)
    assert int(torch.linalg.matrix_rank(structure.project(v).double(), rtol=1e-5)) == 2
    assert structure.exactness == "heuristic"


def test_factors_on_a_fine_grid_are_near_the_closest_matrix_of_the_rank():
    v = matrix(13)
    exact, rounded = LowRank(3).project(v), LowRank(3, UniformGrid(8)).project(v)
    assert float((exact - rounded).norm()) < 0.02 * float(exact.norm())


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_ratios_of_a_score_count_for_a_rank(scale, dtype):
    v, score = matrix(14, dtype), separable(15)
    expected = LowRank(2).project(v, score)
    torch.testing.assert_close(LowRank(2).project(v, score * scale), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="row weight times a column weight"):
        LowRank(1).project(torch.ones(2, 2), scale * torch.eye(2, dtype=torch.float64))


def test_a_share_is_a_rank_of_the_smaller_side():
    assert [LowRank(0.4).rank_of(shape) for shape in ((6, 16), (16, 6), (1, 9), (100, 50))] == [2, 2, 1, 20]


@pytest.mark.parametrize("shape", [(6, 13), (13, 6), (9, 9)])
def test_ranks_of_large_matrices_are_those_of_the_singular_value_decomposition(shape, monkeypatch):
    v = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted, factors = LowRank(4).project(v), LowRank(4).factors(v)
    monkeypatch.setattr(low_rank, "_SMALL", 0)
    torch.testing.assert_close(LowRank(4).project(v), wanted, rtol=1e-9, atol=1e-12)
    left, right = LowRank(4).factors(v)
    torch.testing.assert_close(left @ right, wanted, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip((left.norm(dim=0), right.norm(dim=1)), (factors[0].norm(dim=0), factors[1].norm(dim=1))):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("small", [0, 100])
def test_factors_of_a_matrix_of_less_rank_are_finite(small, monkeypatch):
    monkeypatch.setattr(low_rank, "_SMALL", small)
    v = torch.outer(torch.arange(5.0), torch.ones(7)).double()
    for matrix_ in (v, v.T, torch.zeros(5, 7)):
        left, right = LowRank(3).factors(matrix_)
        torch.testing.assert_close(left @ right, matrix_.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [None, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_grid_of_some_rows_at_a_time_is_that_of_all(group, rows, monkeypatch):
    v = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    score = torch.rand(7, 13, generator=torch.Generator().manual_seed(1))
    wanted = [UniformGrid(3, group).quantize(v, s) for s in (None, score, score[0])]
    monkeypatch.setattr(grids, "_CACHED", 13 * rows)
    for given, s in zip(wanted, (None, score, score[0])):
        for ours, theirs in zip(UniformGrid(3, group).quantize(v, s), given):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("structure", [Unstructured(0.3), Unstructured(1.0), NM(3, 8), Rows(0.5)], ids=repr)
def test_selecting_and_sorting_keep_the_same_entries(structure, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for levels in (2, 5, 1000):  # few levels: many ties
        v = torch.randint(-levels, levels + 1, (9, 24), generator=generator).double()
        wanted = structure.support(v)
        monkeypatch.setattr(sparse, "_SHORT", 0)
        assert torch.equal(structure.support(v), wanted)
        monkeypatch.undo()
