"""Thirty backbones of more than ten families, and what fixed-size and unusable ones say."""

import pytest
import torch

from hamlet.errors import HamletError
from hamlet.models import Backbone, create_model
from hamlet.models.backbone import STRIDES

# family: small variants of it
FAMILIES = {
    "ResNet": ["resnet18", "resnetv2_18", "seresnet18"],
    "MobileNet": ["mobilenetv3_large_100", "mobilenetv3_small_050", "mobilenetv4_conv_small_035"],
    "EfficientNet": ["tf_efficientnet_lite0", "efficientnetv2_rw_t", "mnasnet_050"],
    "RegNet": ["regnetx_002", "regnety_002"],
    "DenseNet": ["densenet121"],
    "GhostNet": ["ghostnet_050"],
    "ConvNeXt": ["convnext_atto", "convnextv2_atto", "inception_next_atto"],
    "MetaFormer": ["poolformer_s12"],
    "light convolutional": ["repvit_m0_9", "fastvit_t8", "starnet_s1", "lcnet_050"],
    "convolution and attention": ["edgenext_xx_small", "mobilevit_xxs", "tiny_vit_5m_224"],
    "pyramid transformer": ["pvt_v2_b0", "mvitv2_tiny", "twins_svt_small"],
    "Swin": ["swin_tiny_patch4_window7_224"],
    "ViT": ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224"],
    "DINOv2": ["vit_small_patch14_dinov2"],
    "XCiT": ["xcit_nano_12_p16_224"],
}
FIVE = ("hamlet", "sparse", "mace", "spca", "dscf")
SMALL = {
    "hamlet": {"width": 16, "head_width": 32, "depth": 1},
    "sparse": {"width": 16, "codes": 64, "k": 4},
    "mace": {"width": 8},
    "spca": {"width": 16, "hidden": 16},
    "dscf": {"width": 8},
}
FIXED = ["maxvit_tiny_tf_224", "efficientformer_l1", "mixer_s16_224"]


@pytest.fixture(scope="module")
def built():
    """One backbone at a time, built once for its tests."""
    last: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in last:
            last.clear()
            last[name] = Backbone(name).eval()
        return last[name]

    return get


def head(method: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The method on a backbone that is built already: only its construction is saved."""
    monkeypatch.setattr("hamlet.models.base.Backbone", lambda name, pretrained: backbone)
    return create_model(method, backbone=backbone.name, **SMALL[method]).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for family in FAMILIES.values() for name in family])
def test_all_five_methods_on_it_at_96_and_224_px(name, built, monkeypatch):
    backbone = built(name)
    for size in (96, 224):
        images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            maps = backbone(images)
            assert [m.shape[1] for m in maps] == backbone.channels
            assert [tuple(m.shape[2:]) for m in maps] == [(-(-size // s),) * 2 for s in STRIDES]
            for method in FIVE:
                out, _ = head(method, backbone, monkeypatch).embed(maps)
                assert len(out) == 1 and out.isfinite().all(), method


@pytest.mark.parametrize("name", FIXED)
def test_a_network_of_one_size_says_so_by_name(name):
    backbone = Backbone(name).eval()
    with torch.no_grad():
        assert len(backbone(torch.zeros(1, 3, 224, 224))) == 4
        with pytest.raises(HamletError, match=rf"backbone {name} does not take images of 80 x 80 px.*224 x 224 px"):
            backbone(torch.zeros(1, 3, 80, 80))


def test_an_error_at_the_networks_own_size_is_not_explained_away(monkeypatch):
    backbone = Backbone("resnet18")
    monkeypatch.setattr(backbone.body, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        backbone(torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet1", "timm has no model 'resnet1'; near it: .*resnet"),
        ("swin_tiny", "timm has no model 'swin_tiny'; near it: .*swin_tiny_patch4_window7_224"),
        (7, "timm has no model '7'"),
        ("levit_128s", r"levit_128s has maps at strides \[16, 32, 64\]"),
    ],
)
def test_an_unusable_backbone_is_refused(name, message):
    with pytest.raises(HamletError, match=message):
        create_model("gem", backbone=name)


@pytest.mark.parametrize("method", FIVE)
def test_a_plain_vision_transformer_trains(method, images):
    model = create_model(method, backbone="vit_tiny_patch16_224", **SMALL[method]).train()
    out, losses = model(images, auxiliary=True)
    (out.square() @ torch.randn(out.shape[1], 1)).sum().add(sum(losses.values())).backward()
    assert model.backbone.body.model.patch_embed.proj.weight.grad.any()
