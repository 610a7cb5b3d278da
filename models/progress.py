"""How long work and its caller talk: how far it is, and whether it is to end early."""

from collections.abc import Callable

Progress = Callable[[float], None]  # from 0 to 1
Stop = Callable[[], bool]


def silent(done: float) -> None:
    """Nobody wants to know."""


def never() -> bool:
    """Nothing ends it early."""
    return False
