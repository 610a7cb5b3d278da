"""Progress on stderr: a bar on a terminal, and elsewhere a plain line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import click

LINE_S = 5.0  # without a terminal, at most one line in so many seconds


class Update(Protocol):
    """What is to be told of each step: how much is done, of how much (None: not known), and of what (None: as before)."""

    def __call__(self, done: int, total: int | None, label: str | None = None, /) -> None: ...


def progress(label: str, unit: str) -> AbstractContextManager[Update]:
    """`unit="bytes"` shows sizes."""
    return _bar(label, unit) if sys.stderr.isatty() else _lines(label, unit)


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TextColumn(unit), TimeRemainingColumn())
    # Two redraws a second: `bench` shares its cores with the server that it measures.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int | None, label: str | None = None, /) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield update


@contextmanager
def _lines(label: str, unit: str) -> Iterator[Update]:
    began = said = time.monotonic()
    current = label

    def update(done: int, total: int | None, label: str | None = None, /) -> None:
        nonlocal said, current
        current = label or current
        if time.monotonic() - said >= LINE_S:
            said = time.monotonic()
            click.echo(f"{current}: {done}{f' of {total}' if total else ''} {unit}, {said - began:.0f} s", err=True)

    yield update
