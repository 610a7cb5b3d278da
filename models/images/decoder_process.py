"""Decodes in a process that can be ended, for formats whose libraries cannot be interrupted and whose headers do not limit the work.

A TIFF may keep its pixels in any of a dozen compressions, in strips that overlap; an AVIF or HEIC may hold thousands of hidden frames.
The deadline, CPU seconds and memory limit the process from outside. Processes are reused.
"""

import atexit
import json
import math
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from models.errors import ImageTooLarge, InvalidImage
from models.images.cost import Left, OutOfTime, waits

CHILD = Path(__file__).with_name("decoder_child.py")
LOOK_MS = 100  # between two checks whether the caller has left
CPU_S = 10  # for one image; 50 megapixels take 2
MEMORY = 4 * 2**30  # bytes of address space
ANSWER_BYTES = 1000  # at most, of the line before the pixels
ORIENTATION_TAG = 0x0112

_idle: "list[subprocess.Popen[bytes]]" = []
_lock = threading.Lock()


def load(
    data: bytes,
    file_format: str,
    deadline: float,
    left: Left = waits,
    max_pixels: int | None = None,
    raw_mode: str | None = None,
) -> Image.Image:
    """Returns the pixels of a file, and its orientation as EXIF: L, LA, RGB, RGBA, F, or integers of 16 and 32 bits.

    max_pixels: as the header promised; a file with more is refused before and after it is decoded. raw_mode: Pillow's raw mode for
    samples of PNG and TIFF; None for the file's own.

    Raises OutOfTime after the deadline (`time.monotonic()`) or once the caller has `left`, ImageTooLarge, InvalidImage.
    """
    process = _take()
    timer = threading.Timer(min(deadline - time.monotonic(), threading.TIMEOUT_MAX), process.kill)
    timer.daemon = True
    if deadline < math.inf:
        timer.start()
    try:
        answer, pixels = _exchange(process, data, file_format, left, max_pixels, raw_mode)
    except (OSError, ValueError):
        _end(process)
        if time.monotonic() >= deadline:
            raise OutOfTime from None
        raise InvalidImage(f"the {file_format} takes more than {CPU_S} s to decode, or breaks its decoder") from None
    except BaseException:
        _end(process)
        raise
    finally:
        timer.cancel()
    if time.monotonic() < deadline:
        with _lock:
            _idle.append(process)
    else:  # it may be killed at this moment
        _end(process)
    if answer.get("error") == "memory":
        raise ImageTooLarge(f"not enough memory for this {file_format}; send a smaller image")
    if "error" in answer:
        raise OSError(answer["error"])
    image = Image.frombytes(answer["mode"], tuple(answer["size"]), pixels)
    image.getexif()[ORIENTATION_TAG] = answer["orientation"]
    image.info |= answer["info"]
    return image


def _exchange(
    process: "subprocess.Popen[bytes]",
    data: bytes,
    file_format: str,
    left: Left,
    max_pixels: int | None,
    raw_mode: str | None,
) -> tuple[dict[str, Any], bytes]:
    """Sends a file and returns the answer. Raises OutOfTime once the caller has `left`; OSError or ValueError if the process ends before
    it answers."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("started without pipes")
    order = {"format": file_format, "bytes": len(data), "cpu_s": CPU_S, "memory": MEMORY}
    order |= {"max_pixels": max_pixels, "raw_mode": raw_mode}
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.write(data)
    process.stdin.flush()
    answers = select.poll()
    answers.register(process.stdout, select.POLLIN)
    while not answers.poll(LOOK_MS):
        if left():
            raise OutOfTime
    answer: dict[str, Any] = json.loads(process.stdout.readline(ANSWER_BYTES))
    pixels = process.stdout.read(answer.get("bytes", 0))
    if len(pixels) < answer.get("bytes", 0):
        raise ValueError("its pixels break off")
    return answer, pixels


def _take() -> "subprocess.Popen[bytes]":
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.poll() is None:
                return process
    return subprocess.Popen(  # noqa: S603  (our own program)
        [sys.executable, "-I", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        start_new_session=True,  # an interrupt from the keyboard is for us
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    with suppress(OSError):
        process.communicate()


@atexit.register
def close() -> None:
    """Ends the idle processes."""
    with _lock:
        waiting, _idle[:] = list(_idle), []
    for process in waiting:
        _end(process)
