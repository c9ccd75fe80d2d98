"""FLOPs: known counts, hand formulas, an independent counter, and the same number in every mode and on both paths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from eke.cost import flops, flops_by_module, register_flops
from eke.cost import forward as rehearsal

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


class Apply(nn.Module):
    """A module around a function, with optional weights."""

    def __init__(self, function, **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, **dict(self.named_buffers()))


class Recurrent(nn.Module):
    """Padded sequences, packed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(5, 7, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed, _ = self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return pad_packed_sequence(packed, batch_first=True)[0]


def recurrent_flops(layer: nn.Module, rows: int) -> int:
    """2 per entry of every matrix, for each step and sample."""
    return 2 * rows * sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)


def sparse(rows: int, columns: int, stored: int) -> Tensor:
    dense = torch.zeros(rows * columns)
    dense[torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[:stored]] = 1.0
    return dense.view(rows, columns)


X = torch.zeros(3, 8)
IMAGES = torch.zeros(2, 4, 9, 9)
Q = torch.zeros(2, 4, 6, 8)
COO, CSR = sparse(6, 8, 11).to_sparse(), sparse(6, 8, 11).to_sparse_csr()

# (name, module, inputs, count by hand)
CASES = [
    ("linear", nn.Linear(8, 5), (X,), 2 * 3 * 8 * 5),
    ("linear on a vector", nn.Linear(8, 5), (X[0],), 2 * 8 * 5),
    ("linear on a sequence", nn.Linear(8, 5), (torch.zeros(2, 3, 8),), 2 * 6 * 8 * 5),
    ("matrix times vector", Apply(lambda x: x @ x[0]), (X,), 2 * 3 * 8),
    ("inner product", Apply(lambda x: x[0] @ x[1]), (X,), 2 * 8),
    ("outer update", Apply(lambda x: torch.addr(torch.zeros(3, 8), x[:, 0], x[0])), (X,), 2 * 24),
    ("addmv", Apply(lambda x: torch.addmv(x[:, 0], x, x[0])), (X,), 2 * 24),
    ("bmm", Apply(lambda q: torch.bmm(q[0], q[0].mT)), (Q,), 2 * 4 * 6 * 8 * 6),
    ("baddbmm", Apply(lambda q: torch.baddbmm(torch.zeros(4, 6, 6), q[0], q[0].mT)), (Q,), 2 * 4 * 6 * 8 * 6),
    ("addbmm", Apply(lambda q: torch.addbmm(torch.zeros(6, 6), q[0], q[0].mT)), (Q,), 2 * 4 * 6 * 8 * 6),
    ("einsum", Apply(lambda q: torch.einsum("bhid,bhjd->bhij", q, q)), (Q,), 2 * 8 * 6 * 8 * 6),
    ("attention", Apply(lambda q: F.scaled_dot_product_attention(q, q, q)), (Q,), 2 * 2 * 8 * 6 * 6 * 8),
    ("causal", Apply(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True)), (Q,), 4 * 8 * 6 * 6 * 8),
    ("attention, narrow values", Apply(lambda q: F.scaled_dot_product_attention(q, q, q[..., :5])), (Q,), 7488),
    (
        "attention, shared keys",
        Apply(lambda q: F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True)),
        (Q,),
        4 * 8 * 6 * 6 * 8,
    ),
    ("conv", nn.Conv2d(4, 6, 3, stride=2, padding=1), (IMAGES,), 2 * 2 * 25 * 6 * 4 * 9),
    ("grouped conv", nn.Conv2d(4, 6, 3, groups=2), (IMAGES,), 2 * 2 * 49 * 6 * 2 * 9),
    ("depthwise conv", nn.Conv2d(4, 4, 3, groups=4), (IMAGES,), 2 * 2 * 49 * 4 * 9),
    ("dilated conv", nn.Conv2d(4, 6, 3, dilation=2), (IMAGES,), 2 * 2 * 25 * 6 * 4 * 9),
    ("conv 1d", nn.Conv1d(4, 6, 3), (torch.zeros(2, 4, 9),), 2 * 2 * 7 * 6 * 4 * 3),
    ("conv 3d", nn.Conv3d(1, 2, 2), (torch.zeros(1, 1, 4, 4, 4),), 2 * 27 * 2 * 8),
    ("transposed conv", nn.ConvTranspose2d(4, 6, 3, stride=2), (IMAGES,), 2 * 2 * 81 * 4 * 6 * 9),
    ("bilinear", nn.Bilinear(3, 4, 5), (torch.zeros(2, 3), torch.zeros(2, 4)), 2 * 2 * 5 * (3 + 1) * 4),
    ("distances", Apply(lambda x: torch.cdist(x, x, p=1.0)), (X,), 2 * 3 * 3 * 8),
    ("many distances", Apply(torch.cdist), (torch.zeros(30, 8), torch.zeros(40, 8)), 2 * 30 * 40 * 8),
    ("embedding", nn.Embedding(10, 3), (torch.zeros(4, dtype=torch.long),), 0),
    ("embedding bag", nn.EmbeddingBag(10, 3), (torch.zeros(2, 4, dtype=torch.long),), 0),
    ("norm, activation, pooling", nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), (IMAGES,), 0),
    ("dropout", nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 5)), (X,), 2 * 3 * 8 * 5),
    ("lstm", nn.LSTM(32, 64), (torch.zeros(50, 2, 32),), 4_915_200),
    ("cell", nn.LSTMCell(8, 5), (X,), 2 * 3 * 20 * (8 + 5)),
    ("sparse coo", Apply(lambda x, w: w @ x.T, w=COO), (X,), 2 * 11 * 3),
    ("sparse csr", Apply(lambda x, w: w @ x.T, w=CSR), (X,), 2 * 11 * 3),
    ("sparse.mm coo", Apply(lambda x, w: torch.sparse.mm(w, x.T), w=COO), (X,), 2 * 11 * 3),
    ("sparse.mm csr", Apply(lambda x, w: torch.sparse.mm(w, x.T), w=CSR), (X,), 2 * 11 * 3),
    ("linear with csr weight", Apply(lambda x, w: F.linear(x, w), w=CSR), (X,), 2 * 11 * 3),
    ("sparse times vector", Apply(lambda x, w: w @ x[0], w=CSR), (X,), 2 * 11),
    ("reduced sparse", Apply(lambda x, w: torch.sparse.mm(w, x.T.contiguous(), "sum"), w=CSR), (X,), 2 * 11 * 3),
    ("sampled", Apply(lambda x, w: torch.sparse.sampled_addmm(w, x.T[:6], x), w=CSR), (X,), 2 * 11 * 3),
]


