"""Model files: what travels in them, what is refused, and the road to and from a hub folder."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hamlet import __version__
from hamlet.errors import HamletError
from hamlet.models import create_model, load_model, save_model

SMALL = {"width": 8, "embedding_dim": 16}
CARD = {
    "image_size": 96,
    "classes": ["apple", "pear"],
    "teacher": "sentence",
    "data": {"name": "grocery", "images": 12},
    "metrics": {"mAP": 0.5},
    "licence": "mit",
    "limits": "two classes of fruit",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("mace", text="proxies", **SMALL).eval()


@pytest.fixture
def path(model, tmp_path):
    save_model(model, tmp_path / "model.safetensors", card=CARD)
    return tmp_path / "model.safetensors"


def altered(path, change) -> None:
    """Rewrite a model's file with its tensors changed."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def test_all_that_is_needed_to_use_it_travels_in_the_file(model, path, images):
    again = load_model(path)
    assert again.card == CARD and (again.mean, again.std) == (model.mean, model.std)
    assert again.initial_weights == model.initial_weights
    assert torch.equal(again.text_tower.weight, model.text_tower.weight) and "text_mean" in again.state_dict()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    save_model(again, path, card={"metrics": {"mAP": 0.6}})  # a card is added to, not lost
    assert load_model(path).card == CARD | {"metrics": {"mAP": 0.6}}
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["hamlet"])["version"] == __version__


def test_a_compiled_model_is_the_model(model, path, images):
    compiled = torch.compile(model)  # never run: compiling it would take a minute
    save_model(compiled, path)
    with torch.no_grad():
        assert torch.equal(load_model(path)(images), model(images))

    def prefix(tensors):  # as a state_dict of the wrapper writes them
        for name in list(tensors):
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    altered(path, prefix)
    with torch.no_grad():
        assert torch.equal(load_model(path)(images), model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.0.weight"), "lacks the tensor head.0.weight"),
        (lambda t: t.update({"head.0.weight": torch.zeros(2, 2)}), r"has shape \(2, 2\), expected \(16, 1024\)"),
        (lambda t: t.update({"head.0.weight": torch.zeros(16, 1024, dtype=torch.int64)}), "holds torch.int64"),
        (lambda t: t["head.0.weight"].fill_(float("nan")), "head.0.weight holds values that are not finite"),
    ],
    ids=["missing", "shape", "integers", "nan"],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(path, change, message):
    altered(path, change)
    with pytest.raises(HamletError, match=message) as refused:
        load_model(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_recipes_that_cannot_be_followed_are_refused(path):
    def recipe(**changes):
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["hamlet"])
        record = {k: v for k, v in (record | changes).items() if v is not None}
        save_file(load_file(path), path, metadata={"hamlet": json.dumps(record)})

    for changes, message in (
        ({"method": "magic"}, "unknown method 'magic'; known: hamlet, "),
        ({"method": "mace", "backbone": "resnet1"}, "timm has no model 'resnet1'"),
        ({"backbone": "resnet18", "options": {"width": 0}}, "width=0, expected"),
        ({"options": None}, "recipe that cannot be followed"),
    ):
        recipe(**changes)
        with pytest.raises(HamletError, match=message):
            load_model(path)
    save_file(load_file(path), path)
    with pytest.raises(HamletError, match="holds no recipe of a hamlet model"):
        load_model(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10\0\0\0\0\0\0\0garbage"], ids=["empty", "json", "garbage"])
def test_what_is_no_model_file_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    for place in (tmp_path / "x.safetensors", tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(HamletError, match=str(place)):
            load_model(place)


def test_a_card_that_json_cannot_hold_is_refused(model, tmp_path):
    with pytest.raises(HamletError, match=r"the card of .* holds what JSON cannot"):
        save_model(model, tmp_path / "model.safetensors", card={"metrics": {"mAP": float("nan")}})
    assert list(tmp_path.iterdir()) == []


def test_to_a_hub_folder_and_back(path, tmp_path, images):
    model = load_model(path)
    model.save_pretrained(tmp_path / "hub")
    written = (tmp_path / "hub" / "README.md").read_text()
    for part in (
        "license: mit",
        "mAP: 0.5",
        "name: grocery",
        "two classes of fruit",
        "evaluation size (px) | 96 |",
        "resnet18",
    ):
        assert part in written
    again = type(model).from_pretrained(tmp_path / "hub")
    assert again.card == model.card and not again.training
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    bare = create_model("gem")
    bare.save_pretrained(tmp_path / "bare")
    assert "not stated by the maker" in (tmp_path / "bare" / "README.md").read_text()


def test_push_to_hub_sends_weights_and_card(path, monkeypatch):
    sent = {}

    class Hub:
        def __init__(self, **options): ...

        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            sent[repo_id] = sorted(p.name for p in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    load_model(path).push_to_hub("somebody/fruit")
    assert sent == {"somebody/fruit": ["README.md", "config.json", "model.safetensors"]}
