"""`imago doctor`: what it finds, what it says is wrong, and what it never shows."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from pydantic import SecretStr
from support.fake_driver import NO_DRIVER, Card, with_gpus, without_gpu
from support.live_server import weights as weights

from service.cli import main
from service.diagnostics import doctor
from service.http.auth import admin_key_of
from service.settings import Settings

KEY, PASSWORD = "the-admin-key-" + "k" * 32, "a-long-password"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a sound store and nothing else, where no server runs, and with no setting around."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"IMAGO_{name.upper()}", raising=False)
    monkeypatch.setenv("IMAGO_PORT", str(free_port()))
    monkeypatch.setenv("IMAGO_DEVICE", "cpu")
    shutil.copytree(weights, "weights")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *words], prog_name="imago")


def examined(*words: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the sections."""
    result = run("--json", *words)
    found = json.loads(result.stdout)
    assert found["ok"] == (result.exit_code == 0)
    return result.exit_code, found["sections"]


def problems(sections: dict[str, Any]) -> dict[str, list[str]]:
    return {name: section["problems"] for name, section in sections.items() if section["problems"]}


def test_a_sound_installation_has_no_problem() -> None:
    code, sections = examined()
    assert (code, problems(sections), list(sections)) == (0, {}, list(doctor.SECTIONS))
    assert sections["versions"]["facts"]["imago"] == version("imago")
    assert sections["store"]["facts"] == {"insects": "versions 1, 1 serves", "default": "insects"}
    assert sections["torch"]["facts"]["cpu"] == "computes"
    assert sections["settings"]["facts"].keys() == {"port", "device", "others"}


def test_a_person_reads_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", {"folders": doctor._folders, "server": doctor._server})
    Path("data").write_text("in the way")
    result = run()
    assert result.exit_code == 1
    assert "  ! the data folder is not a folder; `imago serve` needs it" in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == "1 problem found"


def damage_weights() -> None:
    (path,) = Path("weights/backbones").glob("*/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def damage_head() -> None:
    Path("weights/models/insects/1/head.safetensors").unlink()


def damage_config() -> None:
    Path("weights/models/insects/1/config.json").write_text("{")


def damage_serving() -> None:
    Path("weights/serving.json").write_text("no JSON")


def lose_version() -> None:
    shutil.rmtree("weights/models/insects")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(damage_weights, "insects@1: the weights of lenet5-", id="weights"),
        pytest.param(damage_head, "insects@1: head.safetensors is missing", id="head"),
        pytest.param(damage_config, "config.json is damaged", id="configuration"),
        pytest.param(damage_serving, "serving.json is damaged", id="record"),
        pytest.param(lose_version, "insects@1 is to be served, and is not in the store", id="version"),
    ],
)
def test_a_broken_store_is_said_to_be(damage: Callable[[], None], message: str) -> None:
    damage()
    code, sections = examined()
    assert (code, set(problems(sections))) == (1, {"store"})
    assert message in problems(sections)["store"][0]


def test_a_record_without_its_hash_is_a_warning() -> None:
    path = Path("weights/models/insects/1/config.json")
    fields = json.loads(path.read_text())
    del fields["record_sha256"]
    path.write_text(json.dumps(fields))
    code, sections = examined()
    assert (code, problems(sections)) == (0, {})
    assert "insects@1: its record has no hash" in sections["store"]["warnings"][0]


def test_without_torch_all_but_torch_and_store_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "models.store.store")
    monkeypatch.delitem(sys.modules, "models.classifier")
    code, sections = examined()
    assert (code, set(problems(sections))) == (1, {"torch", "store"})
    assert "torch" in problems(sections)["store"][0]


def test_a_device_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, sections = examined("--device", "cuda:7")
    assert (code, set(problems(sections))) == (1, {"torch"})
    assert "device cuda:7 cannot be used" in problems(sections)["torch"][0]


# GPUs

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040)."
NVIDIA_SMI = """#!/bin/sh
case "$1" in
  --query-gpu=index) echo 0 ;;
  --query-gpu=*) echo "0, Tesla V100-SXM2-16GB, 550.54.15, 16384 MiB, 15000 MiB" ;;
  *) echo "4711, /usr/bin/python3, 14500 MiB" ;;
esac
"""


def has_driver(monkeypatch: pytest.MonkeyPatch, script: str = NVIDIA_SMI) -> None:
    """The driver's tool is installed."""
    Path("bin").mkdir()
    Path("bin/nvidia-smi").write_text(script)
    Path("bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")


