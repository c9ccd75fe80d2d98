"""Rows of the part `compress`: the whole job on one model, and every channel group cut on its real weights.

Labels are the model's own answers to random inputs, so that nothing has to be fetched or trained; there is no recovery,
for what is asked is whether the result is what it claims, not how good it is. A row is good if the result, saved and
loaded into a freshly built model, answers as the result in memory does and costs what it says, or if eke refused and
named a module; and if no group's cut differs from its mask by more than 1e-6.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import zoo_models
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from zoo_nets import NETS, Net

import eke
from eke.compression.plan import InfeasibleError
from eke.compression.solver import quick
from eke.compression.task import logits_of

TOLERANCE = 1e-6
SHARES = (0.5, 0.9)
"""Budgets: shares of the bytes; the second is tried where the first cannot be kept."""
BATCHES, SAMPLES = 3, 8

IMAGES = (
    "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5",
    "torchvision:mnasnet0_5", "torchvision:resnet18", "timm:test_vit", "timm:test_convnext", "timm:test_nfnet",
    "timm:test_mambaout", "timm:test_coatnet", "timm:test_maxvit", "timm:dla46_c", "timm:ghostnet_050",
    "timm:mobilenetv3_small_050", "timm:edgenext_xx_small", "timm:starnet_s050", "timm:lcnet_035",
    "timm:repghostnet_050", "timm:efficientvit_m0", "timm:mobilevit_xxs", "timm:regnetx_002", "timm:tinynet_e",
    "timm:ese_vovnet19b_slim_dw", "timm:cs3darknet_focus_s", "timm:levit_128s", "timm:fasternet_t0", "timm:pvt_v2_b0",
    "timm:hardcorenas_a",
)  # fmt: skip

SMOKE = ("net:gru", "net:unet", "net:rnet", "net:bert", "timm:test_convnext")
NIGHTLY = (
    *SMOKE, "net:lstm_two_ways", "net:encoder_decoder", "net:dictionaries", "net:tied", "net:spectral_norm",
    "net:gpt2", "net:llama",
)  # fmt: skip


def names() -> list[str]:
    """Return all names: the small nets, then networks for images."""
    return [*(f"net:{name}" for name in NETS), *IMAGES]


def good(row: dict[str, Any]) -> bool:
    """Return whether a row is as it should be: verified, or refused with a module's name; and no cut was wrong."""
    answered = row.get("answer") == "verified" or (row.get("answer") == "refused" and bool(row["names"]))
    return bool(row["ok"]) and answered and not row["wrong"]


def _net(name: str) -> Net:
    library, _, rest = name.partition(":")
    if library == "net":
        return NETS[rest]
    _, (image,) = zoo_models.build(name)
    shape = image.shape[1:]
    return Net(
        lambda: zoo_models.build(name)[0], lambda count, generator: torch.randn(count, *shape, generator=generator)
    )


def _built(net: Net) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return net.build().eval()


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def row(name: str, stages: Any, model_of: dict[str, nn.Module]) -> dict[str, Any]:
    """Compress one model and check every group of it.

    Args:
        name: See `names`.
        stages: Told what is being done.
        model_of: Gets the model under "model".

    Returns:
        Plain values; "answer" is "verified", "refused" or what went wrong.
    """
    stages.begin("build")
    net = _net(name)
    model = model_of["model"] = _built(net)
    logits = net.logits or logits_of
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(BATCHES):
        inputs = net.inputs(SAMPLES, generator)
        with torch.no_grad():
            batches.append((inputs, logits(_call(model, inputs)).argmax(1)))

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(logits(_call(network, batch[0])), batch[1])

    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    stages.begin("groups")
    try:
        found |= groups_row(model, batches[0][0])
    except ValueError as error:
        found |= {"groups": 0, "channels": 0, "worst": 0.0, "wrong": [], "groups_said": " ".join(str(error).split())}
    stages.begin("compress")
    for share in SHARES:
        try:
            result = eke.compress(
                model, batches, loss=loss, budget=eke.Budget(size=f"{share}x"), seconds=0.05, threads=1,
                recovery=eke.compression.Recovery(steps=0), solver=quick,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            said = " ".join(str(error).split())
            found |= {"answer": "refused", "said": said[:600], "names": _named(model, said), "share": share}
            if not isinstance(error, InfeasibleError):
                return found
            found["tight"] = said[:300]
        else:
            stages.begin("verify")
            return found | {"share": share} | verified(net, result, batches, share=share)
    return found


def _named(model: nn.Module, said: str) -> str:
    """Return the longest name of a module, parameter or class of the model that a message holds."""
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    names |= {type(module).__name__ for module in model.modules()}
    found = [n for n in names if n and not n.isdigit() and re.search(rf"(?<![\w.]){re.escape(n)}(?![\w])", said)]
    return max(found, key=len, default="")


def groups_row(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Cut every group of a model's real weights in float64 and compare with its mask.

    Args:
        model: Not changed.
        inputs: One batch.

    Returns:
        Numbers of groups and channels, the worst difference, and the groups that differ.
    """
    from eke.sites import channel_groups
    from eke.sites.proof import cut, double_copy, masked, random_keep, run

    groups = channel_groups(model, inputs)
    double = double_copy(model)
    arguments = inputs if isinstance(inputs, (tuple, dict)) else (inputs,)
    given = _doubled(arguments)
    generator = torch.Generator().manual_seed(0)
    worst, wrong = 0.0, []
    choices = [[(group, random_keep(group, generator))] for group in groups]
    if len(groups) > 1:
        choices.append([choice for one in choices for choice in one])
    for chosen in choices:
        with masked(double, chosen):
            before = run(double, given)
        with cut(double, chosen):
            after = run(double, given)
        scale = max(float(value.abs().max()) for value in before if value.numel())
        same = [value.shape for value in before] == [value.shape for value in after]
        difference = max((float((x - y).abs().max()) / scale for x, y in zip(before, after)), default=0.0)
        worst = max(worst, difference if same else float("inf"))
        if not same or not difference <= TOLERANCE:
            wrong.append(chosen[0][0].name if len(chosen) == 1 else "all together")
    return {
        "groups": len(groups), "channels": sum(group.size for group in groups), "worst": worst, "wrong": wrong,
    }  # fmt: skip


def _doubled(inputs: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def verified(net: Net, result: Any, batches: list[Any], *, share: float) -> dict[str, Any]:
    """Save a result, load it into a freshly built model, and compare.

    Args:
        net: Builds the model.
        result: Of `eke.compress`.
        batches: With inputs.
        share: Of the bytes, the budget.

    Returns:
        Costs before and after, and the answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "result"
        result.save(place)
        loaded = eke.load(place, _built(net)).eval()
        stored = (place / "model.safetensors").stat().st_size
    worst = 0.0
    with torch.no_grad():
        for inputs, _ in batches:
            pairs = zip(tree_leaves(_call(result.model, inputs)), tree_leaves(_call(loaded, inputs)))
            for one, other in pairs:
                if isinstance(one, Tensor) and one.is_floating_point():
                    scale = max(1e-12, float(one.abs().max()))
                    worst = max(worst, float((one - other).abs().max()) / scale)
    document = result.document()
    before, after = document.before, document.after
    claimed = after.bytes == stored and worst <= TOLERANCE and after.bytes <= share * before.bytes
    answer = "verified" if claimed else "not what it claims"
    return {
        "answer": answer, "reloaded_difference": worst, "bytes": [before.bytes, after.bytes, stored],
        "flops": [before.flops, after.flops],
        "parameters_after": after.parameters,
    }  # fmt: skip
