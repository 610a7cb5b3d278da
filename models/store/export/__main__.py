"""Runs one export in its own process: `python -m models.store.export WEIGHTS NAME VERSION FORMAT OUT`.

Prints one JSON object: `{"warnings": [...]}`; `{"code": ..., "message": ...}` if it failed; `{"disk": ...}` for an error of the disk.
It ends when its stdin is closed, and so with the server that started it.
"""

import json
import os
import resource
import sys
import threading
from contextlib import suppress
from pathlib import Path

NICE = 10
OOM_SCORE = 500  # of 1000: when memory runs out, the kernel ends this process before the server
MEMORY = 3 * 2**30  # bytes; and MEMORY_PER_BYTE for each byte of the weights on disk
MEMORY_PER_BYTE = 8  # measured: 3.3 bytes for each byte of a float32 network; half-precision weights double in memory


def main(weights: str, name: str, version: str, file_format: str, out: str) -> dict[str, object]:
    from models.errors import ModelError
    from models.runtime.failures import is_out_of_memory
    from models.store.export.files import FORMATS, export
    from models.store.store import ModelStore

    [wanted] = [known for known in FORMATS if known == file_format]
    store = ModelStore(Path(weights))
    try:
        config = store.config(name, int(version))
        bound_memory(sum(store.backbone_size(ref) for ref in set(config.backbones)))
        made = export(store, config, wanted, Path(out))
    except ModelError as error:
        return {"code": error.code, "message": str(error)}
    except OSError as error:
        return {"disk": error.strerror or str(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"code": "export_failed", "message": f"there is not enough memory to export {name}@{version}"}
    return {"warnings": made.warnings}


def be_modest() -> None:
    """Give way to serving. Threads that are started afterwards inherit it."""
    os.nice(NICE)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def bound_memory(weights: int) -> None:
    """Limit this process's memory, so that its own allocations fail first."""
    limit = MEMORY + MEMORY_PER_BYTE * weights
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def end_with_stdin() -> None:
    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    be_modest()  # before torch is imported, which takes seconds of CPU time
    end_with_stdin()
    report = json.dumps(main(*sys.argv[1:]))
    sys.stdout.write(report + "\n")
    sys.stdout.flush()
    os._exit(0)  # all is written, and torch's clean-up takes seconds
