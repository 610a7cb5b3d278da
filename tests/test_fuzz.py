"""The fuzz targets on their seeds, and on each seed cut off and with bytes changed."""

import random

import pytest
from support.fuzz_targets import TARGETS


@pytest.mark.system
@pytest.mark.abuse("I19", "I20", "H2", "J11")
@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    target, seeds = TARGETS[name]
    dice = random.Random(0)
    for seed in seeds():
        target(seed)
        for _ in range(20):
            damaged = bytearray(seed[: dice.randrange(1, len(seed) + 1)])
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
            target(bytes(damaged))


def test_a_target_lets_no_other_error_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    target, seeds = TARGETS["decode"]
    monkeypatch.setattr("support.fuzz_targets.decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        target(seeds()[0])
