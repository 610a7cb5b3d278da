"""A real server under load that is told to stop, or whose device breaks. `benchmarks/lifecycle.py` does the first fifty times."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from support.live_server import _read_until
from support.live_server import weights as weights

from benchmarks import lifecycle, rig
from service.server import EXIT_DEVICE_LOST


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("server")
    rig.publish_random(root / "weights", [lifecycle.NETWORK])
    return root


@pytest.mark.abuse("G11")
def test_told_to_stop_under_load_it_answers_all_that_was_sent_before(root: Path) -> None:
    found = lifecycle.terminate(root, 2)
    assert (found["lost"], found["exit_codes"]) == (0, {"0": 2})
    assert found["sent_before"]["200"] > lifecycle.CALLERS
    assert set(found["sent_before"]) <= {"200", "503"}


@pytest.mark.abuse("G11")
def test_told_twice_under_load_it_leaves_at_once(root: Path) -> None:
    found = lifecycle.terminate(root, 1, signals=2)
    assert found["exit_codes"] in ({"1": 1}, {"0": 1})  # 0: it was through before the second signal
    assert found["left_s"]["median"] < 5


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["assert", "hang", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def broken(
    request: pytest.FixtureRequest, weights: Path, tmp_path: Path
) -> "Iterator[tuple[str, str, Path, subprocess.Popen[bytes]]]":
    """A server whose device asserts, or hangs, once the file is there: what it does, its URL, the file, the process."""
    file, log, fault = tmp_path / "break", tmp_path / "serve.log", request.param
    command = [sys.executable, str(Path(__file__).parent / "support" / "faulty_server.py"), str(file), fault, "serve"]
    device = "cuda:0" if fault == "cuda" else "cpu"
    command += ["--port", "0", "--engine", "torch", "--device", device, "--max-batch", "1", "--timeout-ms", "3000"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--weights", str(weights), "--data", str(tmp_path / "data")], stderr=out)
    try:
        url = _read_until(process, log, r"listening on (\S+)")
        _read_until(process, log, r"ready in [\d.]+ s: (\w+)")
        yield fault, url, file, process
    finally:
        process.kill()
        process.wait()


def ask(url: str) -> str:
    """The code of the error, or what happened to the connection."""
    try:
        answer = httpx.post(f"{url}/predict", content=rig.noise(lifecycle.SIDE), timeout=60)
    except httpx.TransportError as error:
        return type(error).__name__
    return str(answer.json().get("error", {}).get("code", "ok"))


@pytest.mark.abuse("G6", "G7")
def test_a_device_that_breaks_ends_the_process_for_its_supervisor(
    broken: "tuple[str, str, Path, subprocess.Popen[bytes]]", tmp_path: Path
) -> None:
    fault, url, file, process = broken
    heard = [ask(url)]
    file.touch()
    callers = [threading.Thread(target=lambda: heard.append(ask(url))) for _ in range(8)]
    for caller in callers:
        caller.start()
    assert process.wait(60) == EXIT_DEVICE_LOST
    for caller in callers:
        caller.join()
    told = {"deadline_exceeded", "RemoteProtocolError", "ReadError"} if fault == "hang" else {"device_lost"}
    assert heard[0] == "ok"
    assert set(heard[1:]) <= told
    assert "a device is lost or hangs" in (tmp_path / "serve.log").read_text()