def has_card(monkeypatch: pytest.MonkeyPatch, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    """The PCI bus shows one."""
    device = Path("pci/0000:17:00.0")
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(doctor, "PCI", Path("pci"))


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a card nor a driver's tool, also where the tests run on a machine with a GPU."""
    which = shutil.which
    monkeypatch.setattr(doctor, "PCI", tmp_path / "no-bus")
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if Path("bin").exists() else None)


def torch_section(*words: str) -> tuple[int, dict[str, Any]]:
    code, sections = examined(*words)
    assert set(problems(sections)) <= {"torch"}
    return code, sections["torch"]


def file_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / "dev").mkdir(exist_ok=True)
    (tmp_path / "dev" / name).touch()
    return tmp_path


def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, NO_DRIVER, tmp_path, library=False)


def old_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, TOO_OLD, tmp_path)


def closed_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, "No CUDA GPUs are available", file_of(tmp_path, "nvidiactl"))
    access = os.access  # root may open everything
    monkeypatch.setattr(os, "access", lambda path, mode: "/dev/" not in str(path) and access(path, mode))


def old_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_gpus(monkeypatch, Card((7, 0)))


def full_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_gpus(monkeypatch, Card(error=torch.OutOfMemoryError("CUDA out of memory")))


def taken_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    with_gpus(monkeypatch, Card(error=torch.AcceleratorError(text)))


