"""What the GPU check makes of its figures, and the rehearsal of each check on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from models.data import dataset
from models.preprocessing import Preprocessing
from models.runtime.torch_engine import TorchEngine
from models.store.store import ModelStore
from service.diagnostics.gpu_check import errors, facts, pictures, server
from service.diagnostics.gpu_check.measures import (
    agreement,
    batches,
    graphs,
    jobs,
    memory,
    own_tests,
    serving,
    shapes,
    transfers,
)
from service.diagnostics.gpu_check.records import Measurement
from service.diagnostics.gpu_check.server import RunningServer
from service.diagnostics.gpu_check.session import TINY, Session
from service.diagnostics.load_generator import LoadReport

pytestmark = pytest.mark.system


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(torch.device("cpu"), tmp_path, rehearse=True)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Verdicts


@pytest.mark.parametrize(
    ("pageable", "pinned", "registered", "problems"),
    [
        pytest.param(12.0, 54.0, 53.0, 0, id="as expected"),
        pytest.param(60.0, 58.0, 58.0, 0, id="memory that both share"),
        pytest.param(12.0, 54.0, 12.0, 1, id="registered is not pinned"),
        pytest.param(12.0, 6.0, 6.0, 1, id="pinned is slow"),
    ],
)
def test_transfers(pageable: float, pinned: float, registered: float, problems: int) -> None:
    rates = {"pageable_gb_s": pageable, "pinned_gb_s": pinned, "registered_gb_s": registered}
    assert len(transfers.judged(rates).problems) == problems


@pytest.mark.parametrize(
    ("waits", "problems"),
    [
        pytest.param((1.0, 1.0, 1.0), (), id="one a batch"),
        pytest.param((2.0, 4.0, 201.0), ("a batch with 100 heads waits 201.0 times",), id="one a head"),
        pytest.param((9.0, 9.0, 9.0), ("a batch with one head waits 9.0 times",), id="many in any case"),
    ],
)
def test_waits_by_heads(waits: tuple[float, ...], problems: tuple[str, ...]) -> None:
    figures = {heads: {"waits": count, "ms": 5.0} for heads, count in zip((1, 2, 100), waits, strict=True)}
    assert batches.judged(figures, 64).problems == problems


@pytest.mark.parametrize(
    ("cold", "grown", "problems"),
    [
        pytest.param(13, 120, 0, id="batches are padded"),
        pytest.param(45, 90, 1, id="every size is planned anew"),
        pytest.param(13, 2000, 1, id="the plans take the memory"),
    ],
)
def test_cold_shapes(cold: int, grown: int, problems: int) -> None:
    found = {"cold": cold, "cold_ms": 300, "host_memory_mb": grown}
    assert len(shapes.judged({"thread_1": found, "thread_2": found}, 45).problems) == problems


def test_cold_is_what_is_slow_the_first_time_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([20.0, 5.0, 6.0, 5.0, 300.0, 250.0])
    monkeypatch.setattr(shapes, "_pass_ms", lambda *given: next(times))
    monkeypatch.setattr(shapes, "random_pixels", lambda size, backbone: None)
    runtime: Any = None
    found = shapes._walk(session, runtime, runtime, (1, 2, 3))
    assert (found["cold"], found["cold_ms"]) == (1, 15)


def test_agreement_holds_for_the_precision_that_is_chosen() -> None:
    found = {"float32": 2e-6, "float16": 0.9, "chosen": "bfloat16", "chosen_difference": 0.05}
    assert agreement.disagreements("densenet121", found) == []
    assert len(agreement.disagreements("densenet121", found | {"chosen": "float16"})) == 1
    assert len(agreement.disagreements("densenet121", found | {"float32": float("nan")})) == 1


@pytest.mark.parametrize(
    ("failures", "difference", "gain", "problems"),
    [
        pytest.param([], 0.0, 2.0, 0, id="as expected"),
        pytest.param(["RuntimeError"], 0.0, 2.0, 1, id="serving broke"),
        pytest.param([], 0.5, 0.5, 2, id="other features, slower"),
    ],
)
def test_graphs(failures: list[str], difference: float, gain: float, problems: int) -> None:
    sizes = {size: {"difference": difference, "graph_ms": 1.0, "eager_ms": gain} for size in ("1", "256")}
    figures = {"capture_seconds": 2.0, "memory_mb": 300, "failures": failures, "sizes": sizes}
    assert len(graphs.judged(figures).problems) == problems


def load(**changed: Any) -> dict[str, Any]:
    figures = {"images_per_s": 600.0, "p50_ms": 5.0, "p99_ms": 9.0, "gpu_percent": 8, "failed": 0}
    return {**figures, "statuses": {"200": 9}, "errors": {}, **changed}


def test_a_request_that_fails_under_load_is_a_problem() -> None:
    assert serving.judged({"callers_1": load(), "callers_32": load()}).problems == ()
    measured = serving.judged({"callers_256": load(failed=3, statuses={"503": 3})})
    assert measured.problems == ("requests failed, by callers: {'256': {'503': 3}}",)
    assert measured.summary == "256 callers 600 images/s, p50 5.0 ms, GPU 8 %"


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        pytest.param({}, 0, id="as expected"),
        pytest.param({"memory_after_mb": 4000}, 1, id="a backbone is left behind"),
        pytest.param({"rate_busy": 900.0}, 1, id="measured beside serving"),
        pytest.param({"rate_busy": None}, 0, id="not measured"),
        pytest.param({"swap_errors": ["422"]}, 1, id="a swap failed"),
        pytest.param({"swapping": load(failed=1)}, 1, id="a request failed"),
    ],
)
def test_swaps(changed: dict[str, Any], problems: int) -> None:
    figures = {"quiet": load(), "swapping": load(), "memory_served_mb": 2000, "memory_peak_mb": 2900}
    figures |= {"memory_after_mb": 2100, "rate_idle": 9000.0, "rate_busy": 8000.0, "swap_seconds": [2.0]}
    assert len(serving.judged_swap({**figures, "swap_errors": [], **changed}).problems) == problems


# Jobs


class FakeServer:
    """Answers `ask` from a list, and remembers what was asked for."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[tuple[str, str]]()

    def ask(self, method: str, path: str, **more: Any) -> Any:
        self.asked.append((method, path))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_job_is_followed_to_its_end() -> None:
    running = {"id": "ftjob-1", "terminal": False, "phase": "train"}
    fake: Any = FakeServer(running, running, {"terminal": True, "status": "succeeded"})
    assert jobs.finished(fake, {}, 9.0)["status"] == "succeeded"
    assert fake.asked == [("POST", "/finetune"), ("GET", "/finetune/ftjob-1"), ("GET", "/finetune/ftjob-1")]


