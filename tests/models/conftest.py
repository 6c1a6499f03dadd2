"""Models are built once a session: tests that change one copy it first."""

import copy
from collections.abc import Callable

import pytest
import torch

from hamlet.models import RetrievalModel, create_model


@pytest.fixture(scope="session")
def evaluated() -> Callable[[str], RetrievalModel]:
    """``evaluated(name)``: that configuration, seeded, in evaluation mode. Read-only."""
    built: dict[str, RetrievalModel] = {}

    def get(name: str) -> RetrievalModel:
        if name not in built:
            torch.manual_seed(0)
            built[name] = create_model(name).eval()
        return built[name]

    return get


@pytest.fixture
def fresh(evaluated) -> Callable[[str], RetrievalModel]:
    """``fresh(name)``: a copy that the test may change."""
    return lambda name: copy.deepcopy(evaluated(name))


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Three images of 64 px, with structure at several scales rather than white noise alone."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(3, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic")
    return smooth + 0.3 * torch.randn(3, 3, 64, 64, generator=generator)
