"""Runs one check in this process and writes its measurement: `python -m service.diagnostics.gpu_check.child ORDER`, with an Order as
JSON.

The measurement goes to a file, so that output of libraries cannot damage it.
"""

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from service.diagnostics.gpu_check.records import GpuCheckSpec, Measurement

OUTCOME = "outcome.json"


def main(order: GpuCheckSpec, begin: Callable[[GpuCheckSpec], object]) -> int:
    """Returns the exit code: 0 if the check ran to its end, whatever it found. `begin` makes the argument of the check."""
    module, _, function = order.target.partition(":")
    try:
        measurement = Measurement.model_validate(getattr(import_module(module), function)(begin(order)))
    except Exception:
        traceback.print_exc()
        return 1
    write(order.folder, measurement)
    return 0


def write(folder: Path, measurement: Measurement) -> None:
    """Writes in one step: a killed process leaves the whole file or none."""
    new = folder / f".{OUTCOME}"
    new.write_text(measurement.model_dump_json())
    new.replace(folder / OUTCOME)


def session(order: GpuCheckSpec) -> object:
    from service.diagnostics.gpu_check.session import Session  # imports torch, which may fail

    return Session.begin(order)


def end(code: int) -> None:
    """Ends the process at once: a lost device must not delay it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main(GpuCheckSpec.model_validate_json(sys.argv[1]), session))
