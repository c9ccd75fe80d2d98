"""The models of the zoo: every torchvision classifier, and one or a few of every family in timm, by name.

They are built as `eke inspect` builds them, with random weights of a fixed seed; images are made as small as the model
allows, since structure is the question and not speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SMALL = (64, 96, 128)
"""Image sizes that are tried before the model's own."""

TIMM = """
test_convnext test_vit test_nfnet test_mambaout starnet_s050 test_coatnet test_vit_relpos test_vit3 dla46x_c
test_maxvit mobilevit_xxs dla46_c dla60x_c edgenext_xx_small mobilenetv3_small_050 lcnet_035 ese_vovnet19b_slim_dw
tinynet_e tf_mobilenetv3_small_minimal_100 convnext_zepto_rms repghostnet_050 edgenext_x_small efficientvit_m0
ghostnet_050 regnetx_002 cspnext_tiny iformer_t lcnet_100 xcit_nano_12_p8_224 regnety_002 ese_vovnet19b_slim
cs3darknet_focus_s cs3darknet_s ghostnetv3_050 efficientvit_b0 swiftformer_xs mobilenetv2_100 efficientformerv2_s0
pvt_v2_b0 convnext_atto convnextv2_atto mobilenetv4_conv_small semnasnet_100 fasternet_t0 fastvit_t8 lcnetv2_small
mixnet_s inception_next_atto mobilenetv1_100 regnety_004 mnasnet_100 spnasnet_100 mobilenet_edgetpu_v2_xs rexnet_100
pit_ti_224 rexnetr_100 hardcorenas_a efficientnet_b0 tf_efficientnet_b0 mobileone_s0 repvit_m1
vit_tiny_patch16_dinov3_qkvb coat_tiny mobilenetv3_large_100 eva02_tiny_patch14_224 fbnetc_100 mobilevit_s convit_tiny
vit_tiny_patch16_224 deit_tiny_patch16_224 coat_lite_tiny gmlp_ti16_224 deit_tiny_distilled_patch16_224 hgnetv2_b0
ghostnetv2_100 tinynet_a shvit_s1 vit_tiny_r_s16_p8_224 cpubone_nano ese_vovnet19b_dw efficientvim_m1
xcit_tiny_12_p16_224 crossvit_tiny_240 tf_efficientnetv2_b0 fastvit_t12 levit_128s levit_conv_128s densenet121
densenetblur121d gernet_s fbnetv3_b nf_regnet_b0 repvgg_a0 dpn48b regnetx_016 fastvit_s12 regnetz_b16 visformer_tiny
bat_resnext26ts lambda_resnet26t csatv2 resnetv2_18 resnetv2_18d resnet18d legacy_seresnet18 seresnet18
poolformerv2_s12 poolformer_s12 cait_xxs24_224 skresnet18 gcvit_xxtiny tiny_vit_5m_224 efficientformer_l1 halonet26t
botnet26t_256 dpn68 dpn68b gmixer_12_224 hrnet_w18_small efficientnet_cc_b0_4e vit_wee_patch16_reg1_gap_256
efficientnetv2_rw_t lowformer_b0 coatnext_nano_rw_224 hgnet_tiny coatnet_nano_rw_224 resmlp_12_224 resnet26t
ecaresnet26t legacy_seresnext26_32x4d seresnext26d_32x4d nest_tiny resnest26d mixer_s16_224 mixer_s32_224 gcresnet33ts
dla60_res2net convmixer_768_32 vit_small_patch16_dinov3 vit_relpos_small_patch16_224 vit_small_patch14_dinov2
deit3_small_patch16_224 flexivit_small vitamin_small_224 vovnet39a eca_vovnet39b legacy_xception vit_small_patch32_224
tnt_s_legacy_patch16_224 inception_v3 rdnet_tiny twins_svt_small eca_nfnet_l0 mvitv2_tiny resnext50_32x4d
res2net50_14w_8s resnetv2_50 resnetv2_50x1_bit resnet50 caformer_s18 volo_d1_224 convformer_s18 xception41p xception41
cspdarknet53 sequencer2d_s hiera_tiny_224 swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_cr_tiny_224
swinv2_cr_tiny_ns_224 swinv2_tiny_window16_256 davit_tiny focalnet_tiny_srf selecsls42 selecsls60 maxvit_tiny_tf_224
tresnet_m nextvit_small hieradet_small nfnet_l0 darknet53 inception_v4 cs3edgenet_x inception_resnet_v2 dm_nfnet_f0
pnasnet5large samvit_base_patch16_224 beit_base_patch16_224
"""

HEAVY = ("regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_32gf", "efficientnet_v2_l", "convnext_large")
"""Those that come last."""

SMOKE = ("torchvision:squeezenet1_1", "timm:test_vit", "timm:dla46_c", "timm:mobilenetv3_small_050")
"""Four that take seconds."""

NIGHTLY = (
    *SMOKE, "torchvision:resnet18", "torchvision:densenet121", "torchvision:vit_b_32", "torchvision:googlenet",
    "timm:ghostnet_050", "timm:levit_128s", "timm:mixer_s32_224", "timm:edgenext_xx_small",
)  # fmt: skip


def names() -> list[str]:
    """Return all names, torchvision first and the largest last."""
    from torchvision import models

    found = [
        *(f"torchvision:{name}" for name in models.list_models(module=models)),
        *(f"timm:{name}" for name in TIMM.split()),
    ]
    return sorted(found, key=lambda name: name.partition(":")[2] in HEAVY)


def family(name: str) -> str:
    """Return the file of the library that a model comes from, such as "timm: convnext"; the library for others."""
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        return f"timm: {timm.model_entrypoint(model).__module__.rpartition('.')[2]}"
    if library == "torchvision":
        from torchvision import models

        return f"torchvision: {models.get_model_builder(model).__module__.rpartition('.')[2]}"
    return library


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Build a model as the command line does, and find the smallest image that it takes.

    Args:
        name: See `names`.

    Returns:
        The model, and its inputs: an image of a size of `SMALL`, or the one that the command line would choose. A model
        of a fixed size is built for a small one where it can be.
    """
    from eke.cli.examples import example_inputs
    from eke.cli.load import load_model
    from eke.cli.recipe import Recipe

    model = load_model(Recipe(model=f"{name}:none"))
    own = example_inputs(model)
    assert isinstance(own, tuple)
    for image in _smaller(own[0]):
        if _runs(model, image):
            return model, (image,)
    for image in _smaller(own[0]):
        if (other := _resized(name, image.shape[-1])) is not None and _runs(other, image):
            return other, (image,)
    return model, own


def _runs(model: nn.Module, image: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            return bool(torch.isfinite(model(image)).all())
    except Exception:
        return False


def _resized(name: str, size: int) -> nn.Module | None:
    """Return a model that is built for images of a size, or None."""
    import timm
    from torchvision import models

    library, _, name = name.partition(":")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            if library == "timm":
                return timm.create_model(name, img_size=size).eval()
            sized: dict[str, Any] = {"input_size": (size, size)} if "maxvit" in name else {"image_size": size}
            return models.get_model(name, weights=None, **sized).eval()
        except Exception:
            return None


def _smaller(image: torch.Tensor) -> Iterator[torch.Tensor]:
    for size in SMALL:
        if size < image.shape[-1]:
            yield image[..., :size, :size].clone()
