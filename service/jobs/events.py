"""A job's events: one JSON object per line of `<job>/events.jsonl`, numbered from 1.

A writer holds the file's lock, and first cuts off a line that a crash left unfinished.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
TAIL_BYTES = 65_536  # no line is longer
MAX_MESSAGE = 2000


def append_queued(path: Path) -> None:
    """Adds the first event, unless there are events: a server may run the job before the one that accepted it gets here."""
    append(path, {"level": "info", "status": "queued"}, only_first=True)


def append(path: Path, fields: Mapping[str, Any], only_first: bool = False) -> None:
    """Adds one event: its number, the time, and those of `fields` that are not None. OSError where the disk is full."""
    line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds")}
    line |= {name: value for name, value in fields.items() if value is not None}
    if "message" in line:
        line["message"] = str(line["message"])[:MAX_MESSAGE]
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        whole, last = _whole_lines(file.fileno())
        if only_first and last > 0:
            return
        file.truncate(whole)
        file.write(json.dumps({"seq": last + 1, **line}, allow_nan=False).encode() + b"\n")


def _whole_lines(handle: int) -> tuple[int, int]:
    """The size of the whole lines in bytes, and the number of the last of them."""
    size = os.fstat(handle).st_size
    start = max(0, size - TAIL_BYTES)
    tail = os.pread(handle, TAIL_BYTES, start)
    end = tail.rfind(b"\n") + 1
    if end == 0:
        return 0, 0
    last = tail[tail.rfind(b"\n", 0, end - 1) + 1 : end]
    return start + end, int(json.loads(last)["seq"])


class Tail:
    """Reads a job's events after a number, and later the new ones."""

    def __init__(self, path: Path, after: int = 0) -> None:
        self._path, self._skip = path, after
        self._offset = 0

    def read(self, limit: int) -> list[dict[str, Any]]:
        """The next events, at most `limit`."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            file.seek(self._offset)
            lines = (line for line in file if line.endswith(b"\n"))
            for line in islice(lines, self._skip):
                self._offset += len(line)
                self._skip -= 1
            taken = list(islice(lines, limit))
        self._offset += sum(map(len, taken))
        return [json.loads(line) for line in taken]
