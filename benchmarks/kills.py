"""`kill -9` at random moments of the server, its trainer, or both, while everything is written: jobs, checkpoints, versions, uploads.

    python -m benchmarks.kills [--kills N] [--seed N] [--quick]

After each: the jobs database passes its integrity check, no trainer lives on, every version of the store loads, the next start is ready
with all that it said it had accepted, and a job that runs has a process. At the end every job is at its end, and no temporary file is left.
"""

import io
import os
import random
import signal
import sqlite3
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import rig
from benchmarks.finetune import squares

NETWORK = "lenet5"
KEY = "benchmark-" * 4
TARGETS = ("server", "both", "trainer")
MOST_S = 10.0  # until the kill; a trainer takes half of it for its imports
MOST_JOBS = 3  # that are not at their end
PATIENCE_S = 300.0
ORPHAN_S = 5.0
TEMPORARY = (".tmp-*", "*.part", ".new-*", "draft", "upload", "*-journal")
Json = dict[str, Any]


@dataclass
class Found:
    """What came of it. `accepted`: the jobs that were answered with 202; `forgotten`: those that were asked to be deleted."""

    problems: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    accepted: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)  # that jobs were in when they were hit


class Hands(threading.Thread):
    """An admin who never rests, until the connection breaks."""

    def __init__(self, url: str, found: Found, seed: int) -> None:
        super().__init__(daemon=True)
        self.found, self.random, self.over = found, random.Random(seed), threading.Event()
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        self.acts = (self.submit, self.upload, self.activate, self.cancel, self.delete, self.rehearse)

    def run(self) -> None:
        with self.http, suppress(httpx.TransportError):
            self.submit()
            while not self.over.wait(self.random.uniform(0, 0.3)):
                (act,) = self.random.choices(self.acts, weights=(6, 4, 4, 1, 1, 1))
                act()

    def stop(self) -> None:
        self.over.set()
        self.join()

    def _heard(self, what: str, answer: httpx.Response) -> httpx.Response:
        self.found.answers[f"{what} {answer.status_code}"] += 1
        if answer.status_code >= 500 and answer.status_code not in (503, 507):
            self.found.problems.append(f"{what}: {answer.status_code} {answer.text}")
        return answer

    def _jobs(self, terminal: bool) -> list[Json]:
        answer = self._heard("list", self.http.get("/finetune", params={"limit": 100}))
        return [job for job in answer.json().get("data", ()) if job["terminal"] == terminal]

    def submit(self) -> None:
        if len(self._jobs(terminal=False)) >= MOST_JOBS:
            return
        scratch: Json = {"mode": "scratch", "base": NETWORK, "hyperparameters": {"epochs": 30}}
        request: Json = {"dataset": "small", "name": f"m{self.random.randrange(5)}", "deploy": "always"}
        request |= self.random.choice([{"mode": "head", "base": NETWORK}, scratch])
        headers = {"Idempotency-Key": str(self.random.getrandbits(64))}
        answer = self._heard("submit", self.http.post("/finetune", json=request, headers=headers))
        if answer.status_code == 202:
            self.found.accepted.add(answer.json()["id"])

    def upload(self) -> None:
        body = self.random.choice(ZIPS)
        self._heard("upload", self.http.post("/datasets?name=uploaded&replace=true", content=body))

    def activate(self) -> None:
        for model in self.http.get("/models").json()["models"]:
            self._heard("activate", self.http.post(f"/models/{model['name']}/activate", json={"version": 1}))

    def cancel(self) -> None:
        for job in self._jobs(terminal=False)[:1]:
            self._heard("cancel", self.http.post(f"/finetune/{job['id']}/cancel"))

    def delete(self) -> None:
        for job in self._jobs(terminal=True)[-1:]:
            self.found.forgotten.add(job["id"])
            self._heard("delete", self.http.delete(f"/finetune/{job['id']}"))

    def rehearse(self) -> None:
        self._heard("validate", self.http.post("/datasets/validate", json={"dataset": "small"}))


