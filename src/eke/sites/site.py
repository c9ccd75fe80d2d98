"""Sites: the named boundaries of a model where a matrix maps an input to an output.

`find` walks a model once and names every matrix in it, whatever module holds it: linear layers, convolutions (as
m x (c/groups * prod(kernel))), transposed convolutions, embeddings, packed attention projections, recurrent weights and
the transposed linear layer of GPT-2. Tensors that several modules share are named once; the other names stand in
`tied`. What looks like a matrix and is not a site (parametrized, quantized, custom) is listed by `skipped` with the
reason, so that nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._errors import suggest
from .rows import Geometry, channels_first_rows, channels_last_rows, patches

Kind = Literal["linear", "conv", "conv_transpose", "embedding", "attention", "lstm", "gru", "rnn"]

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_TRANSPARENT = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)


@dataclass(frozen=True)
class Site:
    """One matrix of a model and the module that applies it.

    Args:
        name: Name of the module, or of the parameter where a module has several matrices ("attn.in_proj_weight").
        kind: What applies it.
        module_name: Name of the module that owns the parameter; "" is the model itself.
        parameter: The module's attribute that holds the tensor.
        stored_shape: Shape of that tensor.
        shape: (m, n) of the matrix. An embedding's is (entries, width), looked up by row.
        tied: Full names of the parameters that are the same tensor.
        groups: Groups whose rows are stacked in the matrix; row i reads the inputs of group i // (m / groups).
        gates: Gates whose rows are stacked in a recurrent weight.
        transposed: Whether the tensor holds the matrix transposed.
        geometry: Of a convolution.
        hookable: Whether the module is called and returns exactly rows @ matrix.T + bias, so that hooks on it see this
            site's input and output. False for attention projections and recurrent weights (a fused kernel uses them),
            for embeddings and for classes that override `forward`.
        openable: Whether `open_` puts a module in place that sees the site's input and output.
    """

    name: str
    kind: Kind
    module_name: str
    parameter: str
    stored_shape: tuple[int, ...]
    shape: tuple[int, int]
    tied: tuple[str, ...] = ()
    groups: int = 1
    gates: int = 1
    transposed: bool = False
    geometry: Geometry | None = None
    hookable: bool = True
    openable: bool = False

    @property
    def boundary(self) -> str:
        """Name of the module that sees the site's input and output: its own, or that of an opened model (`open_`)."""
        return self.module_name if self.hookable else self.name

    @property
    def visible(self) -> bool:
        """Whether a module sees the site's input and output, in the model itself or opened."""
        return self.hookable or self.openable

    @property
    def bias_name(self) -> str:
        """Attribute of the module that is added to the matrix product."""
        return "bias" if self.parameter == "weight" else self.parameter.replace("weight", "bias")

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter, as in `model.named_parameters()`."""
        return _join(self.module_name, self.parameter)

    def module(self, model: nn.Module) -> nn.Module:
        """Return the module that owns the matrix; hooks on it see the site's input and output if `hookable`."""
        return unwrap(model).get_submodule(self.module_name)

    def tensor(self, model: nn.Module) -> nn.Parameter:
        """Return the parameter itself.

        Raises:
            ValueError: if this model has another shape there, or nothing.
        """
        parameter = self.module(model)._parameters.get(self.parameter)
        if parameter is None or tuple(parameter.shape) != self.stored_shape:
            found = "nothing" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise ValueError(
                f"Site {self.name!r} was found with {self.parameter_name!r} of shape {self.stored_shape}, "
                f"this model has {found}; call sites.find on this model."
            )
        return parameter

    def matrix_of(self, stored: Tensor) -> Tensor:
        """Return the matrix (m, n) of a tensor in the shape of the parameter: its values, or a gradient of them."""
        if self.kind == "conv_transpose":
            # (in, out/g, k...) -> (g, out/g, in/g, k...)
            stored = stored.reshape(self.groups, -1, *self.stored_shape[1:]).transpose(1, 2)
        elif self.transposed:
            stored = stored.t()
        return stored.reshape(self.shape)

    def stored_of(self, matrix: Tensor) -> Tensor:
        """Return a matrix (m, n) in the shape of the parameter: the inverse of `matrix_of`."""
        if self.kind == "conv_transpose":
            inputs, outputs, *kernel = self.stored_shape
            matrix = matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel).transpose(1, 2)
        elif self.transposed:
            matrix = matrix.t()
        return matrix.reshape(self.stored_shape)

    def read(self, model: nn.Module) -> Tensor:
        """Return a detached copy of the matrix, (m, n), in the parameter's dtype and device."""
        return self.matrix_of(self.tensor(model).detach()).clone()

    def write_(self, model: nn.Module, matrix: Tensor) -> None:
        """Write a matrix in place; the parameter stays the same object.

        Args:
            model: Model that has this site.
            matrix: (m, n), of any floating dtype and device.

        Raises:
            ValueError: if its shape is not (m, n).
        """
        parameter = self.tensor(model)
        if tuple(matrix.shape) != self.shape:
            raise ValueError(f"Site {self.name!r} needs a matrix of shape {self.shape}, got {tuple(matrix.shape)}.")
        with torch.no_grad():
            parameter.copy_(self.stored_of(matrix.detach()))

    def inputs_to_rows(self, module_input: Tensor | Sequence[object]) -> Tensor:
        """Turn what the module was called with into the rows that the matrix multiplies.

        Args:
            module_input: The module's input, or the tuple of inputs that a hook receives.

        Returns:
            (samples, locations, groups, n). Then, for `visible` sites, the output of the module `boundary` as given by
            `output_to_rows` is einsum("slgn,gmn->slgm", rows, matrix.view(groups, m / groups, n)) + bias.

        Raises:
            ValueError: if the site is not `visible`, or the shape does not fit.
        """
        self._check_visible()
        x = module_input if isinstance(module_input, Tensor) else module_input[0]
        if not isinstance(x, Tensor):
            raise ValueError(f"Site {self.name!r} needs a tensor as the module's first input, got {type(x).__name__}.")
        if self.geometry is not None:
            return patches(x, self.geometry)
        return channels_last_rows(x, self.shape[1]).unsqueeze(2)

    def output_to_rows(self, output: Tensor) -> Tensor:
        """Turn the module's output, or the gradient at it, into rows.

        Args:
            output: What the module returned, or a tensor of its shape.

        Returns:
            (samples, locations, m), in the order of `inputs_to_rows`.

        Raises:
            ValueError: if the site is not `visible`, or the shape does not fit.
        """  # noqa: DOC502
        self._check_visible()
        if self.geometry is not None:
            return channels_first_rows(output, self.shape[0], len(self.geometry.kernel))
        return channels_last_rows(output, self.shape[0])

    def _check_visible(self) -> None:
        if not self.visible:
            raise ValueError(
                f"Site {self.name!r} ({self.kind}) has no module whose input and output are its own: "
                f"{self.parameter_name!r} is applied inside a larger computation. Choose sites with `.visible`."
            )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside `torch.compile` and (Distributed)DataParallel wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def find(model: nn.Module, *, skip: Iterable[str] = ()) -> list[Site]:
    """Name every matrix of a model.

    Args:
        model: Any module; not changed. Wrappers of `torch.compile` and DDP are looked through.
        skip: Names of modules (with all that is inside them) or of sites to leave out.

    Returns:
        One `Site` per distinct tensor, in the order of `model.named_modules()`.

    Raises:
        ValueError: if a name in `skip` is neither a module nor a site.
    """  # noqa: DOC502
    model = unwrap(model)
    sites = list(_distinct(model))
    unwanted = set(skip)
    _check_names(model, sites, unwanted)
    return [site for site in sites if not any(_inside(site, name) for name in unwanted)]


