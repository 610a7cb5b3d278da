"""The longest stall of a server's event loop, measured inside the server process.

    python tests/support/pulse.py FILE serve ...     `imago serve ...` with a heartbeat

A task wakes up every BEAT_S. A late wake-up is a stall, and its length is the smaller of two times: the wall clock, and the CPU time of the
whole process. A busy machine delays the wake-up without CPU time of this process; decode and device threads use CPU time without a delay;
a callback on the event loop, or a thread that holds the GIL, does both. FILE has 8 bytes, the longest stall in seconds since somebody
wrote 0 there.
"""

import asyncio
import mmap
import struct
import sys
import time
from pathlib import Path

BEAT_S = 0.005
SECONDS = struct.Struct("d")


class Pulse:
    """The file, as the test reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reset()

    def reset(self) -> None:
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.write(SECONDS.pack(0.0))

    @property
    def longest_ms(self) -> float:
        [seconds] = SECONDS.unpack(self.path.read_bytes())
        return float(1000 * seconds)


async def beat(path: Path) -> None:
    """Writes the longest stall into the file, until the loop ends."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SECONDS.size) as shared:
        while True:
            wall, cpu = time.monotonic(), time.process_time()
            await asyncio.sleep(BEAT_S)
            stall = min(time.monotonic() - wall - BEAT_S, time.process_time() - cpu)
            if stall > SECONDS.unpack(shared[:])[0]:
                shared[:] = SECONDS.pack(stall)


def main() -> None:
    path = Path(sys.argv.pop(1))
    from service.cli import main as imago
    from service.inference.engine import Engine

    start, tasks = Engine.start, list[asyncio.Task[None]]()

    def start_with_pulse(engine: Engine) -> None:
        start(engine)
        tasks.append(asyncio.create_task(beat(path)))

    Engine.start = start_with_pulse  # type: ignore[assignment, method-assign]
    imago()


if __name__ == "__main__":
    main()
