"""Proof that a cut is right: the cut network equals the network whose dropped channels are not read.

A copy of the model in float64 gets random weights, biases and running statistics, so that every path is alive and no
shift is zero. For a random choice of channels two networks are made from it: in one, the consumers' columns that read
the dropped channels are zero; in the other they are cut out together with everything that makes them. On random
inputs all outputs must agree. A wrong index map anywhere makes them differ by about as much as the mask itself does,
so the difference is held against both the outputs and the effect of the mask (1e-6 of each); a mask without
effect proves nothing and counts as failure.

Memory: one float64 copy of the model; both networks are made from it in turn, and it is put back after each.
Cost: two forward passes a group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .channels import ChannelGroup
from .surgery import Surgery

Inputs = tuple[object, ...] | dict[str, object]
Choice = tuple[ChannelGroup, Sequence[int]]

_TOLERANCE = 1e-6
_VISIBLE = 1e-8
_SMALLER = ((2, 32), (2, 64), (1, None))  # samples, image size
_DRAWS = 4
INVISIBLE = "cutting has no visible effect on the outputs, so it cannot be proved"


def call(model: nn.Module, inputs: Inputs) -> object:
    """Return what a model returns for positional inputs (a tuple) or keyword inputs (a dictionary)."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def double_copy(model: nn.Module) -> nn.Module:
    """Copy a model to float64 in eval mode, every floating parameter requiring gradients.

    Args:
        model: Any module; not changed.

    Returns:
        A model that shares nothing with it.

    Raises:
        ValueError: if the model cannot be copied.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses tensors inside a graph
    try:
        double = copy.deepcopy(model, memo).double().eval()
    except Exception as error:
        raise ValueError(
            f"Channel groups are proved on a copy of the model, and copy.deepcopy of this {type(model).__name__} "
            f"failed ({error}). Make it copyable, or compress without channel groups."
        ) from error
    for parameter in double.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return double


def randomize_(model: nn.Module, generator: torch.Generator, *, gain: float) -> None:
    """Give a copy random weights with live paths: no zero biases, no zero or constant scales, no trivial statistics.

    Args:
        model: Changed in place.
        generator: On the CPU.
        gain: Scale of matrices; sqrt(2) keeps the size of activations through ReLUs.
    """

    def draw(tensor: Tensor, scale: float, shift: float = 0.0) -> None:
        values = tensor if tensor.device.type == "cpu" else torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.copy_(values.normal_(shift, scale, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.is_floating_point():
                    continue
                if isinstance(module, nn.Embedding):
                    draw(parameter, 1.0)
                elif "bias" in name:
                    draw(parameter, 0.3, 0.5)  # positive on average: most ReLUs are open
                elif sum(size > 1 for size in parameter.shape) < 2:
                    draw(parameter, 0.2, 1.0)
                else:
                    draw(parameter, gain / math.sqrt(max(1, parameter[0].numel())))
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                assert module.running_var is not None
                draw(module.running_mean, 0.3)
                module.running_var.copy_(
                    torch.rand(module.running_var.shape, generator=generator, dtype=torch.float64) + 0.5
                )


def random_like(
    inputs: Inputs, generator: torch.Generator, *, samples: int | None = None, image_size: int | None = None
) -> Inputs:
    """Draw inputs like the examples: floats are normal in float64, integers are the examples' own, shuffled.

    Args:
        inputs: Example inputs.
        generator: On the CPU.
        samples: Keep at most this many samples of every tensor of more than one dimension.
        image_size: Cut images (samples, channels, height, width) to at most this height and width.

    Returns:
        Inputs of the same structure.
    """

    def draw(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if samples is not None and leaf.dim() > 1:
            leaf = leaf[:samples]
        if image_size is not None and leaf.dim() == 4 and leaf.is_floating_point():
            leaf = leaf[..., :image_size, :image_size]
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        if leaf.dtype is torch.bool or leaf.is_complex():
            return leaf
        order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
        return leaf.flatten()[order].view(leaf.shape)

    drawn: Inputs = pytree.tree_map(draw, inputs)
    return drawn


@contextmanager
def masked(model: nn.Module, choices: Sequence[Choice]) -> Iterator[None]:
    """Make the consumers not read the dropped channels, as long as the context lasts.

    Args:
        model: Model with the groups; its tensors are replaced, not written to, and put back.
        choices: Groups with the units to keep.

    Yields:
        Nothing; the model is masked in place.
    """
    consumers = [(member, group.dropped(keep)) for group, keep in choices for member in group.consumers]
    with _put_back(model, {member.module_name for member, _ in consumers}):
        for member, dropped in consumers:
            module = model.get_submodule(member.module_name)
            for attribute, dim in member.axes.tensors:
                weight = module._parameters[attribute]
                assert weight is not None
                columns = member.indices[dropped].flatten().to(weight.device)
                _set(module, attribute, nn.Parameter(weight.detach().index_fill(dim, columns, 0.0)))
        yield


@contextmanager
def cut(model: nn.Module, choices: Sequence[Choice]) -> Iterator[None]:
    """Cut the dropped channels out, as long as the context lasts.

    Args:
        model: Model with the groups; its tensors are replaced, not written to, and put back.
        choices: Groups with the units to keep.

    Yields:
        Nothing; the model is cut in place.
    """
    surgery = Surgery.merge(group.cut(keep) for group, keep in choices)
    with _put_back(model, {name for group, _ in choices for name in group.modules}):
        surgery.apply_(model)
        yield


@contextmanager
def _put_back(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Put parameters, buffers and plain attributes of the named modules back at the end."""
    modules = [model.get_submodule(name) for name in names]
    kept = [
        (dict(vars(m)), dict(m._parameters), dict(m._buffers), list(vars(m).get("_flat_weights", ()))) for m in modules
    ]
    try:
        yield
    finally:
        for module, (attributes, parameters, buffers, flat) in zip(modules, kept):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            if flat:  # a recurrent module's own list of its parameters
                module.__dict__["_flat_weights"][:] = flat