def skipped(model: nn.Module) -> dict[str, str]:
    """Say what looks like a matrix and is not a site, and why.

    Args:
        model: Any module; not changed.

    Returns:
        Reason by module name, or by parameter name for parameters of custom modules.
    """
    reasons: dict[str, str] = {}
    model = unwrap(model)
    for name, module in model.named_modules():
        if _inside_parametrization(name):
            continue
        if reason := _unreadable(module):
            reasons[name or type(module).__name__] = reason
        elif not _matrices(module) and not isinstance(module, _TRANSPARENT):
            for parameter, tensor in module._parameters.items():
                if tensor is not None and _is_lazy(tensor):
                    reasons[_join(name, parameter)] = "not initialised yet: run one batch through the model first"
                elif tensor is not None and tensor.dim() > 1:
                    reasons[_join(name, parameter)] = f"parameter of {type(module).__name__}, kept whole"
    return reasons


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Return what two tensors share exactly when they are the same memory seen the same way."""
    if tensor.device.type == "meta" or _is_lazy(tensor) or tensor.numel() == 0:
        return (id(tensor),)
    address = tensor.untyped_storage().data_ptr()
    return (str(tensor.device), address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _distinct(model: nn.Module) -> Iterator[Site]:
    owners: dict[tuple[object, ...], list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        if _inside_parametrization(module_name) or _unreadable(module):
            continue
        for parameter in _matrices(module):
            tensor = module._parameters[parameter]
            assert tensor is not None
            owners.setdefault(storage_key(tensor), []).append((module_name, module, parameter))
    for (module_name, module, parameter), *others in owners.values():
        yield _site(module_name, module, parameter, tied=tuple(_join(name, other) for name, _, other in others))


def _matrices(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that are matrices of a kind eke knows."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd) or _is_hf_conv1d(
        module
    ):
        names: Sequence[str] = ("weight",)
    elif isinstance(module, nn.MultiheadAttention):
        names = _ATTENTION_WEIGHTS
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        names = [name for name in module._parameters if name.startswith("weight")]
    else:
        names = ()
    found = ((name, module._parameters.get(name)) for name in names)
    return [name for name, tensor in found if tensor is not None and not _is_lazy(tensor)]


def _site(module_name: str, module: nn.Module, parameter: str, *, tied: tuple[str, ...]) -> Site:
    tensor = module._parameters[parameter]
    assert tensor is not None
    stored = tuple(tensor.shape)
    kind = _kind(module)
    several = isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase) or not module_name
    name = _join(module_name, parameter) if several else module_name
    shape, groups, gates, geometry = (stored[0], tensor[0].numel()), 1, 1, None
    transposed = _is_hf_conv1d(module)
    if transposed:
        shape = (stored[1], stored[0])
    elif isinstance(module, nn.modules.conv._ConvNd):
        geometry, groups = Geometry.of(module), module.groups
        shape = (module.out_channels, tensor.numel() // module.out_channels)
    elif kind in _GATES and not parameter.startswith("weight_hr"):
        gates = _GATES[kind]
    return Site(
        name,
        kind,
        module_name,
        parameter,
        stored,
        shape,
        tied=tied,
        groups=groups,
        gates=gates,
        transposed=transposed,
        geometry=geometry,
        hookable=_is_hookable(module),
        openable=bool(module_name) and is_openable(module),
    )


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.MultiheadAttention | nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "attention"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv_transpose" if module.transposed else "conv"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return "lstm"
    if isinstance(module, nn.GRU | nn.GRUCell):
        return "gru"
    return "rnn" if isinstance(module, nn.RNNBase | nn.RNNCellBase) else "linear"


def is_openable(module: nn.Module) -> bool:
    """Return whether `open_` can open a module (a recurrent layer, an attention), or it is the last layer of such."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return True
    known = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.MultiheadAttention)
    return type(module) in known and not getattr(module, "proj_size", False)


