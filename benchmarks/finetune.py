"""Fine-tuning through a running server: from the request to the first answer, beside traffic, and through kill -9.

    python -m benchmarks.finetune [--quick] [--parts first beside swap recovery] [--seconds S] [--kills N]

`first`: `hymenoptera.zip`, a head on ResNet-18 (random weights): seconds from `POST /finetune` to the new model's first answer, by phase;
then the same once more, with the features cached. `beside`: p95 at half the load that the server can bear, while a network trains, over
without. `swap`: p99 at half load while versions are swapped, over before. `recovery`: a short job from scratch whose trainer and server
are killed in turn at random moments; its result must be that of a job left alone.
"""

import asyncio
import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import rig

BEES = {"dataset": "hymenoptera.zip", "name": "bees", "base": "resnet18"}
LONG = {
    "dataset": "hymenoptera.zip",
    "name": "long",
    "base": "resnet18",
    "mode": "finetune",
    "hyperparameters": {"epochs": 1000},
}
SMALL = {"name": "small", "base": "lenet5", "mode": "scratch", "deploy": "never", "hyperparameters": {"epochs": 30}}
KEY = "benchmark-" * 4
POLL_S = 0.05
Json = dict[str, Any]


@contextmanager
def server(root: Path) -> Iterator[rig.Server]:
    flags = ("--datasets", str(datasets()))
    with rig.serving(rig.imago(root, *flags), "/health/ready", root / "serve.log", {"IMAGO_ADMIN_KEY": KEY}) as found:
        yield found


def datasets() -> Path:
    return Path(os.environ.get("IMAGO_TEST_DATA") or rig.ROOT.parent / "shared" / "data")


