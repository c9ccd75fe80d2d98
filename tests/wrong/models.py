"""Models that are none, cannot be changed, cannot be copied or return nothing."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

import eke

from .row import BUDGET, Row, Wrapped, batches, compress, net

LOAD = "A file or a dictionary of tensors does not say what the network computes."
ARCHITECTURE = "Build the network in code, load the tensors into it, and pass it."


@dataclass
class Plain:
    """Outputs of a model, unknown to torch."""

    logits: torch.Tensor


class Quiet(nn.Module):
    """A net that cuts its own gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    @torch.no_grad()
    def forward(self, x):
        return self.net(x)


class Inferring(Quiet):
    @torch.inference_mode()
    def forward(self, x):
        return self.net(x)


def script(_folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compress(torch.jit.script(net()))


def exported(_folder: Path):
    return compress(torch.export.export(net(), (batches()[0][0],)).module())


def program(_folder: Path):
    return compress(torch.export.export(net(), (batches()[0][0],)))


def quantized(_folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compress(torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8))


def pruned() -> nn.Module:
    model = net()
    for place in (0, 2):
        prune.l1_unstructured(model[place], "weight", 0.5)
    return model


def normalised(function) -> nn.Module:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in (0, 2):
            function(model[place])
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 4))


def holding(**attributes) -> nn.Module:
    model = net()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def spoiled(value: float) -> nn.Module:
    model = net()
    model[0].weight.data[1, 2] = value
    return model


def watched() -> nn.Module:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.numpy()))
    return model


COPY = "eke works on copies, so that your model stays as it is, and this cannot be copied."
RETURN = "Without a tensor there is nothing to compare the compressed model's answers with."
REMOVE = "The weight is computed from other tensors in every call, so it cannot be changed itself."

