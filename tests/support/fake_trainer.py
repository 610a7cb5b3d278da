"""A trainer of no substance, for the tests of jobs: does what the request's metadata say under `do`, and starts in 50 ms.

python fake_trainer.py [--dry-run] JOB_DIR
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

line = sys.stdin.readline()
if not line:
    sys.exit(0)
folder = Path(json.loads(line)["folder"])
(folder / "pid").write_text(str(os.getpid()))
request = json.loads((folder / "job.json").read_text())["request"]
stop = threading.Event()


def listen() -> None:
    for line in sys.stdin:
        if line.strip() == "stop":
            stop.set()
    os._exit(29)


def tell(phase: str, progress: float, **fields: Any) -> None:
    print(json.dumps({"phase": phase, "progress": progress, **fields}), flush=True)


def end(**fields: Any) -> None:
    draft = folder / "draft"
    draft.write_text(json.dumps({"status": "succeeded", **fields}))
    draft.rename(folder / "result.json")
    sys.exit(0)


def good(**fields: Any) -> None:
    (folder / "report.json").write_text('{"schema": 1}')
    (folder / "report.html").write_text("<!doctype html><title>report</title>")
    sample = {"name": "cat/1.jpg", "image": "aW1hZ2U=", "features": ["AACAPw=="], "probabilities": {"cat": 1.0}}
    (folder / "parity.json").write_text(json.dumps({"samples": [sample]}))
    tell("publish", 1.0)
    end(**{"model": request["name"], "version": 2, "deployment": "activate", "effective": {"lr": 0.1}, **fields})


def wait() -> None:
    """Until it is told to stop; how often it was begun is its checkpoint."""
    checkpoint = folder / "checkpoint"
    begun = int(checkpoint.read_text()) + 1 if checkpoint.exists() else 1
    checkpoint.write_text(str(begun))
    tell("train", min(0.1 * begun, 0.9), epoch=begun, loss=1.0 / begun)
    while not stop.wait(0.05):
        pass
    good(stop_reason="stopped", effective={"begun": begun})


def save() -> None:
    """A checkpoint that is never whole."""
    with (folder / "checkpoint.part").open("wb") as part:
        tell("train", 0.1, epoch=1)
        while True:
            part.write(bytes(2**16))
            part.flush()
            part.seek(0)
            time.sleep(0.01)


def crash(times: int) -> None:
    crashed = len(list(folder.glob("crash-*")))
    if crashed < times:
        (folder / f"crash-{crashed}").touch()
        (folder / f".tmp-{crashed}").write_bytes(b"{")  # killed while it wrote
        os.kill(os.getpid(), signal.SIGKILL)
    good()


def stopped(times: int) -> None:
    tell("train", 0.1, epoch=1)
    begun = len(list(folder.glob("stopped-*")))
    if begun < times:
        (folder / f"stopped-{begun}").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    good()


def greedy() -> None:
    memory = bytearray(os.urandom(1)) * (200 * 2**20)
    tell("features", 0.5, message=f"holding {len(memory)} bytes")
    time.sleep(60)


threading.Thread(target=listen, daemon=True).start()
print("a warning of some library", file=sys.stderr)
if json.loads(line)["dry_run"]:
    if request["metadata"].get("do") == "greedy":
        greedy()
    found = {"audit": {"images": 12}, "split": {"train": 12}, "mode": request["mode"], "bases": ["pets"]}
    found |= {"effective": {}, "estimate": {"total": 1.0}, "dataset": request["dataset"]}
    (folder / "dry_run.json").write_text(json.dumps(found))
tell("audit", 0.5, message="skipped notes.txt: not an image")
do, _, count = request["metadata"].get("do", "succeed").partition(":")
match do:
    case "succeed":
        good()
    case "wait":
        wait()
    case "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait()
    case "save":
        save()
    case "crash":
        crash(int(count))
    case "stopped":
        stopped(int(count))
    case "greedy":
        greedy()
    case "fail":
        end(status="failed", error={"code": "invalid_dataset", "message": "one class only"})
    case "reject":
        good(deployment="rejected", reason="3 points worse")
    case "broken":
        good(version=9)
