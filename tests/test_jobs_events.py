"""The diary of a job, and its progress."""

import time
from pathlib import Path

import pytest

from service.jobs.eta import Eta
from service.jobs.events import Tail, append, append_queued


def test_a_line_that_a_crash_cut_off_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in range(3):
        append(path, {"message": f"{number}", "loss": None})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq": 4, "mess')
    assert [event["seq"] for event in Tail(path).read(10)] == [1, 2, 3]
    append(path, {"message": "next"})
    assert [(event["seq"], event["message"]) for event in Tail(path, 2).read(10)] == [(3, "2"), (4, "next")]


def test_a_tail_goes_on_where_it_was(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "events.jsonl", after=1)
    assert tail.read(10) == []
    for number in range(4):
        append(tmp_path / "events.jsonl", {"message": f"{number}"})
    assert [[event["seq"] for event in tail.read(2)] for _ in range(3)] == [[2, 3], [4], []]


def test_queued_is_the_first_event_or_none(tmp_path: Path) -> None:
    """Two servers write it: the one that accepted the job, and the one that begins it."""
    path = tmp_path / "events.jsonl"
    append_queued(path)
    append(path, {"status": "running"})
    append_queued(path)
    assert [event["status"] for event in Tail(path).read(10)] == ["queued", "running"]


def test_progress_never_falls_and_the_estimate_comes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    eta, seen = Eta("finetune", progress=0.05), []
    for step in range(1, 11):
        clock[0] += 10
        eta.update("train", step / 10)
        seen.append((eta.progress, eta.eta_seconds or 0.0))
    assert seen == sorted(seen, key=lambda s: (s[0], -s[1]))
    assert seen[4][1] == pytest.approx(50, rel=0.5)  # seconds: half of the epochs are done after 50
    eta.update("audit", 0.1)
    assert eta.progress == seen[-1][0]


def test_auto_is_a_head_until_an_epoch_says_otherwise() -> None:
    eta = Eta("auto")
    eta.update("features", 0.5)
    assert eta.progress == pytest.approx(0.25 + 0.25)
    eta.update("train", 0.9, epoch=9)
    assert eta.progress == pytest.approx(0.07 + 0.9 * 0.85)
    assert eta.reached == (3, 9)


def test_half_of_a_job_that_chooses_an_architecture_is_the_choice() -> None:
    eta = Eta("scratch")
    eta.update("select", 0.5)
    assert eta.progress == pytest.approx(0.05 + 0.5 * 0.5)
    eta.update("train", 1.0, epoch=3)
    assert eta.progress == pytest.approx(0.05 + 0.5 + 0.37)
    assert eta.reached == (3, 3)
