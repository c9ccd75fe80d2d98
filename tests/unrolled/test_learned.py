"""Unrolled networks: what they equal before training, what they share with the problem, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from eke.unrolled import (
    ALISTA,
    ISTA,
    LISTA,
    LISTACP,
    LISTACPSS,
    Convolutional,
    Dense,
    Functions,
    HyperLISTA,
    TiLISTA,
    analytic_weight,
    hard_threshold,
    nmse_db,
    support_schedule,
)

from .cases import small

DTYPES = [torch.float64, torch.complex128]
NETWORKS = {
    "LISTA": lambda a, layers=4: LISTA(a, layers=layers, penalty=0.1),
    "LISTACP": lambda a, layers=4: LISTACP(a, layers=layers, penalty=0.1),
    "LISTACPSS": lambda a, layers=4: LISTACPSS(a, layers=layers, penalty=0.1, shares=0.1),
    "TiLISTA": lambda a, layers=4: TiLISTA(a, layers=layers, penalty=0.1, shares=0.1),
    "ALISTA": lambda a, layers=4: ALISTA(
        a, layers=layers, thresholds=[0.3 * 0.75**k for k in range(4)][:layers], shares=0.1
    ),
    "HyperLISTA": lambda a, layers=4: HyperLISTA(a, layers=layers, c1=0.05, c2=0.05, c3=0.2),
}
EACH = pytest.mark.parametrize("name", NETWORKS)


@pytest.mark.parametrize("network", [LISTA, LISTACP, TiLISTA], ids=lambda n: n.__name__)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.complex128, 1e-12)]
)
def test_first_weights_are_ista(network, dtype, tolerance):
    a, _, b = small(dtype=dtype)
    options = {"shares": 0.0} if network is TiLISTA else {}
    step = 1 / (1.001 * float(Dense(a).norm_squared()))
    expected = ISTA(a, penalty=0.2, iterations=7, step=step)(b)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(network(a, layers=7, penalty=0.2, **options)(b), expected, rtol=0, atol=tolerance)


def test_first_weights_of_a_convolutional_network_are_ista():
    operator = Convolutional(
        torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), (6, 7)
    )
    b = torch.randn(2, operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1 / (1.001 * float(operator.norm_squared()))
    network = LISTACP(operator, layers=3, penalty=0.3)
    assert network.weights[0].shape == (3, 2, 3, 3)
    torch.testing.assert_close(network(b), ISTA(operator, penalty=0.3, iterations=3, step=step)(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lista_with_coupled_weights_is_listacp(dtype):
    a, x, b = small(dtype=dtype)
    weight = analytic_weight(a)
    free, coupled = LISTA(a, layers=3, penalty=0.2), LISTACP(a, layers=3, penalty=0.2)
    with torch.no_grad():
        free.input_weight.copy_(weight.mH)
        for second in free.state_weights:
            second.copy_(torch.eye(30, dtype=dtype) - weight.mH @ a)
        for first in coupled.weights:
            first.copy_(weight)
    torch.testing.assert_close(free(b), coupled(b), rtol=0, atol=1e-12)
    torch.testing.assert_close(free(b, 0.3 * x), coupled(b, 0.3 * x), rtol=0, atol=1e-12)


def test_no_support_selection_is_soft_and_full_selection_hard_thresholding():
    a, _, b = small()
    torch.testing.assert_close(LISTACPSS(a, layers=3, shares=0.0)(b), LISTACP(a, layers=3)(b))
    network = ALISTA(a, layers=1, thresholds=0.2, shares=1.0)
    torch.testing.assert_close(network(b), hard_threshold(b @ analytic_weight(a), 0.2))


def test_square_dictionaries_are_inverted_by_one_layer():
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    for a in (torch.linalg.qr(square).Q, square):
        found = ALISTA(a, layers=1, thresholds=0.0)(x @ a.T)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-10)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_layers_do_not_know_how_many_follow(name, dtype):
    a, _, b = small(dtype=dtype)
    network = NETWORKS[name](a)
    steps = network.trajectory(b)
    torch.testing.assert_close(steps[-1], network(b))
    torch.testing.assert_close(steps[1], NETWORKS[name](a, layers=2)(b))
    if name != "HyperLISTA":
        torch.testing.assert_close(steps[1], network.prefix(2)(b))


@EACH
def test_samples_do_not_see_one_another(name):
    a, _, b = small(batch=5)
    network = NETWORKS[name](a)
    together = network(b)
    for row in range(5):
        torch.testing.assert_close(network(b[row : row + 1])[0], together[row], rtol=0, atol=1e-12)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turning_b_turns_x(name, dtype):
    a, _, b = small(dtype=dtype)
    network = NETWORKS[name](a)
    turn = 1j if dtype.is_complex else -1
    torch.testing.assert_close(network(turn * b), turn * network(b), rtol=0, atol=1e-12)


@EACH
def test_exchanging_columns_exchanges_entries(name):
    a, _, b = small()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(NETWORKS[name](a[:, order])(b), NETWORKS[name](a)(b)[:, order], rtol=0, atol=1e-9)


@EACH
def test_nothing_gives_nothing(name):
    a, _, b = small()
    found = NETWORKS[name](a)(torch.zeros_like(b))
    assert bool((found == 0).all())


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_single_precision_is_double_precision_rounded(name, dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    a, _, b = small(dtype=wide)
    found = NETWORKS[name](a.to(dtype))(b.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.to(wide), NETWORKS[name](a)(b), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["ALISTA", "HyperLISTA"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_each_sample_are_solved_with_their_own_weights(name, dtype):
    a, x, b = small(dtype=dtype, matrices=True)
    together = NETWORKS[name](a)
    found = together(b, 0.5 * x)
    for row in range(len(a)):
        alone = NETWORKS[name](a[row])(b[row : row + 1], 0.5 * x[row : row + 1])[0]
        torch.testing.assert_close(found[row], alone, rtol=0, atol=1e-9)
    solution = together.solve(b, tolerance=0.05)
    assert solution.x.shape == found.shape


@EACH
def test_solve_runs_the_layers_and_lets_samples_leave(name):
    a, _, b = small()
    network = NETWORKS[name](a)
    torch.testing.assert_close(network.solve(b).x, network(b))
    b[0] = 0
    solution = network.solve(b, tolerance=0.0)
    assert int(solution.iterations[0]) == 1
    assert int(solution.iterations.max()) == 4
    torch.testing.assert_close(solution.x, network(b), rtol=0, atol=1e-12)


@EACH
def test_starting_at_the_answer_is_better_than_starting_at_zero(name):
    a, x, b = small()
    network = NETWORKS[name](a)
    assert nmse_db(network(b, x), x) < nmse_db(network(b), x) - 3


def test_operators_without_a_matrix_are_written_out_for_the_weight():
    a, _, b = small()
    functions = Functions(lambda x: x @ a.T, lambda r: r @ a, shape=(20, 30), dtype=torch.float64)
    torch.testing.assert_close(ALISTA(functions, layers=3)(b), ALISTA(a, layers=3)(b))
    given = ALISTA(functions, layers=3, weight=functions, steps=0.1)
    torch.testing.assert_close(given(b), ALISTA(a, layers=3, weight=a, steps=0.1)(b))


def test_convolutional_alista_recovers_maps():
    filters = torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
    operator = Convolutional(filters, (12, 12))
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(2, operator.shape[1], generator=generator) < 0.03) * torch.randn(
        2, operator.shape[1], generator=generator, dtype=torch.float64
    )
    b = operator.forward(x)
    network = ALISTA(operator, layers=12, thresholds=[0.5 * 0.7**k for k in range(12)], shares=0.05)
    assert isinstance(network.weight, Convolutional)
    errors = [nmse_db(found, x) for found in network.trajectory(b)]
    assert errors[-1] < min(-12, errors[2] - 6)


def test_weights_of_perturbed_dictionaries_follow_them():
    a, x, _ = small(m=20, n=25, nonzeros=2)
    noise = 0.15 * torch.randn(len(x), 20, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    own = a + noise
    b = (own @ x.unsqueeze(-1)).squeeze(-1)
    network = ALISTA(a, layers=16, thresholds=[0.4 * 0.7**k for k in range(16)], shares=0.08)
    followed = network.on(own)
    assert followed.log_thresholds is network.log_thresholds
    torch.testing.assert_close(followed.weight.dense()[2], analytic_weight(own[2]))
    assert nmse_db(followed(b), x) < nmse_db(network(b), x) - 10


def test_alista_is_differentiable_in_its_dictionary():
    a, _, b = small(m=3, n=4, batch=2, nonzeros=1)
    a = a.expand(2, -1, -1).clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m: ALISTA(m, layers=2, thresholds=0.05, shares=0.5)(b), (a,))


@EACH
def test_networks_compile_to_one_graph(name):
    a, _, b = small()
    network = NETWORKS[name](a)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(b), network(b), rtol=0, atol=1e-12)


@EACH
def test_networks_export_to_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    a, _, b = small(dtype=torch.float32)
    network = NETWORKS[name](a).eval()
    torch.onnx.export(network, (b,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: b.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), network(b).detach(), rtol=0, atol=1e-4)


@EACH
def test_networks_move_with_their_dictionary(name):
    a, _, b = small()
    moved = NETWORKS[name](a).to(torch.float32)
    torch.testing.assert_close(moved(b.float()), NETWORKS[name](a)(b).float(), rtol=0, atol=2e-5)


def test_parameters_are_as_many_as_the_papers_count():
    a, _, _ = small()
    m, n, layers = 20, 30, 5

    def count(network):
        return sum(p.numel() for p in network.parameters())

    assert count(LISTA(a, layers=layers)) == m * n + (layers - 1) * n**2 + layers
    assert count(LISTA(a, layers=layers, tied=True)) == m * n + n**2 + layers
    assert count(LISTACP(a, layers=layers)) == layers * (m * n + 2)
    assert count(TiLISTA(a, layers=layers)) == m * n + 2 * layers
    assert count(ALISTA(a, layers=layers)) == 2 * layers
    assert count(HyperLISTA(a, layers=layers)) == 3


def test_support_grows_as_in_the_source():
    shares = support_schedule(16)
    assert shares[0] == pytest.approx(0.012)
    assert shares[-1] == pytest.approx(0.13)
    assert shares[9] == pytest.approx(0.12)


A = small()[0]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ALISTA(A, layers=0), ValueError, "at least 1 iteration, got 0"),
        (lambda: LISTA(A.expand(2, 20, 30)), ValueError, "LISTA trains matrices for one A.*each of 2 samples"),
        (lambda: LISTACPSS(A.expand(2, 20, 30)), ValueError, "LISTACPSS trains matrices for one A"),
        (lambda: ALISTA(A, layers=2, thresholds=[0.1]), ValueError, r"thresholds must be.*one a layer \(2\), got 1"),
        (lambda: ALISTA(A, layers=2, thresholds=-0.1), ValueError, r"thresholds must be 0 or more, got \[-0.1, -0.1\]"),
        (lambda: ALISTA(A, layers=2, shares=1.5), ValueError, "parts of the entries, from 0 to 1, got"),
        (lambda: ALISTA(A, layers=2, shares=math.nan), ValueError, "from 0 to 1, got"),
        (lambda: ALISTA(A, weight=A.T), ValueError, r"A's shape \(20, 30\).*got \(30, 20\)"),
        (lambda: ALISTA(A.long()), TypeError, "got torch.int64"),
        (lambda: ALISTA(torch.cat([A[:3], A[:1]])), ValueError, "rank below m"),
        (lambda: ALISTA(A, layers=3).prefix(4), ValueError, "depth must be from 1 to 3 layers, got 4"),
        (lambda: ALISTA(A)(torch.zeros(2, 19)), ValueError, r"\(batch, 20\)"),
        (lambda: ALISTA(A)(torch.full((2, 20), math.nan, dtype=torch.float64)), ValueError, "NaN"),
        (lambda: HyperLISTA(A, c1=-1.0), ValueError, "c1 must be a finite number, 0 or more, got -1.0"),
        (lambda: HyperLISTA(A, c3=math.inf), ValueError, "c3 must be a finite number, 0 or more, got inf"),
        (lambda: HyperLISTA(A, weight=A.T), ValueError, r"A's shape \(20, 30\), got \(30, 20\)"),
        (lambda: HyperLISTA(torch.cat([A, A[:, :1]], 1)), ValueError, "columns repeat"),
        (lambda: HyperLISTA(A)(torch.zeros(2, 20)), TypeError, "b is torch.float32 and A torch.float64"),
    ],
)  # fmt: skip
def test_wrong_networks_and_inputs_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
