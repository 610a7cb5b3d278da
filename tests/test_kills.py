"""A few of the 200 kills of `benchmarks/kills.py`."""

from pathlib import Path

import pytest

from benchmarks import kills, rig

pytestmark = pytest.mark.system


@pytest.mark.abuse("J7", "J9")
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "MOST_JOBS", 1)
    rig.publish_random(tmp_path / "weights", [kills.NETWORK])
    found = kills.run(tmp_path, kills=2, seed=2, most_s=4.0)
    assert found["problems"] == []
    assert found["accepted"] > 0
    assert not [outcome for outcome in found["outcomes"] if outcome.startswith("failed")]
