"""Laws of sites: reading, writing, naming, and rows that multiply the matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from eke import sites

from .nets import Conv1D, Encoder, Recurrent, Tied


def conv(kind, *args, size=(7, 6, 5), **options):
    dims = int(kind.__name__[-2])
    return kind(*args, **options), (2, args[0], *size[:dims])


LAYERS = {
    "linear": (nn.Linear(5, 4), (3, 5)),
    "linear without bias, sequence": (nn.Linear(5, 4, bias=False), (3, 2, 6, 5)),
    "linear, one vector": (nn.Linear(5, 4), (5,)),
    "conv1d": conv(nn.Conv1d, 4, 6, 3, padding=2, stride=2),
    "conv1d same, even kernel": conv(nn.Conv1d, 4, 6, 4, padding="same"),
    "conv1d valid": conv(nn.Conv1d, 4, 6, 3, padding="valid"),
    "conv2d": conv(nn.Conv2d, 3, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
    "conv2d dilated": conv(nn.Conv2d, 3, 4, 3, padding=2, dilation=(2, 1)),
    "conv2d same, dilated": conv(nn.Conv2d, 3, 4, (2, 3), padding="same", dilation=2),
    "conv2d in groups": conv(nn.Conv2d, 6, 4, 3, groups=2),
    "conv2d depthwise": conv(nn.Conv2d, 6, 6, 3, groups=6, padding=1),
    "conv2d depthwise, two each": conv(nn.Conv2d, 3, 6, 3, groups=3, padding=1, bias=False),
    "conv2d reflect": conv(nn.Conv2d, 3, 4, 3, padding=(2, 1), padding_mode="reflect"),
    "conv2d replicate": conv(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="replicate", stride=2),
    "conv2d circular": conv(nn.Conv2d, 3, 4, 3, padding=(1, 2), padding_mode="circular", groups=1),
    "conv3d": conv(nn.Conv3d, 2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1), groups=2),
    "transposed 1d": conv(nn.ConvTranspose1d, 4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed 2d in groups": conv(nn.ConvTranspose2d, 4, 6, (3, 2), stride=(2, 3), groups=2, dilation=(2, 1)),
    "transposed 2d, padding beyond the kernel": conv(nn.ConvTranspose2d, 4, 6, 2, padding=2),
    "transposed 3d": conv(nn.ConvTranspose3d, 2, 3, 2, stride=2, size=(3, 2, 2)),
    "transposed linear of GPT-2": (Conv1D(4, 5), (2, 3, 5)),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request):
    module, shape = LAYERS[request.param]
    torch.manual_seed(1)
    module = copy.deepcopy(module).double()
    return module, torch.randn(shape, dtype=torch.float64)


def product(site, rows, matrix):
    """Plain definition: y[s, l, i] = sum_j W[i, j] x[s, l, group(i), j]."""
    per_group = site.shape[0] // site.groups
    columns = [rows[:, :, i // per_group] @ matrix[i] for i in range(site.shape[0])]
    return torch.stack(columns, dim=-1)


def test_rows_times_matrix_are_the_output(layer):
    module, x = layer
    (site,) = sites.find(module)
    rows, y = site.inputs_to_rows((x,)), module(x)
    bias = module.bias if module.bias is not None else 0
    torch.testing.assert_close(
        site.output_to_rows(y), product(site, rows, site.read(module)) + bias, rtol=1e-12, atol=1e-12
    )


def test_rows_give_the_gradient(layer):
    module, x = layer
    (site,) = sites.find(module)
    y = module(x)
    g = torch.randn_like(y)
    y.backward(g)
    rows = site.inputs_to_rows(x)
    gradient = torch.einsum(
        "slgm,slgn->gmn", site.output_to_rows(g).reshape(*rows.shape[:3], site.shape[0] // site.groups), rows
    )
    carrier = copy.deepcopy(module)
    site.tensor(carrier).data.copy_(site.tensor(module).grad)
    torch.testing.assert_close(gradient.reshape(site.shape), site.read(carrier), rtol=1e-11, atol=1e-11)


def test_an_image_without_batch_is_one_sample():
    module = nn.Conv2d(3, 4, 3)
    (site,) = sites.find(module)
    x = torch.randn(3, 6, 6)
    assert torch.equal(site.inputs_to_rows(x), site.inputs_to_rows(x[None]))
    assert torch.equal(site.output_to_rows(module(x)), site.output_to_rows(module(x[None])))


MODELS = {
    **{name: module for name, (module, _) in LAYERS.items()},
    "packed attention": Encoder(),
    "split attention": Encoder(packed=False),
    "embedding and lstm": Recurrent(),
    "two-way gru": nn.GRU(3, 4, num_layers=2, bidirectional=True),
    "lstm with projection": nn.LSTM(3, 5, proj_size=2),
    "rnn cell": nn.RNNCell(3, 4),
    "bag": nn.EmbeddingBag(7, 3),
    "tied": Tied(),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_write_then_read_is_exact_and_touches_nothing_else(model):
    model = copy.deepcopy(model).double()
    for site in sites.find(model):
        before = {name: p.clone() for name, p in model.named_parameters()}
        parameter = site.tensor(model)
        m, n = site.shape
        matrix = torch.arange(m * n, dtype=torch.float64).reshape(m, n)
        site.write_(model, matrix)
        assert torch.equal(site.read(model), matrix)
        assert site.tensor(model) is parameter
        after = dict(model.named_parameters())
        changed = {name for name, old in before.items() if not torch.equal(old, after[name])}
        assert changed == {site.parameter_name}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_writing_what_was_read_changes_nothing(model):
    model = copy.deepcopy(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for site in sites.find(model):
        read = site.read(model)
        assert read.shape == site.shape
        assert not read.requires_grad
        site.write_(model, read)
        read.zero_()  # a copy: the model does not see this
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_every_matrix_is_named_once():
    expected = {
        "patch": ("conv", (16, 48), 1, 1),
        "attention.in_proj_weight": ("attention", (48, 16), 1, 1),
        "attention.out_proj": ("attention", (16, 16), 1, 1),
        "mlp.0": ("linear", (24, 16), 1, 1),
        "mlp.2": ("linear", (16, 24), 1, 1),
        "head": ("linear", (5, 16), 1, 1),
    }
    assert {s.name: (s.kind, s.shape, s.groups, s.gates) for s in sites.find(Encoder())} == expected
    names = [s.name for s in sites.find(Encoder(packed=False))]
    assert names[1:4] == ["attention.q_proj_weight", "attention.k_proj_weight", "attention.v_proj_weight"]
    recurrent = {s.name: (s.kind, s.shape, s.groups, s.gates) for s in sites.find(Recurrent())}
    assert recurrent["embedding"] == ("embedding", (11, 8), 1, 1)
    assert recurrent["lstm.weight_ih_l0"] == ("lstm", (24, 8), 1, 4)
    assert recurrent["lstm.weight_hh_l0"] == ("lstm", (24, 6), 1, 4)
    projected = {s.name: s.gates for s in sites.find(nn.LSTM(3, 5, proj_size=2))}
    assert projected == {"weight_ih_l0": 4, "weight_hh_l0": 4, "weight_hr_l0": 1}
    both_ways = sites.find(nn.GRU(3, 4, num_layers=2, bidirectional=True))
    assert len(both_ways) == 8
    assert {s.gates for s in both_ways} == {3}


def test_tied_weights_are_one_site():
    by_name = {site.name: site for site in sites.find(Tied())}
    assert list(by_name) == ["embedding", "up", "down"]
    assert by_name["embedding"].tied == ("head.weight",)
    model = Tied()
    model.head.weight = nn.Parameter(model.embedding.weight.data)  # another parameter object on the same memory
    assert sites.find(model)[0].tied == ("head.weight",)


def test_a_shared_module_is_one_site():
    inner = nn.Linear(3, 3)
    assert [site.name for site in sites.find(nn.Sequential(inner, nn.ReLU(), inner))] == ["0"]


def test_skip_leaves_out_modules_with_their_insides_and_sites():
    names = {site.name for site in sites.find(Encoder(), skip=["mlp", "attention.in_proj_weight", "head"])}
    assert names == {"patch", "attention.out_proj"}


def test_an_unknown_name_to_skip_is_an_error():
    with pytest.raises(ValueError, match=r"no module or site 'heed' in this model\. Did you mean 'head'"):
        sites.find(Encoder(), skip=["heed"])


class Compiled(nn.Module):
    """What torch.compile returns, as far as its structure goes."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("compiled", [Compiled, pytest.param(torch.compile, marks=pytest.mark.slow)])