def _set(module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
    """Replace a parameter; of a recurrent module also in its own list of them."""
    if isinstance(module, nn.RNNBase):
        setattr(module, attribute, parameter)
    else:
        module._parameters[attribute] = parameter


def random_keep(group: ChannelGroup, generator: torch.Generator, *, spread: float = 0.1) -> list[int]:
    """Return half of a group's units, give or take a share `spread`, ascending, at least one and not all."""
    share = 0.5 + spread * (2 * torch.rand((), generator=generator).item() - 1)
    number = min(max(1, round(share * group.size)), group.size - 1)
    return sorted(torch.randperm(group.size, generator=generator)[:number].tolist())


@dataclass(frozen=True)
class Bench:
    """A randomised float64 copy with inputs and its outputs, on which cuts are proved.

    Args:
        model: The copy.
        inputs: What it runs on.
        outputs: What it returns.
        inputs_seed: Seed that the inputs were drawn with.
    """

    model: nn.Module
    inputs: Inputs
    outputs: tuple[Tensor, ...]
    inputs_seed: int

    def failure(self, choices: Sequence[Choice], *, least: float = 1.0) -> str:
        """Compare masked and cut; return '' if the cut is proved, else what went wrong.

        Args:
            choices: Groups with the units to keep, all cut at once.
            least: Effect that the difference is held against where it is smaller than that of the mask.

        Returns:
            A reason for people.
        """
        after = self.cut_outputs(choices)
        if isinstance(after, str):
            return after
        with masked(self.model, choices):
            before = run(self.model, self.inputs)
        return self.verdict(before, after, least=least)

    def cut_outputs(self, choices: Sequence[Choice]) -> tuple[Tensor, ...] | str:
        """Return the outputs of the cut model, or why there are none."""
        for member in (member for group, _ in choices for member in group.members):
            sizes = [shape[dim] for (_, dim), shape in zip(member.axes.tensors, member.shapes)]
            if sizes and int(member.indices.max()) >= min(sizes):
                return f"its channels could not be followed into {member.module_name}"
        try:
            with cut(self.model, choices):
                return run(self.model, self.inputs)
        except Exception as error:
            return f"the cut model does not run ({type(error).__name__}: {_first_line(error)})"

    def verdict(self, before: Sequence[Tensor], after: Sequence[Tensor], *, least: float = 1.0) -> str:
        """Compare the outputs of the masked and of the cut model; return '' if they agree, else what went wrong.

        Args:
            before: Of the masked model.
            after: Of the cut one.
            least: Effect that the difference is held against where it is smaller than that of the mask.

        Returns:
            A reason for people.
        """
        if [t.shape for t in after] != [t.shape for t in before]:
            return "the cut changes the shape of an output"
        effect = _difference(before, self.outputs)
        difference = _difference(after, before)
        if not effect > _VISIBLE:
            return INVISIBLE
        if not difference <= _TOLERANCE * min(1.0, effect, least):
            return f"the cut model differs from the masked one by {difference:.1e} relative"
        return ""

    def prove(self, groups: Sequence[ChannelGroup], generator: torch.Generator) -> str:
        """Cut a random choice of channels of all groups at once; return '' if it is proved, else what went wrong.

        A choice whose channels happen to be dead (behind a closed ReLU) proves nothing: another one is drawn.

        Args:
            groups: Each of at least two units.
            generator: Draws the choices.

        Returns:
            A reason for people.
        """
        for _ in range(_DRAWS):
            reason = self.failure([(group, random_keep(group, generator)) for group in groups])
            if reason != INVISIBLE:
                break
        return reason

    def smaller(self, examples: Inputs) -> Bench:
        """Return a bench on the same weights with small images or one sample, or this one if the model refuses them.

        Args:
            examples: The user's example inputs.
        """
        for samples, size in _SMALLER:
            generator = torch.Generator().manual_seed(self.inputs_seed)
            inputs = random_like(examples, generator, samples=samples, image_size=size)
            try:
                outputs = run(self.model, inputs)
            except Exception:
                continue
            if not _dead(outputs):
                return replace(self, inputs=inputs, outputs=outputs)
        return self

    def single(self) -> Bench:
        """Return a bench in float32, for passes that need no precision; itself if outputs are not finite there."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        halved = {tensor: tensor.detach().float() for tensor in tensors if tensor.dtype is torch.float64}
        memo: dict[int, object] = {
            id(old): nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            for old, new in halved.items()
        }
        inputs: Inputs = pytree.tree_map(
            lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype is torch.float64 else leaf, self.inputs
        )
        try:
            model = copy.deepcopy(self.model, memo)
            outputs = run(model, inputs)
        except Exception:
            return self
        if not all(bool(output.isfinite().all()) for output in outputs):
            return self
        return Bench(model, inputs, outputs, self.inputs_seed)


def prepare(model: nn.Module, examples: Inputs, *, seed: int = 0) -> Bench:
    """Randomise a copy until its outputs are alive, and take these as the reference.

    Args:
        model: Float64 copy (`double_copy`); its tensors are overwritten.
        examples: The user's example inputs; two samples of them are used where the model allows it.
        seed: Of weights and inputs.

    Returns:
        A bench whose outputs are finite and not constant.

    Raises:
        ValueError: if the model does not run in float64, or its outputs are constant or not finite.
    """
    problem = ""
    for gain in (math.sqrt(2), 1.0, 0.5):
        randomize_(model, torch.Generator().manual_seed(seed), gain=gain)
        for samples in (2, None):
            inputs = random_like(examples, torch.Generator().manual_seed(seed), samples=samples)
            try:
                outputs = run(model, inputs)
            except Exception as error:
                problem = f"it does not run in float64 on inputs like the example ({_first_line(error)})"
                continue
            problem = _dead(outputs)
            if not problem:
                return Bench(model, inputs, outputs, seed)
    raise ValueError(f"No cut of this {type(model).__name__} can be proved: {problem}. Check example_inputs.")


def _dead(outputs: Sequence[Tensor]) -> str:
    """Return why outputs prove nothing, or ''."""
    if not all(bool(tensor.isfinite().all()) for tensor in outputs):
        return "its outputs are not finite with random weights"
    if not any(tensor.numel() and float(tensor.max() - tensor.min()) > 0 for tensor in outputs):
        return "its outputs are constant with random weights"
    return ""


def run(model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return all output tensors in float64, without gradients; the global random state is left alone."""
    with torch.no_grad(), torch.random.fork_rng(cuda_devices(model)):
        torch.manual_seed(0)
        leaves = pytree.tree_leaves(call(model, inputs))
    return tuple(leaf.to(torch.float64) for leaf in leaves if isinstance(leaf, Tensor))


def cuda_devices(model: nn.Module) -> list[int]:
    """Return the indices of the GPUs that hold parameters."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the largest difference of any output, relative to that output's largest entry; NaN counts as infinite."""
    worst = 0.0
    for x, y in zip(a, b):
        if x.numel():
            scale = float(torch.maximum(x.abs().max(), y.abs().max()))
            value = float((x - y).abs().max()) / scale if scale > 0 else 0.0
            worst = max(worst, math.inf if math.isnan(value) else value)
    return worst


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