def _is_hookable(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if _is_hf_conv1d(module):
        return True
    for known in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, known):
            same_inner = getattr(type(module), "_conv_forward", None) is getattr(known, "_conv_forward", None)
            return type(module).forward is known.forward and same_inner
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return any(isinstance(module, known) and type(module).forward is known.forward for known in transposed)


def _is_hf_conv1d(module: nn.Module) -> bool:
    """Return whether it is GPT-2's transposed linear layer, without importing transformers."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2


def _unreadable(module: nn.Module) -> str:
    """Return why the matrices of this module cannot be read and written plainly, or ''."""
    if parametrize.is_parametrized(module):
        names = ", ".join(sorted(module.parametrizations))  # type: ignore[arg-type]
        return f"{names} is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first to compress it"
    parameters, buffers = module._parameters, module._buffers
    for name in parameters:
        if name.endswith("_orig") and name[:-5] + "_mask" in buffers:
            return (
                f"{name[:-5]} is masked by torch.nn.utils.prune: call torch.nn.utils.prune.remove first to compress it"
            )
        if name.endswith("_orig") and name[:-5] + "_u" in buffers:
            return f"{name[:-5]} has spectral_norm: call torch.nn.utils.remove_spectral_norm first to compress it"
        if name.endswith("_g") and name[:-2] + "_v" in parameters:
            return f"{name[:-2]} has weight_norm: call torch.nn.utils.remove_weight_norm first to compress it"
    if ".quantized" in type(module).__module__ and hasattr(module, "weight"):
        return f"{type(module).__name__} is already quantized"
    for name in _matrices(module):
        tensor = parameters[name]
        assert tensor is not None
        if not tensor.is_floating_point() or type(tensor.data) is not Tensor:
            form = str(tensor.dtype) if type(tensor.data) is Tensor else type(tensor.data).__name__
            return f"{name} is {form}, not a plain floating tensor (already quantized?)"
    return ""


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.parameter.UninitializedParameter)


def _inside_parametrization(name: str) -> bool:
    return "parametrizations" in name.split(".")


def _inside(site: Site, name: str) -> bool:
    return site.name == name or site.module_name == name or site.module_name.startswith(name + ".")


def _check_names(model: nn.Module, sites: Sequence[Site], names: Iterable[str]) -> None:
    allowed = {site.name for site in sites} | {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name in names:
        if name not in allowed:
            raise ValueError(f"There is no module or site {name!r} in this model.{suggest(name, allowed - {''})}")


def _join(module_name: str, attribute: str) -> str:
    return f"{module_name}.{attribute}" if module_name else attribute
