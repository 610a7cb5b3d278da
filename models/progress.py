"""Callbacks between long work and its caller: how much is done, and whether to stop early."""

from collections.abc import Callable

Progress = Callable[[float], None]  # the share that is done, 0 to 1
DownloadProgress = Callable[[int, int | None], None]  # bytes so far, and all bytes, None where the server does not say
Stop = Callable[[], bool]


def silent(done: float, total: float | None = None) -> None:
    """Ignores the progress; a default for `Progress` and `DownloadProgress`."""


def never() -> bool:
    """Never stops early."""
    return False