CAUSES = [
    pytest.param(no_driver, ("there is no NVIDIA driver", "install one"), id="no driver"),
    pytest.param(old_driver, ("too old for CUDA 13.2", "580 or later"), id="driver too old"),
    pytest.param(closed_files, ("no permission", "group"), id="no permission"),
    pytest.param(old_card, ("sm_70", "sm_75, sm_80", "another GPU"), id="card too old"),
    pytest.param(full_card, ("no memory is free", "nvidia-smi"), id="memory taken"),
    pytest.param(taken_card, ("taken by another process", "nvidia-smi -c DEFAULT"), id="exclusive"),
]


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize(("machine", "said"), CAUSES)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
def test_a_gpu_that_cannot_be_used_is_a_problem_with_cause_and_remedy(
    device: str,
    machine: Callable[[pytest.MonkeyPatch, Path], None],
    said: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With `auto` where the driver's own tool shows the card: the server would run on the CPU."""
    has_driver(monkeypatch)
    machine(monkeypatch, tmp_path)
    code, section = torch_section("--device", device)
    assert code == 1
    [problem] = section["problems"]
    assert [words for words in said if words not in problem] == []
    assert ("runs on the CPU" in problem) == (device == "auto")


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_asked_for_and_is_not_there_is_a_problem(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_driver(monkeypatch, tmp_path)
    code, section = torch_section("--device", device)
    assert (code, len(section["problems"])) == (1, 1)


@pytest.mark.usefixtures("no_card")
def test_a_card_without_a_driver_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has_card(monkeypatch)
    no_driver(monkeypatch, tmp_path)
    code, section = torch_section("--device", "auto")
    assert (code, section["problems"]) == (0, [])
    [warning] = section["warnings"]
    assert "the server runs on the CPU: there is no NVIDIA driver; install one" in warning
    assert run("--device", "auto").stdout.splitlines()[-1] == "no problems found, 1 warning"


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize(
    ("variable", "cuda"), [pytest.param("", "13.2", id="hidden"), pytest.param(None, None, id="torch without CUDA")]
)
def test_what_may_be_meant_is_a_warning(
    variable: str | None, cuda: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_driver(monkeypatch)
    without_gpu(monkeypatch, "No CUDA GPUs are available", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    code, section = torch_section("--device", "auto")
    assert (code, section["problems"], len(section["warnings"])) == (0, [], 1)


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize(
    ("vendor", "kind"),
    [pytest.param("0x8086", "0x030000", id="another maker"), pytest.param("0x10de", "0x020000", id="no GPU")],
)
def test_a_machine_without_a_card_has_nothing_wrong(
    vendor: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_card(monkeypatch, vendor, kind)
    no_driver(monkeypatch, tmp_path)
    code, section = torch_section("--device", "auto")
    assert (code, section["problems"], section["warnings"]) == (0, [], [])
    assert section["facts"]["GPU"] == "none: there is no NVIDIA driver"


@pytest.mark.usefixtures("no_card")
def test_one_of_two_gpus_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    has_driver(monkeypatch)
    with_gpus(monkeypatch, Card(), Card((7, 0)))
    monkeypatch.setattr(doctor, "_computes", lambda device: "computes")
    code, section = torch_section("--device", "auto")
    assert (code, section["facts"]["cuda:0"]) == (1, "computes")
    [problem] = section["problems"]
    assert problem.startswith("cuda:1 is not used: cuda:1 (Tesla T1000, sm_70) is too old")


@pytest.mark.usefixtures("no_card")
def test_what_the_driver_shows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    has_driver(monkeypatch)
    has_card(monkeypatch)
    facts = examined()[1]["GPUs"]["facts"]
    assert facts == {
        "card 0000:17:00.0": "NVIDIA",
        "GPU 0": "Tesla V100-SXM2-16GB, driver 550.54.15, 16384 MiB, 15000 MiB used",
        "process 4711": "/usr/bin/python3 uses 14500 MiB of GPU memory",
    }


@pytest.mark.usefixtures("no_card")
def test_a_driver_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    has_driver(monkeypatch, "#!/bin/sh\necho No devices were found\nexit 6\n")
    code, sections = examined()
    assert (code, problems(sections)) == (1, {"GPUs": ["RuntimeError: nvidia-smi fails: No devices were found"]})


def test_a_setting_that_is_refused_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGO_PROT", "1")
    _, sections = examined()
    assert "IMAGO_PROT" in sections["settings"]["problems"][0]
    assert sections["store"]["facts"]["default"] == "insects"


def jobs_database(content: bytes | None = None) -> None:
    Path("data").mkdir()
    if content is not None:
        Path("data/jobs.sqlite").write_bytes(content)
        return
    with sqlite3.connect("data/jobs.sqlite") as database:
        database.execute("CREATE TABLE imago_jobs (status TEXT)")
        database.execute("INSERT INTO imago_jobs VALUES ('failed'), ('failed'), ('running')")
    database.close()


def test_jobs_are_counted_in_a_sound_database() -> None:
    jobs_database()
    code, sections = examined()
    facts = sections["jobs"]["facts"]
    assert (code, facts["failed"], facts["running"]) == (0, 2, 1)


def test_a_damaged_database_is_a_problem() -> None:
    jobs_database(b"no database " * 1000)
    code, sections = examined()
    assert (code, problems(sections)) == (1, {"jobs": ["DatabaseError: file is not a database"]})


KILLED = """
import os, sqlite3
database = sqlite3.connect("data/jobs.sqlite")
database.execute("PRAGMA cache_size = 1")
database.executemany("INSERT INTO imago_jobs VALUES (?)", [("x" * 500,)] * 2000)
os._exit(0)
"""


def test_what_a_killed_server_left_half_done_is_no_problem() -> None:
    jobs_database()
    subprocess.run([sys.executable, "-c", KILLED], check=True)
    assert Path("data/jobs.sqlite-journal").exists()
    code, sections = examined()
    assert (code, "takes that back" in sections["jobs"]["facts"]["state"]) == (0, True)


def test_a_key_that_others_can_read_is_a_problem() -> None:
    admin_key_of(Path("data"))
    assert examined()[0] == 0
    Path("data/admin.key").chmod(0o644)
    code, sections = examined()
    assert (code, "chmod 600" in problems(sections)["folders"][0]) == (1, True)


class NotReady(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b"the default model is still loading")

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def loading() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), NotReady) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_server_that_is_not_ready_says_why(loading: int) -> None:
    code, sections = examined("--host", "0.0.0.0", "--port", str(loading))
    assert (code, "still loading" in problems(sections)["server"][0]) == (1, True)


SECRETS = {
    "IMAGO_ADMIN_KEY": KEY,
    "IMAGO_API_KEY": "the-api-key-of-users",
    "IMAGO_JOBS_DATABASE": f"postgresql://imago:{PASSWORD}@127.0.0.1:9/imago",
    "IMAGO_WEIGHTS_URL": "http://someone:mirror-password@mirror.example/weights",
}


@pytest.mark.abuse("J1")
@pytest.mark.parametrize(
    "wrong", [pytest.param({}, id="good settings"), pytest.param({"IMAGO_PROT": "1"}, id="refused")]
)
def test_no_key_is_ever_shown(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, **wrong}.items():
        monkeypatch.setenv(name, value)
    said = run().stdout + run("--json").stdout + admin_key_hidden()
    shown = (KEY, "the-api-key", PASSWORD, "mirror-password")
    assert [secret for secret in shown if secret in said] == []


def admin_key_hidden() -> str:
    """What is said where the key is in the data folder; the key itself must not be in it."""
    key = admin_key_of(Path("data"))
    said = run().stdout
    assert key not in said
    return said


def test_what_a_message_quotes_is_masked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def quoting(section: doctor.Section, settings: Settings) -> None:
        raise RuntimeError(f"could not use {KEY} at http://me:secret@host/")

    monkeypatch.setattr(doctor, "SECTIONS", {"quoting": quoting})
    [section] = doctor.examine({"admin_key": SecretStr(KEY)})
    assert section.problems == [f"RuntimeError: could not use {doctor.MASK} at http://{doctor.MASK}@host/"]
