"""The large model, which most plans are about."""

import pytest

from ernie_train.model import Ernie4_5_MoeConfig


@pytest.fixture(scope="module")
def large() -> Ernie4_5_MoeConfig:
    return Ernie4_5_MoeConfig.preset("21b-a3b")