def test_wrapped_models_have_the_same_sites(compiled):
    model = Encoder()
    wrapped = nn.DataParallel(compiled(model))
    assert sites.unwrap(wrapped) is model
    assert sites.find(wrapped) == sites.find(model)
    assert sites.find(model)[0].module(wrapped) is model.patch


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_only_sites_with_their_own_boundary_are_hookable():
    hookable = {
        site.name for site in sites.find(nn.ModuleList([Encoder(), Recurrent(), Padded(1, 1, 3)])) if site.hookable
    }
    assert hookable == {"0.patch", "0.mlp.0", "0.mlp.2", "0.head", "1.hidden", "1.head"}
    visible = {site.name for site in sites.find(nn.ModuleList([Encoder(), Recurrent()])) if site.visible}
    assert visible - hookable == {
        "0.attention.in_proj_weight", "0.attention.out_proj", "1.lstm.weight_ih_l0", "1.lstm.weight_hh_l0",
    }  # fmt: skip
    site = next(site for site in sites.find(Recurrent()) if site.name == "embedding")
    for method in (site.inputs_to_rows, site.output_to_rows):
        with pytest.raises(ValueError, match=r"'embedding' \(embedding\) has no module whose input"):
            method(torch.zeros(2, 3, 8))
    assert not any(site.visible for site in sites.find(nn.LSTM(3, 5, proj_size=2)))
    assert not any(site.visible for site in sites.find(nn.LSTM(3, 5)))  # the model itself cannot be replaced


