"""Models with paths to insert attention after, for every file of this folder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from existing_models import MODELS


@pytest.fixture(params=MODELS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str], Tensor]:
    make, after, shape = MODELS[request.param]
    return make(), after, torch.randn(2, *shape)