def ask(url: str, body: Mapping[str, Any] | None = None, method: str | None = None) -> Any:
    """An admin's request; -> the JSON that it is answered with."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


def ended(url: str, job: Json, limit_s: float = 900) -> Json:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with suppress(OSError):
            found: Json = ask(f"{url}/finetune/{job['id']}")
            if found["terminal"]:
                return found
        time.sleep(POLL_S)
    raise RuntimeError(f"{job['id']} has not ended after {limit_s:.0f} s")


# From the request to the first answer


def first(url: str) -> Json:
    photograph = rig.photographs()[0]
    found: Json = {}
    for label in ("first", "cached"):
        began = time.perf_counter()
        job = ended(url, ask(f"{url}/finetune", BEES))
        if job["status"] != "succeeded":
            raise RuntimeError(json.dumps(job))
        if label == "cached" and "activated" not in str(job["deployment"]):
            ask(f"{url}/models/bees/activate", {"version": job["version"]})
        answer = httpx.post(
            f"{url}/predict?model=bees", content=photograph, headers={"Content-Type": "image/jpeg"}
        ).json()
        seconds = time.perf_counter() - began
        assert answer["version"] == job["version"], (answer, job)
        report = ask(f"{url}/finetune/{job['id']}/report")
        found[label] = {"seconds": round(seconds, 2), "phases": report["timings"], "deployment": job["deployment"]}
        rig.say(f"{label}: {seconds:.1f} s {report['timings']}")
    return found


# Beside traffic


async def arrivals(url: str, rate: float, seconds: float, model: str) -> list[float]:
    """Open loop: requests at even distances, whatever the answers do; -> the latencies, ms."""
    photographs = rig.photographs()
    latencies: list[float] = []
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=256)) as client:

        async def one(number: int) -> None:
            began = time.perf_counter()
            body = photographs[number % len(photographs)]
            answer = await client.post(
                f"{url}/predict?model={model}", content=body, headers={"Content-Type": "image/jpeg"}
            )
            answer.raise_for_status()
            latencies.append(1000 * (time.perf_counter() - began))

        tasks = []
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(one(number)))
        await asyncio.gather(*tasks)
    return sorted(latencies)


def percentile(latencies: list[float], share: float) -> float:
    return latencies[min(len(latencies) - 1, int(share * len(latencies)))]


def half_load(found: rig.Server, model: str) -> float:
    """Images a second: half of what it can."""
    return found.load(rig.photographs(), 16, 5.0, [model]).images_per_second / 2


def beside(found: rig.Server, rounds: int, seconds: float) -> Json:
    rate = half_load(found, "resnet18")
    p95: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        p95["without"].append(percentile(asyncio.run(arrivals(found.url, rate, seconds, "resnet18")), 0.95))
        job = ask(f"{found.url}/finetune", LONG)
        while ask(f"{found.url}/finetune/{job['id']}")["phase"] != "train":
            time.sleep(POLL_S)
        p95["with"].append(percentile(asyncio.run(arrivals(found.url, rate, seconds, "resnet18")), 0.95))
        ask(f"{found.url}/finetune/{job['id']}/cancel", {}, "POST")
        ended(found.url, job)
        rig.say(f"p95 {p95['without'][-1]:.0f} ms without, {p95['with'][-1]:.0f} ms with a job")
    return {"rate": round(rate, 1), "p95_ms": p95, "ratio": rig.ratio(p95["with"], p95["without"])}


def swap(found: rig.Server, rounds: int, seconds: float) -> Json:
    rate = half_load(found, "bees")
    p99: dict[str, list[float]] = {"before": [], "during": []}
    for _ in range(rounds):
        p99["before"].append(percentile(asyncio.run(arrivals(found.url, rate, seconds, "bees")), 0.99))
        p99["during"].append(percentile(asyncio.run(swapped(found.url, rate, seconds)), 0.99))
        rig.say(f"p99 {p99['before'][-1]:.0f} ms before, {p99['during'][-1]:.0f} ms during swaps")
    return {"rate": round(rate, 1), "p99_ms": p99, "ratio": rig.ratio(p99["during"], p99["before"])}


async def swapped(url: str, rate: float, seconds: float) -> list[float]:
    """The same with a swap each second; a failed request raises."""
    traffic = asyncio.create_task(arrivals(url, rate, seconds, "bees"))
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        for version in range(int(seconds)):
            answer = await client.post(f"{url}/models/bees/activate", json={"version": 1 + version % 2})
            answer.raise_for_status()
            await asyncio.sleep(1.0)
    return await traffic


# Recovery


def recovery(root: Path, kills: int) -> Json:
    """Kills trainer and server in turn; -> how many jobs came to the weights of the job that was left alone."""
    expected = undisturbed(root)
    same, seconds = 0, []
    generator = random.Random(0)
    for number in range(kills):
        began = time.perf_counter()
        found = disturbed(root, generator.uniform(0.3, expected["seconds"]), trainer=number % 2 == 0)
        seconds.append(time.perf_counter() - began)
        same += found == expected["weights"]
        rig.say(f"kill {number + 1}: {'the same' if found == expected['weights'] else 'OTHER WEIGHTS'}")
    return {
        "kills": kills,
        "same": same,
        "undisturbed_s": round(expected["seconds"], 1),
        "seconds": rig.series(seconds),
    }


def undisturbed(root: Path) -> Json:
    with small_server(root) as found:
        began = time.perf_counter()
        job = ended(found.url, ask(f"{found.url}/finetune", SMALL | {"dataset": "small"}))
        return {"seconds": time.perf_counter() - began, "weights": weights(root, job)}


def disturbed(root: Path, after_s: float, trainer: bool) -> list[str]:
    with small_server(root) as found:
        job = ask(f"{found.url}/finetune", SMALL | {"dataset": "small"})
        time.sleep(after_s)
        if trainer:
            for child in rig.family_of(found.pid)[1:]:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            return weights(root, ended(found.url, job))
        os.kill(found.pid, signal.SIGKILL)
    with small_server(root) as found:
        return weights(root, ended(found.url, job))


@contextmanager
def small_server(root: Path) -> Iterator[rig.Server]:
    command = rig.imago(root, "--datasets", str(root / "datasets"))
    with rig.serving(command, "/health/live", root / "serve.log", {"IMAGO_ADMIN_KEY": KEY}) as found:
        yield found


def weights(root: Path, job: Json) -> list[str]:
    if job["status"] != "succeeded":
        raise RuntimeError(json.dumps(job))
    config = json.loads((root / "weights/models/small" / str(job["version"]) / "config.json").read_text())
    return [config["head_sha256"], config["backbones"][0]["sha256"]]


def squares(folder: Path) -> None:
    """A dataset of three colours, 40 images each."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for label, colour in {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}.items():
        (folder / label).mkdir(parents=True)
        for number in range(40):
            noise = generator.integers(-60, 61, (32, 32, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


def main() -> None:
    parser = rig.arguments(__doc__)
    parser.add_argument("--parts", nargs="+", default=["first", "beside", "swap", "recovery"])
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    rounds, seconds = args.rounds or (1 if args.quick else 3), args.seconds or (4.0 if args.quick else 15.0)
    found: Json = {"benchmark": "finetune", "machine": rig.machine()}
    with rig.store_of("resnet18") as root:
        if {"first", "beside", "swap"} & {*args.parts}:
            with server(root) as running:
                if "first" in args.parts or "swap" in args.parts:
                    found["first"] = first(running.url)
                if "beside" in args.parts:
                    found["beside"] = beside(running, rounds, seconds)
                if "swap" in args.parts:
                    found["swap"] = swap(running, rounds, seconds)
        if "recovery" in args.parts:
            squares(root / "datasets" / "small")
            found["recovery"] = recovery(root, 2 if args.quick else args.kills)
    rig.finish(found)


if __name__ == "__main__":
    main()
