"""A method is one file with a class and one line, in this package or from outside."""

import importlib
import textwrap

import pytest

from hamlet import models
from hamlet.errors import HamletError
from hamlet.models import base

METHOD = """
    from hamlet.models import GeM, RetrievalModel, register

    @register(resnet18={"embedding_dim": 32})
    class Pooled(RetrievalModel):
        method = "pooled"

        def build(self, embedding_dim: int = 512, share: float = 0.5) -> None:
            import torch
            self.pool, self.head = GeM(), torch.nn.Linear(self.backbone.channels[-1], embedding_dim)

        def embed(self, maps):
            return self.head(self.pool(maps[-1])), {}
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """An installed package, as importlib.metadata sees one, that names modules in the group hamlet.models."""
    methods, registry = dict(base.METHODS), dict(base.REGISTRY)
    (tmp_path / "addon-1.dist-info").mkdir()
    (tmp_path / "addon-1.dist-info" / "METADATA").write_text("Name: addon\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def install(**modules: str) -> None:
        entries = "\n".join(f"{name} = {name}" for name in modules)
        (tmp_path / "addon-1.dist-info" / "entry_points.txt").write_text(f"[hamlet.models]\n{entries}\n")
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        importlib.invalidate_caches()
        models._find_methods.cache_clear()

    yield install
    for table, before in ((base.METHODS, methods), (base.REGISTRY, registry)):
        table.clear()
        table.update(before)
    (tmp_path / "addon-1.dist-info" / "entry_points.txt").unlink()
    models._find_methods.cache_clear()


def test_a_method_of_another_package_is_found_built_and_checked(outside, tmp_path, images):
    outside(addon_pooled=METHOD)
    assert models.list_methods()[-1] == "pooled" and "pooled_resnet18" in models.list_models()
    model = models.create_model("pooled_resnet18").eval()
    assert model(images).shape == (3, 32)
    with pytest.raises(HamletError, match="pooled: share=-1, expected a number of at least 0"):
        models.create_model("pooled", share=-1)
    with pytest.raises(HamletError, match=r"pooled has no option colour; valid: .*embedding_dim, share, text"):
        models.create_model("pooled", colour=1)
    models.save_model(model, tmp_path / "pooled.safetensors")
    assert models.load_model(tmp_path / "pooled.safetensors").method == "pooled"


def test_a_broken_package_takes_no_other_away(outside):
    outside(addon_broken="raise ImportError('a library is missing')", addon_whole=METHOD)
    with pytest.warns(UserWarning, match="'addon_broken' failed: a library is missing"):
        assert "pooled_resnet18" in models.list_models()


def test_a_name_that_is_taken_is_refused(outside):
    outside(addon_twin=METHOD.replace('"pooled"', '"gem"'))
    with pytest.warns(UserWarning, match="method 'gem' of addon_twin is taken by hamlet.models.gem"):
        assert models.list_methods()
    assert base.METHODS["gem"].__module__ == "hamlet.models.gem"