ROWS = [
    Row(
        "a path",
        lambda _: compress("model.pt"),
        TypeError,
        "eke needs a torch.nn.Module, got str 'model.pt': build the network, then "
        "model.load_state_dict(torch.load('model.pt', weights_only=True)), and pass model.",
        LOAD,
        ARCHITECTURE,
    ),
    Row(
        "a path as pathlib.Path",
        lambda _: compress(Path("a/model.pt")),
        TypeError,
        "got PosixPath 'a/model.pt': build the network",
        LOAD,
        ARCHITECTURE,
    ),
    Row(
        "a state_dict",
        lambda _: compress(net().state_dict()),
        TypeError,
        "got OrderedDict with the keys ['0.weight', '0.bias', '2.weight', '2.bias'], which holds tensors and no "
        "network: "
        "build it, then model.load_state_dict(state).",
        LOAD,
        ARCHITECTURE,
    ),
    Row(
        "a checkpoint",
        lambda _: compress({"model": net().state_dict(), "epoch": 3}),
        TypeError,
        "got dict with the keys ['model', 'epoch'], which holds tensors and no network: build it, then "
        "model.load_state_dict(checkpoint['model']).",
        LOAD,
        ARCHITECTURE,
    ),
    Row(
        "the class",
        lambda _: compress(nn.Linear),
        TypeError,
        "got type Linear: pass an instance, Linear(...).",
        "A class has no weights.",
        "Make an instance.",
    ),
    Row(
        "the function that builds the model",
        lambda _: compress(net),
        TypeError,
        "got function 'net': call it and pass the module that it returns.",
        "It was not called.",
        "Call it.",
    ),
    Row(
        "a tuple with the model in it",
        lambda _: compress((1, net())),
        TypeError,
        "got tuple: pass its item 1.",
        "Only the module is needed.",
        "Take it out of the tuple.",
    ),
    Row(
        "nothing",
        lambda _: eke.compress(None, batches(), budget=BUDGET),
        TypeError,
        "eke needs a torch.nn.Module, got NoneType: build the network and pass it.",
        "A function that builds the model may lack its `return`.",
        "Print what you pass.",
    ),
    Row(
        "compiled TorchScript",
        script,
        TypeError,
        "eke cannot change the layers of compiled TorchScript, got RecursiveScriptModule: pass the nn.Module that it "
        "was "
        "made from.",
        "Its graph is fixed.",
        "Compress first, then script or export the result.",
    ),
    Row(
        "an exported program",
        program,
        TypeError,
        "got ExportedProgram, a graph whose layers cannot be changed: pass the nn.Module that was exported.",
        "Its graph is fixed.",
        "Compress first, then export the result.",
    ),
    Row(
        "the module of an exported program",
        exported,
        ValueError,
        "matrices of GraphModule with 0 sites can be changed (skip=[]). Its graph has operations and no layers: pass "
        "the nn.Module that was exported.",
        "Its graph is fixed.",
        "Compress first, then export the result.",
    ),
    Row(
        "a quantized model",
        quantized,
        TypeError,
        "The model's state holds '0._packed_params.dtype', a dtype, where eke can store tensors only (0: Linear is "
        "already "
        "quantized): pass the model as it was before it was quantized or packed.",
        "What was rounded away cannot be recovered, and packed weights cannot be changed.",
        "Pass the float model; eke chooses the bits itself.",
    ),
    Row(
        "a model pruned with torch.nn.utils.prune",
        lambda _: compress(pruned()),
        ValueError,
        "There is nothing to compress: 0 channel groups and 0 matrices of Sequential with 0 sites can be changed "
        "(skip=[]). 0: weight is masked by torch.nn.utils.prune: call torch.nn.utils.prune.remove first to compress "
        "it; "
        "2: weight is masked",
        REMOVE,
        "`torch.nn.utils.prune.remove(module, 'weight')` makes the mask permanent.",
    ),
    Row(
        "layers with weight_norm",
        lambda _: compress(normalised(nn.utils.parametrizations.weight_norm)),
        ValueError,
        "0: weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first",
        REMOVE,
        "`remove_parametrizations(module, 'weight')` keeps the weight as it is now.",
    ),
    Row(
        "layers with the older weight_norm",
        lambda _: compress(normalised(nn.utils.weight_norm)),
        ValueError,
        "0: weight has weight_norm: call torch.nn.utils.remove_weight_norm first",
        REMOVE,
        "`torch.nn.utils.remove_weight_norm(module)`.",
    ),
    Row(
        "layers with the older spectral_norm",
        lambda _: compress(normalised(nn.utils.spectral_norm)),
        ValueError,
        "0: weight has spectral_norm: call torch.nn.utils.remove_spectral_norm first",
        REMOVE,
        "`torch.nn.utils.remove_spectral_norm(module)`.",
    ),
    Row(
        "a model without parameters",
        lambda _: compress(nn.Sequential(nn.Flatten(), nn.ReLU())),
        ValueError,
        "There is nothing to compress: ... It needs linear layers or convolutions.",
        "There is no matrix in it.",
        "Pass the model that does the work.",
    ),
    Row(
        "a lazy module that never ran",
        lambda _: compress(nn.Sequential(nn.LazyLinear(3))),
        ValueError,
        "Parameter '0.weight' is not initialised: run a batch through the model, and train it.",
        "Its shapes are not known yet.",
        "Run one batch through it, then load its weights.",
    ),
    Row(
        "a model on the meta device",
        lambda _: compress(on_meta()),
        ValueError,
        "Parameter '0.weight' is on the meta device and has no values: build the model on a real device and load its "
        "weights.",
        "It has shapes only.",
        "Leave `torch.device('meta')` out, or use `to_empty` and load the weights.",
    ),
    Row(
        "a model in float16",
        lambda _: compress(net().half(), [(x.half(), y) for x, y in batches()]),
        ValueError,
        "Parameter '0.weight' is in float16, too narrow for second moments and recovery: pass model.float() or "
        "model.bfloat16(), and call .half() on the result.",
        "Squares overflow at 65 504, and optimizers underflow.",
        "`model.float()`, compress, `.half()` on the result.",
    ),
    Row(
        "weights that are NaN",
        lambda _: compress(spoiled(float("nan"))),
        ValueError,
        "Parameter '0.weight' holds 1 values that are not finite: the model is broken before compression; load a good "
        "checkpoint.",
        "Training diverged, or a file is damaged.",
        "Go back to a good checkpoint.",
    ),
    Row(
        "a model that holds a lock",
        lambda _: compress(holding(lock=threading.Lock())),
        ValueError,
        "The model cannot be copied, ... attribute 'lock' is lock (cannot pickle '_thread.lock' object). Keep locks, "
        "files and generators outside the module, or give it a __deepcopy__.",
        COPY,
        "Keep such things elsewhere.",
    ),
    Row(
        "a model that holds a generator",
        lambda _: compress(holding(source=(i for i in range(3)))),
        ValueError,
        "attribute 'source' is generator",
        COPY,
        "Keep such things elsewhere.",
    ),
    Row(
        "a model that returns None",
        lambda _: compress(Wrapped(lambda inner, x: None)),
        TypeError,
        "The model returned NoneType on calibration batch 0, in which no tensor can be seen: return a tensor, or a "
        "tuple "
        "or dictionary of tensors.",
        "Its `forward` may lack a `return`.",
        RETURN,
    ),
    Row(
        "a model that returns text",
        lambda _: compress(Wrapped(lambda inner, x: "cat")),
        TypeError,
        "The model returned str on calibration batch 0",
        RETURN,
        "Return the logits and decode them outside.",
    ),
    Row(
        "a model that returns numpy arrays",
        lambda _: compress(Wrapped(lambda inner, x: inner(x).detach().numpy())),
        TypeError,
        "The model returned ndarray on calibration batch 0",
        RETURN,
        "Return tensors.",
    ),
    Row(
        "a model that returns a dataclass",
        lambda _: compress(Wrapped(lambda inner, x: Plain(inner(x)))),
        TypeError,
        "The model returned Plain on calibration batch 0, in which no tensor can be seen: make its fields known once, "
        "torch.export.register_dataclass(Plain).",
        "torch does not look into classes that it does not know.",
        "Register it once; then it works.",
    ),
    Row(
        "torch.no_grad() in forward",
        lambda _: compress(Quiet()),
        ValueError,
        "The output of Quiet on calibration batch 0, float32 (32, 3), has no gradient: take torch.no_grad(), "
        "inference_mode() and detach() out of its forward.",
        "What a change costs is predicted from gradients.",
        "Put them around the call, not inside the model.",
    ),
    Row(
        "torch.inference_mode() in forward",
        lambda _: compress(Inferring()),
        ValueError,
        "The output of Inferring on calibration batch 0, float32 (32, 3), has no gradient",
        "As above.",
        "As above.",
    ),
    Row(
        "a hook that calls .numpy()",
        lambda _: compress(watched()),
        ValueError,
        "The model does not run on calibration batch 0 with gradients, ... Can't call numpy() on Tensor that requires "
        "grad.",
        "Your hooks run in eke's copies too.",
        "Use `.detach().numpy()`, or remove the hook.",
    ),
]
