"""The network of one server or several that is simulated."""

from __future__ import annotations

import pytest

from tests.teegpu.conftest import Harness
from tests.teegpu.remote.network import World


@pytest.fixture
def world(runner: Harness) -> World:
    return World(runner)