def quantized():
    return torch.ao.nn.quantized.Linear(3, 4)


def masked_linear():
    return prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=2)


UNREADABLE = {
    "weight is parametrized: call": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "weight is parametrized": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "weight has weight_norm": lambda: nn.utils.weight_norm(nn.Linear(3, 4)),
    "weight has spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
    "weight is masked by torch.nn.utils.prune": masked_linear,
    "weight_hh_l0 is parametrized": lambda: parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
    "weight is torch.complex64, not a plain floating": lambda: nn.Linear(3, 4, dtype=torch.complex64),
    "Linear is already quantized": quantized,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("reason", "make"), UNREADABLE.items(), ids=UNREADABLE.keys())
def test_what_cannot_be_read_plainly_is_left_out_with_the_reason(reason, make):
    model = nn.Sequential(make(), nn.Linear(4, 2))
    assert [site.name for site in sites.find(model)] == ["1"]
    skipped = sites.skipped(model)
    assert list(skipped) == ["0"]
    assert reason in skipped["0"]


def test_custom_parameters_and_lazy_layers_are_listed_as_skipped():
    model = nn.Sequential(Encoder(), nn.LazyLinear(3), nn.Bilinear(2, 3, 4))
    assert [site.name for site in sites.find(model)] == [f"0.{site.name}" for site in sites.find(Encoder())]
    assert sites.skipped(model) == {
        "0.position": "parameter of Encoder, kept whole",
        "1.weight": "not initialised yet: run one batch through the model first",
        "1.bias": "not initialised yet: run one batch through the model first",
        "2.weight": "parameter of Bilinear, kept whole",
    }
    assert sites.skipped(Recurrent()) == {}


def test_a_site_of_another_model_is_an_error():
    (site,) = sites.find(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(
        ValueError, match=r"'0' was found with '0.weight' of shape \(4, 3\), this model has shape \(4, 5\)"
    ):
        site.read(nn.Sequential(nn.Linear(5, 4)))
    with pytest.raises(ValueError, match="this model has nothing"):
        site.read(nn.Sequential(nn.ReLU()))


def test_wrong_shapes_are_errors():
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 1))
    linear, convolution = sites.find(model)
    with pytest.raises(ValueError, match=r"needs a matrix of shape \(4, 3\), got \(3, 4\)"):
        linear.write_(model, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"last dimension is 3 is needed here, got shape \(2, 4\)"):
        linear.inputs_to_rows(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(samples, 4, and 2 sizes\) is needed here, got shape \(2, 3, 5, 5\)"):
        convolution.output_to_rows(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match="needs a tensor as the module's first input, got str"):
        linear.inputs_to_rows(("x",))


def test_reading_keeps_dtype_and_works_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    assert [site.shape for site in sites.find(model)] == [(4, 3), (4, 4)]
    half = nn.Linear(3, 4).bfloat16()
    assert sites.find(half)[0].read(half).dtype is torch.bfloat16