@pytest.mark.parametrize(("module", "inputs", "count"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_count_equals_the_formula_by_hand(module, inputs, count):
    assert flops(module, *inputs) == count


@pytest.mark.parametrize(("module", "inputs", "count"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_shapes_alone_and_a_real_run_agree(module, inputs, count, monkeypatch):
    monkeypatch.setattr(rehearsal, "_has_only_plain_tensors", lambda *_: False)
    assert flops(module, *inputs) == count


@pytest.mark.parametrize("cell", list(GATES), ids=lambda cell: cell.__name__)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_recurrent_layers_count_every_matrix_once_a_step(cell, options, batch_first, kind):
    layer = cell(5, 7, batch_first=batch_first, dtype=kind, **options)
    assert flops(layer, torch.zeros(3, 4, 5, dtype=kind)) == recurrent_flops(layer, rows=12)


def test_recurrent_matrices_have_the_size_of_their_gates():
    for cell, gates in GATES.items():
        assert flops(cell(5, 7), torch.zeros(1, 1, 5)) == 2 * gates * 7 * (5 + 7)


def test_projected_lstm_counts_its_projection():
    layer = nn.LSTM(5, 7, proj_size=3, bidirectional=True)
    assert flops(layer, torch.zeros(6, 2, 5)) == recurrent_flops(layer, rows=12)
    assert flops(layer, torch.zeros(6, 2, 5)) == 2 * 12 * 2 * (28 * 5 + 28 * 3 + 3 * 7)


@pytest.mark.parametrize("cell", list(GATES), ids=lambda cell: cell.__name__)
def test_packed_sequences_count_the_steps_that_exist(cell):
    layer = cell(5, 7)
    packed = pack_padded_sequence(torch.zeros(6, 3, 5), [6, 4, 1])
    assert flops(layer, packed) == recurrent_flops(layer, rows=11)


def test_data_dependent_forward_is_run_for_real():
    net = Recurrent()
    count = flops(net, torch.zeros(3, 6, 5), torch.tensor([2, 6, 1]))
    assert count == recurrent_flops(net.layer, rows=9)


class Branching(nn.Module):
    """Takes one branch by a value and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(8, 2), nn.Linear(8, 20)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.large(x) if x.sum() > 0 else self.small(torch.relu_(x))


def test_values_that_choose_a_branch_are_respected():
    assert flops(Branching(), torch.ones(3, 8)) == 2 * 3 * 8 * 20
    assert flops(Branching(), -torch.ones(3, 8)) == 2 * 3 * 8 * 2


@pytest.fixture(scope="module")
def small_transformer() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)


def all_modes(model: nn.Module, *inputs: Tensor) -> set[int]:
    counts = set()
    for training in (True, False):
        model.train(training)
        counts.add(flops(model, *inputs))
        with torch.no_grad():
            counts.add(flops(model, *inputs))
        with torch.inference_mode():
            counts.add(flops(model, *(value + 0 for value in inputs)))
    return counts


def test_every_mode_counts_the_same(small_transformer):
    steps, width = 5, 16
    layer = 8 * width * width + 4 * width * steps + 4 * width * 32
    assert all_modes(small_transformer, torch.zeros(3, steps, width)) == {2 * 3 * steps * layer}
    assert all_modes(nn.LSTM(5, 7, 2, dropout=0.5), torch.zeros(3, 2, 5)) == {2 * 6 * 28 * (5 + 7 + 7 + 7)}
    assert len(all_modes(Branching(), torch.ones(3, 8))) == 1


class Auxiliary(nn.Module):
    """Has a second head in train mode, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.auxiliary = nn.Linear(8, 5), nn.Linear(8, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.auxiliary(x).sum() if self.training else self.head(x)


def test_heads_of_train_mode_do_not_count():
    assert all_modes(Auxiliary(), X) == {240}


def test_breakdown_looks_inside_fused_encoder_layers(small_transformer):
    counts = flops_by_module(small_transformer.eval(), torch.zeros(3, 5, 16))
    assert counts["layers.0.linear1"] == counts["layers.1.linear2"] == 2 * 15 * 16 * 32
    assert counts["layers.0.self_attn"] == 2 * 15 * (4 * 16 * 16 + 2 * 16 * 5)


def test_fast_path_setting_is_restored(small_transformer):
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        flops(small_transformer, torch.zeros(1, 2, 16))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    torch.backends.mha.set_fastpath_enabled(True)


def test_fused_attention_counts_as_the_plain_one(small_transformer):
    """Torch's fused kernels, met when the fast path is on, cost what their parts cost."""
    from torch.utils.flop_counter import FlopCounterMode

    from eke.cost.flops import _FORMULAS, _OnTensors

    model = copy.deepcopy(small_transformer).eval()
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.zeros(3, 5, 16)
    for run, count in ((lambda: model(x), flops(model, x)), (lambda: attention(x, x, x), flops(attention, x, x, x))):
        formulas = {packet: _OnTensors(formula) for packet, formula in _FORMULAS.items()}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            run()
        assert any("native" in str(op) or "encoder" in str(op) for op in counter.get_flop_counts()["Global"])
        assert counter.get_total_flops() == count


@pytest.mark.parametrize("inputs", [torch.ones(4, 8), -torch.ones(4, 8)], ids=["positive", "negative"])
@pytest.mark.parametrize(
    "make", [Branching, lambda: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(8), nn.Dropout())]
)
def test_nothing_of_the_user_changes(make, inputs):
    model = make().train()
    before, given = copy.deepcopy(model.state_dict()), inputs.clone()
    generator = torch.get_rng_state()
    flops(model, inputs)
    flops_by_module(model, inputs)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(inputs, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_forward_leaves_the_generator_alone():
    model = Apply(lambda x: (x * torch.rand(8)).sum().item() * x @ x.T)
    before = torch.get_rng_state()
    assert flops(model, X) == 2 * 3 * 8 * 3
    assert torch.equal(torch.get_rng_state(), before)


def test_torchvision_nets_have_their_known_counts():
    models = pytest.importorskip("torchvision.models")
    image = torch.zeros(1, 3, 224, 224)
    with torch.device("meta"):
        resnet, vit = models.resnet18(), models.vit_b_16()
    assert flops(resnet, image.to("meta")) == 3_628_146_688
    assert flops(vit, image.to("meta")) == 35_127_656_448


@pytest.mark.slow
def test_torchvision_nets_count_the_same_in_every_mode():
    models = pytest.importorskip("torchvision.models")
    image = torch.zeros(1, 3, 224, 224)
    assert all_modes(models.resnet18(), image) == {3_628_146_688}
    assert all_modes(models.vit_b_16(), image) == {35_127_656_448}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_conv_nets_are_twice_the_multiply_adds_of_fvcore(name):
    models, fvcore = pytest.importorskip("torchvision.models"), pytest.importorskip("fvcore.nn")
    model, image = models.get_model(name).eval(), torch.zeros(1, 3, 64, 64)
    analysis = fvcore.FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    products = sum(analysis.by_operator()[op] for op in ("conv", "linear"))
    assert flops(model, image) == 2 * products


def test_breakdown_includes_children_and_names_every_module():
    net = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.Linear(4, 2), nn.ReLU()), nn.Identity())
    assert flops_by_module(net, X) == {"": 240, "0": 192, "1": 48, "1.0": 48, "1.1": 0, "2": 0}


def test_shared_module_sums_its_calls():
    layer = nn.Linear(8, 8)
    assert flops_by_module(nn.Sequential(layer, nn.ReLU(), layer), X) == {"": 768, "0": 768, "1": 0}


def test_a_mapping_is_keyword_inputs_where_forward_takes_them():
    assert flops(nn.Linear(8, 5), {"input": X}) == 240
    assert flops(Apply(lambda batch: batch["x"] @ batch["x"].T), {"x": X}) == 2 * 3 * 8 * 3


def test_wrapped_models_count_as_the_model_inside():
    assert flops(nn.DataParallel(nn.Linear(8, 5)), X) == 240


@pytest.mark.slow
def test_compiled_models_count_as_the_model_inside():
    assert flops(torch.compile(nn.Linear(8, 5)), X) == 240


def test_lazy_modules_count_without_being_initialised():
    net = nn.Sequential(nn.LazyLinear(5), nn.ReLU())
    assert flops(net, X) == 240
    assert isinstance(net[0].weight, nn.UninitializedParameter)


def test_quantised_linear_counts_as_the_dense_one():
    quantised = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantised engine in this build")
    assert flops(nn.Sequential(quantised.Linear(8, 5)), X) == 240


def test_registered_operation_counts_by_its_formula():
    @torch.library.custom_op("eke_test_flops::triple", mutates_args=())
    def triple(x: Tensor, times: int) -> Tensor:
        return x * times

    triple.register_fake(lambda x, times: torch.empty_like(x))
    model = Apply(lambda x: triple(x, 3))
    assert flops(model, X) == 0
    register_flops(triple, lambda x_shape, times, *, out_shape: times * x_shape[0] * out_shape[1])
    assert flops(model, X) == 3 * 3 * 8
    with pytest.raises(ValueError, match=r"eke_test_flops\.triple has a FLOP formula already"):
        register_flops(torch.ops.eke_test_flops.triple, lambda *_: 0)
    with pytest.raises(ValueError, match=r"aten\.mm has a FLOP formula already"):
        register_flops(torch.ops.aten.mm.default, lambda *_: 0)


def test_formulas_are_for_operations():
    with pytest.raises(TypeError, match=r"needs an operation such as .* got 'relu'"):
        register_flops("relu", lambda *_: 0)


def test_errors_of_the_model_reach_the_user():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        flops(nn.Linear(7, 5), X)
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module is needed, got function"):
        flops(lambda x: x, X)


def test_a_model_that_cannot_be_copied_is_refused():
    net = nn.Linear(8, 5)
    net.stream = (value for value in ())
    with pytest.raises(RuntimeError, match=r"Linear cannot be copied .*generator.* __deepcopy__"):
        flops(net, X)


def test_a_kept_activation_does_not_prevent_the_copy():
    net = nn.Linear(8, 5)
    net.last = net(X)
    assert flops(net, X) == 240
