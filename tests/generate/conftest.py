"""Fixtures of tests of engines that are servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ernie_train.model import Ernie4_5_MoeForCausalLM
from tests.generate.engine_stand_in import StandIn, serving
from tests.small_models import make_model


@pytest.fixture(scope="module")
def model() -> Ernie4_5_MoeForCausalLM:
    return make_model()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving(StandIn()) as state:
        yield state
