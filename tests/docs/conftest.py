"""Examples register routers of their own; what they register must not reach other tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moekit.layers.routing import ROUTERS


@pytest.fixture(autouse=True)
def _same_routers_afterwards() -> Iterator[None]:
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)