def test_a_job_that_takes_too_long_is_an_error() -> None:
    fake: Any = FakeServer(*[{"id": "ftjob-1", "terminal": False, "phase": "train"}] * 3)
    with pytest.raises(TimeoutError, match="at train after 0 s"):
        jobs.finished(fake, {}, 0.0)


def test_the_share_of_unseen_images_that_are_right() -> None:
    answer = {"results": [{"predictions": [{"label": "rings"}]}]}
    fake: Any = FakeServer(*[answer] * 2 * jobs.UNSEEN)
    assert jobs.right(fake) == 0.5


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        pytest.param({}, 0, id="as expected"),
        pytest.param({"deployment": "rejected: it answers other probabilities"}, 1, id="rejected"),
        pytest.param({"status": "failed", "deployment": None, "right": None}, 2, id="failed"),
        pytest.param({"right": 0.5}, 1, id="guessing"),
        pytest.param({"right": 0.5, "rehearsal": True}, 0, id="guessing in a rehearsal"),
    ],
)
def test_a_head_job(changed: dict[str, Any], problems: int) -> None:
    figures = {"status": "succeeded", "deployment": "activated", "seconds": 20.0, "right": 1.0, "error": None}
    assert len(jobs.judged({**figures, "rehearsal": False, **changed}).problems) == problems


def test_a_network_job() -> None:
    run = {"deployment": "activate", "reason": "none is served", "precision": "bfloat16"}
    figures = {"runs": [run, run], "same_weights": True, "waits_per_step": 1.2, "images_per_s": 900.0}
    assert jobs.judged_network(figures).problems == ()
    worse = {"runs": [run, run | {"deployment": "rejected"}], "same_weights": False, "waits_per_step": 9.0}
    assert len(jobs.judged_network(figures | worse).problems) == 3


