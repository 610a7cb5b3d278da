"""Fine-tuning to the end: a head through the server, and a whole network three times."""

import json
import time
from pathlib import Path
from typing import Any

from models.store.store import ModelStore
from models.training import run as finetune
from models.training.job.hyperparameters import Hyperparameters
from models.training.job.job_files import REPORT
from models.training.job.request import EarlyStopping, FinetuneRequest
from service.diagnostics.gpu_check.measures.batches import waits
from service.diagnostics.gpu_check.pictures import CLASSES, picture, two_classes
from service.diagnostics.gpu_check.records import Measurement, problems
from service.diagnostics.gpu_check.server import RunningServer, default_store, serving
from service.diagnostics.gpu_check.session import Session

IMAGES = 120  # of each class
JOB_S = 90.0
UNSEEN = 8  # images of each class that the job has not seen
NAME = "gpu-check"
MOST_WAITS = 4.0  # for the GPU, in a step of training


def head_job(session: Session) -> Measurement:
    """Mode head, as a user asks for it over HTTP: trained, deployed, and right about images that it has not seen."""
    base, weights = default_store(session), session.folder / "weights"
    dataset = session.dataset or two_classes(session.folder / "datasets" / "shapes", session.size(IMAGES, 12))
    with serving(session, weights, "--datasets", str(dataset.parent)) as server:
        began = time.monotonic()
        job = finished(
            server,
            {"dataset": dataset.name, "name": NAME, "base": base, "mode": "head", "deploy": "always"},
            session.size(JOB_S, 3 * JOB_S),
        )
        figures: dict[str, Any] = {
            "seconds": round(time.monotonic() - began, 1),
            "rehearsal": session.rehearse,
            **{name: job[name] for name in ("status", "deployment", "error", "version")},
        }
        if job["status"] == "succeeded":
            figures["report"] = figures_of(server.ask("GET", f"/finetune/{job['id']}/report?format=json"))
        if job["deployment"] == "activated" and session.dataset is None:
            figures["right"] = right(server)
    return judged(figures)


def finished(server: RunningServer, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """The job once it is at its end. Raises TimeoutError."""
    job: dict[str, Any] = server.ask("POST", "/finetune", json=request)
    ends = time.monotonic() + limit_s
    while not job["terminal"]:
        if time.monotonic() > ends:
            raise TimeoutError(f"the job is at {job['phase']} after {limit_s:.0f} s")
        time.sleep(0.2)
        job = server.ask("GET", f"/finetune/{job['id']}")
    return job


def right(server: RunningServer) -> float:
    """The share of unseen images that the deployed version classifies correctly."""
    found = []
    for kind in CLASSES:
        for seed in range(10_000, 10_000 + UNSEEN):
            answer = server.ask("POST", f"/predict?model={NAME}", content=picture(kind, seed))
            found.append(answer["results"][0]["predictions"][0]["label"] == kind)
    return found.count(True) / len(found)


def judged(figures: dict[str, Any]) -> Measurement:
    share = figures.get("right")
    said = "" if share is None else f", {share:.0%} of unseen images right"
    return Measurement(
        summary=f"{figures['status']}, {figures['deployment']} after {figures['seconds']} s{said}",
        figures=figures,
        problems=problems(
            (figures["status"] == "succeeded", f"the job failed: {figures['error']}"),
            (figures["deployment"] == "activated", f"the version is not deployed: {figures['deployment']}"),
            (share is None or figures["rehearsal"] or share >= 0.8, f"{share} of the unseen images are right"),
        ),
    )


# A whole network


def network_job(session: Session) -> Measurement:
    """Mode finetune: one short run, then two longer ones that are alike. The difference between short and long shows the cost of a step."""
    base, store = default_store(session), ModelStore(session.folder / "weights")
    dataset = session.dataset or two_classes(session.folder / "shapes", session.size(IMAGES, 8))
    long = session.size(3, 2)
    runs = [trained(session, store, base, dataset, number, epochs) for number, epochs in enumerate((1, long, long))]
    steps = runs[1]["steps"] - runs[0]["steps"]
    seconds = [epoch for run in runs[1:] for epoch in run["epoch_seconds"][1:]]
    figures = {
        "runs": runs,
        "same_weights": runs[1]["weights"] == runs[2]["weights"],
        "waits_per_step": round((runs[1]["waits"] - runs[0]["waits"]) / max(1, steps), 1),
        "images_per_s": round(runs[1]["train_images"] / min(seconds), 1) if seconds else None,
    }
    return judged_network(figures)


def trained(session: Session, store: ModelStore, base: str, dataset: Path, number: int, epochs: int) -> dict[str, Any]:
    """A run of its own, in this process."""
    hyperparameters = Hyperparameters(epochs=epochs, batch_size=session.size(16, 8), devices=1)
    request = FinetuneRequest(
        dataset=dataset,
        name=f"{NAME}-{number}",
        base=base,
        mode="finetune",
        deploy="always",
        hyperparameters=hyperparameters,
        early_stopping=EarlyStopping(criterion="none", keep="last"),
    )
    folder, began = session.folder / f"job-{number}", time.monotonic()
    with waits(session) as heard:
        result = finetune.run(request, store, lambda event: None, job_dir=folder, cache=session.folder / "features")
    report = json.loads((folder / REPORT).read_text())
    train_images = sum(report["audit"]["class_counts"]["train"].values())
    return {
        **figures_of(report),
        "deployment": result.deployment,
        "reason": result.reason,
        "seconds": round(time.monotonic() - began, 1),
        "waits": len(heard),
        "steps": epochs * max(1, train_images // hyperparameters.batch_size),
        "train_images": train_images,
        "epoch_seconds": [epoch["seconds"] for epoch in report["history"] if epoch["seconds"] is not None],
        "weights": store.config(f"{NAME}-{number}").backbones[0].sha256,
    }


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    """Of a job's report."""
    return {
        "parity": report["parity"],
        "timings": report["timings"],
        "precision": report["effective"]["precision"],
        "accuracy": report["val"]["accuracy"],
    }


def judged_network(figures: dict[str, Any]) -> Measurement:
    refused = [run["reason"] for run in figures["runs"] if run["deployment"] != "activate"]
    return Measurement(
        summary=f"{figures['images_per_s']} images/s in {figures['runs'][1]['precision']}, "
        f"{figures['waits_per_step']} waits for the GPU in a step, "
        f"{'the same' if figures['same_weights'] else 'different'} weights twice",
        figures=figures,
        problems=problems(
            (not refused, f"the version is not to be deployed: {refused[:1]}"),
            (figures["same_weights"], "two runs that were asked alike have different weights"),
            (
                figures["waits_per_step"] <= MOST_WAITS,
                f"a step waits for the GPU {figures['waits_per_step']} times",
            ),
        ),
    )
