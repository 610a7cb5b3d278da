"""The diary of a job, and its progress."""

import time
from pathlib import Path

import pytest

from service.jobs.events import Tail, append
from service.jobs.pace import Pace


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


def test_progress_never_falls_and_the_estimate_comes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace, seen = Pace("finetune", progress=0.05), []
    for step in range(1, 11):
        clock[0] += 10
        pace.update("train", step / 10)
        seen.append((pace.progress, pace.eta_seconds or 0.0))
    assert seen == sorted(seen, key=lambda s: (s[0], -s[1]))
    assert seen[4][1] == pytest.approx(50, rel=0.5)  # seconds: half of the epochs are done after 50
    pace.update("audit", 0.1)
    assert pace.progress == seen[-1][0]


def test_auto_is_a_head_until_an_epoch_says_otherwise() -> None:
    pace = Pace("auto")
    pace.update("features", 0.5)
    assert pace.progress == pytest.approx(0.25 + 0.25)
    pace.update("train", 0.9, epoch=9)
    assert pace.progress == pytest.approx(0.07 + 0.9 * 0.85)
    assert pace.reached == (3, 9)


def test_half_of_a_job_that_chooses_an_architecture_is_the_choice() -> None:
    pace = Pace("scratch")
    pace.update("select", 0.5)
    assert pace.progress == pytest.approx(0.05 + 0.5 * 0.5)
    pace.update("train", 1.0, epoch=3)
    assert pace.progress == pytest.approx(0.05 + 0.5 + 0.37)
    assert pace.reached == (3, 3)
