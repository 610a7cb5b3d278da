"""No request keeps the event loop waiting: hostile bodies, large answers, a thousand models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, live_server
from live_server import weights as weights
from support.attack_driver import LONGEST_STALL_MS, Hostile, attack

KEY = "k" * 32
ADMIN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(weights, tmp_path_factory.mktemp("server"), env={"IMAGO_ADMIN_KEY": KEY}, watched=True) as server:
        yield server


def test_the_driver_measures_a_server(server: LiveServer) -> None:
    seen = attack(server, [Hostile("GET", "/models")] * 3 + [Hostile("GET", "/no-such-path")], clients=2)
    assert seen.statuses == {200: 3, 404: 1}
    assert seen.stall_ms < LONGEST_STALL_MS
    assert seen.peak_mb > 100