def archive(size: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for number in range(size):
            packed.writestr(f"{'ant' if number % 2 else 'bee'}/{number}.png", os.urandom(2**16))
    return buffer.getvalue()


ZIPS = [archive(size) for size in (4, 40)]


# The kill


@contextmanager
def server_of(root: Path) -> Iterator[rig.Server]:
    command = rig.imago(root, "--datasets", str(root / "datasets"), "--engine", "torch", "--max-batch", "8")
    with rig.serving(command, "/health/ready", root / "serve.log", {"IMAGO_ADMIN_KEY": KEY}) as server:
        yield server


def trainers(pid: int) -> list[psutil.Process]:
    """Of this server."""
    found = []
    for process in rig.family_of(pid)[1:]:
        with suppress(psutil.NoSuchProcess):
            if "models.training" in process.cmdline():
                found.append(process)
    return found


def kill(server: rig.Server, target: str) -> list[psutil.Process]:
    """SIGKILL; -> the trainers that there were."""
    there = trainers(server.pid)
    if target != "server":
        for trainer in there:
            with suppress(psutil.NoSuchProcess):
                trainer.kill()
    if target != "trainer":
        os.kill(server.pid, signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            psutil.Process(server.pid).wait(60)
    return there


# What must be true


def lives(process: psutil.Process) -> bool:
    """A zombie waits for whoever adopted it, and does nothing any more."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_at_rest(root: Path, orphans: list[psutil.Process], found: Found) -> None:
    """Between two servers."""
    if not within(ORPHAN_S, lambda: not any(map(lives, orphans))):
        ages = [f"{time.time() - trainer.create_time():.0f} s old" for trainer in orphans if lives(trainer)]
        found.problems.append(f"trainers outlived their server: {', '.join(ages)}")
    database = root / "data" / "jobs.sqlite"
    if database.exists():
        with sqlite3.connect(database) as connection:
            (said,) = connection.execute("PRAGMA integrity_check").fetchone()
            rows = connection.execute("SELECT phase FROM imago_jobs WHERE status = 'running'").fetchall()
        connection.close()
        found.phases.update(str(phase) for (phase,) in rows)
        if said != "ok":
            found.problems.append(f"integrity_check: {said}")
    found.problems += rig.in_child(unloadable, root / "weights")


def unloadable(weights: Path) -> list[str]:
    """The versions of the store that do not load, and why."""
    from models.store.store import ModelStore

    store, problems = ModelStore(weights), list[str]()
    for name in store.names():
        for version in store.versions(name):
            try:
                store.load(name, version)
            except Exception as error:
                problems.append(f"{name}@{version}: {error}")
    return problems


def check_serving(server: rig.Server, found: Found) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        within(
            30, lambda: all(model["state"] != "loading" for model in models(http))
        )  # only the default is awaited so far
        broken = [model for model in models(http) if model["state"] != "ready"]
        found.problems += [f"{model['name']}: {model['state']} {model['error']}" for model in broken]
        lost = found.accepted - found.forgotten - {job["id"] for job in listed(http)}
        found.problems += [f"{job} was accepted, and is lost" for job in lost]
        if not within(30, lambda: not running(http) or bool(trainers(server.pid))):
            found.problems.append(f"{running(http)} run without a process")


def models(http: httpx.Client) -> list[Json]:
    found: list[Json] = http.get("/models").json()["models"]
    return found


def listed(http: httpx.Client) -> list[Json]:
    jobs: list[Json] = []
    while True:
        page = http.get("/finetune", params={"limit": 100} | ({"after": jobs[-1]["id"]} if jobs else {})).json()
        jobs += page["data"]
        if not page["has_more"]:
            return jobs


def running(http: httpx.Client) -> list[str]:
    """The jobs that should have a trainer."""
    return [job["id"] for job in listed(http) if job["status"] == "running" and job["phase"] != "deploy"]


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    ends = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > ends:
            return False
        time.sleep(0.1)
    return True


def left_over(root: Path) -> list[str]:
    """Temporary files, once nothing is under way."""
    return sorted(str(path.relative_to(root)) for pattern in TEMPORARY for path in root.rglob(pattern))


# All of it


def run(root: Path, kills: int, seed: int = 0, most_s: float = MOST_S) -> Json:
    squares(root / "datasets" / "small")
    found, generator, began = Found(), random.Random(seed), time.monotonic()
    for number in range(kills):
        target = TARGETS[number % len(TARGETS)]
        orphans = one_kill(root, found, target, generator.uniform(0.1, most_s), seed=generator.getrandbits(32))
        check_at_rest(root, orphans, found)
        found.kills[target] += 1
        rig.say(f"kill {number + 1}, {target}: {len(found.accepted)} jobs accepted, problems: {found.problems}")
    outcomes = settle(root, found)
    leftovers = left_over(root)
    return {
        "kills": dict(found.kills),
        "seconds": round(time.monotonic() - began, 1),
        "hit_in_phase": dict(found.phases),
        "answers": dict(sorted(found.answers.items())),
        "accepted": len(found.accepted),
        "outcomes": dict(outcomes),
        "problems": found.problems + [f"left over: {path}" for path in leftovers],
    }


def one_kill(root: Path, found: Found, target: str, after_s: float, seed: int) -> list[psutil.Process]:
    """A server from its start to its end; -> trainers that must be gone."""
    with server_of(root) as server:
        check_serving(server, found)
        hands = Hands(server.url, found, seed)
        with ExitStack() as working:
            working.callback(hands.stop)
            hands.start()
            time.sleep(after_s)
            there = kill(server, target)
            if target == "trainer":
                time.sleep(1.0)
        if target == "trainer":
            check_serving(server, found)
    return there


def settle(root: Path, found: Found) -> Counter[str]:
    """How the jobs end once nobody kills any more."""
    with server_of(root) as server:
        check_serving(server, found)
        with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
            if not within(PATIENCE_S, lambda: all(job["terminal"] for job in listed(http))):
                found.problems.append("not every job has come to its end")
            ended = Counter(outcome(job) for job in listed(http))
            # Sweeps what uploads have left, as the next one would.
            http.post("/datasets?name=last&replace=true", content=ZIPS[0])
    check_at_rest(root, [], found)
    return ended


def outcome(job: Json) -> str:
    return f"{job['status']} {job['error']['code']}" if job["error"] else str(job["status"])


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0, help="another one, other moments")
    args = parser.parse_args()
    machine = rig.machine()
    with rig.store_of(NETWORK) as root:
        found = run(root, args.kills or (3 if args.quick else 200), args.seed)
    rig.finish({"benchmark": "kills", "machine": machine, **found})


if __name__ == "__main__":
    main()