def test_swaps_end_at_the_first_that_fails() -> None:
    fake: Any = FakeServer({}, httpx.HTTPError("422 out of memory"))
    with serving.Swaps(fake, "resnet50", 4) as swaps:
        pass
    assert (len(swaps.seconds), swaps.errors) == (1, ["422 out of memory"])


def test_the_rate_of_the_engine_that_was_chosen() -> None:
    candidates = [
        {"precision": "float16", "rates": {"1": 300.0, "64": 9000.0}},
        {"precision": "bfloat16", "rates": {"1": 299.0}},
        {"precision": "float32", "rates": {}},
    ]
    runtime = {"precision": "float16", "candidates": candidates}
    fake: Any = FakeServer(*[{"backbones": [{"runtime": {"cuda:0": runtime}}]}] * 2)
    assert serving.best_rate(fake, "resnet50") == 9000.0
    candidates.clear()
    assert serving.best_rate(fake, "resnet50") is None


# Images


def test_generated_images_make_a_dataset_without_duplicates(tmp_path: Path) -> None:
    folder = pictures.two_classes(tmp_path / "shapes", 12)
    found = dataset.load(folder, Preprocessing(resize=32, crop=32), val_fraction=0.2, seed=0)
    assert found.classes == pictures.CLASSES
    assert (found.audit.totals["duplicates"], found.audit.totals["conflicts"], found.audit.totals["bad"]) == (0, 0, 0)


def test_a_photograph_has_the_size_of_one(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(data := pictures.photograph(0))
    with Image.open(tmp_path / "photo.jpg") as image:
        assert image.size == (500, 375)
    assert 40_000 < len(data) < 200_000


# The rehearsal


@pytest.mark.parametrize(
    "check",
    [
        facts.facts,
        errors.errors,
        agreement.agreement,
        agreement.batch_invariance,
        batches.heads,
        shapes.cold_shapes,
        graphs.beside_python,
    ],
)
def test_the_rehearsal_of_a_check_passes(check: Any, session: Session) -> None:
    measured: Measurement = check(session)
    assert (measured.problems, measured.skipped) == ((), None)
    assert measured.summary
    assert measured.figures


def test_another_precision_is_chosen_where_a_kernel_is_missing(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchEngine, "__call__", TorchEngine.__call__)  # the check replaces it for good
    measured = errors.missing_kernel(session)
    assert measured.problems == ()
    assert measured.skipped or measured.figures["chosen"] != measured.figures["preferred"]


@pytest.mark.parametrize(
    "check",
    [
        transfers.transfers,
        memory.out_of_memory_loading,
        batches.out_of_memory_serving,
        graphs.graphs,
        own_tests.own_tests,
    ],
)
def test_checks_that_need_a_gpu_skip_in_a_rehearsal(check: Any, session: Session) -> None:
    assert check(session).skipped == "needs a GPU"


def test_a_network_is_trained_and_measured(session: Session) -> None:
    base, data = server.default_store(session), pictures.two_classes(session.folder / "shapes", 8)
    found = jobs.trained(session, ModelStore(session.folder / "weights"), base, data, 0, epochs=1)
    assert (found["deployment"], found["steps"], found["train_images"], found["waits"]) == ("activate", 1, 12, 0)


def test_a_server_is_started_fed_and_ended(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, on a tiny network."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    seen: list[RunningServer] = []

    def load_once(session: Session, running: RunningServer, bodies: list[bytes], callers: int) -> dict[str, Any]:
        seen.append(running)
        report: LoadReport = running.load(bodies, callers, 0.2)
        return {**serving.answers(report), "gpu_percent": None, "cpu": running.cpu_seconds()}

    monkeypatch.setattr(serving, "under_load", load_once)
    measured = serving.serve(session)
    assert measured.problems == ()
    assert measured.figures["callers_1"]["requests"] > 0
    assert measured.figures["callers_1"]["cpu"] > 0
    assert measured.figures["runtime"]["device"] == "cpu"
    assert seen[0].process.returncode == 0
    assert ModelStore(session.folder / "weights").names() == [TINY]


def test_a_server_that_does_not_start_says_why(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    wrong = server.serving(session, session.folder, "--wieghts", "x")
    with pytest.raises(RuntimeError, match=r"(?s)ended with 2: .*--wieghts"), wrong:
        pass
