"""Slow clients and a flood, in seconds: what `benchmarks/abuse.py` measures in minutes. The bounds leave room for a busy machine."""

from collections.abc import Iterator

import pytest

from benchmarks import abuse, rig

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rig.Server]:
    root = tmp_path_factory.mktemp("server")
    rig.publish_random(root / "weights", [abuse.HEAVY, abuse.LIGHT])
    with abuse.server_of(root) as server:
        yield server


@pytest.mark.abuse("H9")
def test_slow_clients_harm_nobody(server: rig.Server) -> None:
    figures = abuse.measure_slow(server, rounds=1, seconds=2, clients=300)
    assert set(figures["health"]) == {"200"}
    assert figures["ratio"]["median"] < 4  # within 1.2 where nothing else runs


@pytest.mark.abuse("H23")
def test_a_flood_is_refused_and_the_accepted_are_served(server: rig.Server) -> None:
    figures = abuse.measure_flood(server, seconds=10, calibrate_s=1)
    assert set(figures["statuses"]) == {"200", "429"}
    assert figures["statuses"]["429"] > 3 * figures["statuses"]["200"]
    assert figures["accepted_ms"]["max"] < figures["deadline_ms"]
    assert figures["refused_ms"]["p50"] < 50
    assert 0.5 < figures["retry_after"]["median"] < 2
    assert figures["memory_mb"]["ratio"] < 1.25  # within 1.1 over a minute, where nothing else runs
    assert figures["recovered_s"] < 5
