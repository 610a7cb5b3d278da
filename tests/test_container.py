"""The permissions of the container: compose.yaml, the Dockerfile and docs/guide/docker-kubernetes.md."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.live_server import _read_until
from support.live_server import weights as weights

from service.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAGE = (ROOT / "docs" / "guide" / "docker-kubernetes.md").read_text()


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads Compose's tag `!reset` as None."""


Loader.add_constructor("!reset", lambda loader, node: None)


def service_of(name: str) -> Any:
    """The service `imago` in a compose file, with the defaults of its variables."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / name).read_text())
    return yaml.load(text, Loader)["services"]["imago"]


@pytest.fixture(scope="module")
def compose() -> Any:
    return service_of("compose.yaml")


@pytest.mark.abuse("J18")
def test_compose_gives_the_container_nothing_it_does_not_need(compose: Any) -> None:
    assert (compose["read_only"], compose["cap_drop"], compose.get("cap_add"), compose.get("privileged")) == (
        True,
        ["ALL"],
        None,
        None,
    )
    assert compose["security_opt"] == ["no-new-privileges:true"]
    assert all(re.fullmatch(r"/tmp:size=\d+m,.*", mount) for mount in compose["tmpfs"])
    assert int(compose["pids_limit"]) > 0
    assert re.fullmatch(r"\d+g", compose["mem_limit"])
    assert compose["ports"] == ["127.0.0.1:8000:8000"]


@pytest.mark.abuse("J18")
def test_compose_mounts_datasets_read_only_and_nothing_of_the_host_besides(compose: Any) -> None:
    mounts = [mount.split(":") for mount in compose["volumes"]]
    from_host = [mount for mount in mounts if mount[0].startswith((".", "/", "~"))]
    assert from_host == [["./datasets", "/var/lib/imago/datasets", "ro"]]
    writable = {mount[1] for mount in mounts if mount[2:] != ["ro"]}
    assert writable == {compose["environment"]["IMAGO_WEIGHTS"], compose["environment"]["IMAGO_DATA"]}
    assert compose["environment"]["TMPDIR"] in writable


@pytest.mark.abuse("J18")
def test_there_is_time_to_drain(compose: Any) -> None:
    drain_s = Settings.model_fields["drain_seconds"].default
    assert int(compose["stop_grace_period"].removesuffix("s")) > drain_s + 5
    assert re.findall(r"^STOPSIGNAL (\w+)", DOCKERFILE, re.MULTILINE) == ["SIGTERM"]


@pytest.mark.abuse("J18")
def test_the_image_runs_as_nobody_in_particular_and_says_how_it_is() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)", final, re.MULTILINE) == ["imago"]
    assert re.search(r"useradd --uid 10001 .*--shell /usr/sbin/nologin imago", final)
    assert re.search(r'^HEALTHCHECK .*\n +CMD \["python3", "-m", "service.system.healthcheck"\]$', final, re.MULTILINE)
    assert not re.search(r"(KEY|PASSWORD|TOKEN|SECRET)\s*=|chmod|\bADD\b|curl .*\|", DOCKERFILE)


@pytest.mark.abuse("J18")
def test_the_page_says_the_same_for_docker_run(compose: Any) -> None:
    (run,) = re.findall(r"\$ docker run (.*?)```", PAGE, re.DOTALL)
    said = " ".join(run.replace("\\\n", " ").split())
    wanted = [f"--tmpfs {compose['tmpfs'][0]}", "--read-only", "--cap-drop ALL", "--security-opt no-new-privileges"]
    wanted += [f"--pids-limit {compose['pids_limit']}", f"--memory {compose['mem_limit']}", "--init"]
    wanted += [f"--stop-timeout {compose['stop_grace_period'].removesuffix('s')}", "/var/lib/imago/datasets:ro"]
    wanted += [f"-e TMPDIR={compose['environment']['TMPDIR']}"]
    assert [flag for flag in wanted if flag not in said] == []


# GPUs


def test_compose_reserves_every_gpu_and_fails_where_none_works(compose: Any) -> None:
    [device] = compose["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert compose["environment"]["IMAGO_DEVICE"] == "cuda"


def test_compose_has_shared_memory_for_nccl(compose: Any) -> None:
    assert compose["shm_size"] == "1g"
    assert "--shm-size 1g" in PAGE


def test_the_page_names_the_device_for_docker_run() -> None:
    (run,) = re.findall(r"\$ docker run (.*?)```", PAGE, re.DOTALL)
    assert "--gpus all" in run
    assert "-e IMAGO_DEVICE=cuda" in run


def test_the_override_for_a_cpu_reserves_no_gpu(compose: Any) -> None:
    override = service_of("deploy/compose.cpu.yaml")
    merged = {**compose, **override, "environment": {**compose["environment"], **override["environment"]}}
    assert merged["deploy"] is None
    assert merged["build"]["args"] == {"TORCH": "cpu"}
    assert merged["environment"]["IMAGO_DEVICE"] == "cpu"
    assert merged["image"] != compose["image"]  # the two variants do not replace each other


def image_environment() -> dict[str, str]:
    """What ENV sets in the final image."""
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    lines = re.findall(r"^ENV ((?:.*\\\n)*.*)$", final, re.MULTILINE)
    return dict(pair.split("=", 1) for line in lines for pair in shlex.split(line.replace("\\\n", " ")))


def test_the_image_asks_for_the_driver_that_its_cuda_needs() -> None:
    """torch's CUDA 13 runs on every driver of CUDA 13, from 580 on."""
    [version] = re.findall(r"^cuda-toolkit==(\d+)\.", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    environment = image_environment()
    assert environment["NVIDIA_REQUIRE_CUDA"] == f"cuda>={version}.0"
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_the_image_takes_no_gpu_by_itself() -> None:
    """A pod without a GPU would see them all where nvidia is the default runtime; so does an image with CUDA_VERSION alone."""
    assert image_environment().keys().isdisjoint({"NVIDIA_VISIBLE_DEVICES", "CUDA_VERSION", "NVIDIA_DISABLE_REQUIRE"})


def test_compiled_kernels_are_kept_where_the_image_can_write() -> None:
    environment = image_environment()
    assert environment["CUDA_CACHE_PATH"].startswith(f"{environment['IMAGO_DATA']}/")


@pytest.mark.abuse("J18")
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="root alone makes the root file system read-only"
)
def test_it_serves_where_only_weights_and_data_can_be_written(weights: Path, tmp_path: Path) -> None:
    """With everything else mounted read-only, in a mount namespace of its own."""
    written = tmp_path / "written"
    shutil.copytree(weights, written / "weights")
    serve = (
        f"{sys.executable} -m service.cli serve --port 0 --device cpu --weights {written}/weights --data {written}/data"
    )
    script = f"mount --bind {written} {written} && mount -o remount,bind,ro / && ! touch /x 2>&- && exec {serve}"
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stderr=log, env={**os.environ, "TMPDIR": str(written)}
        )
    try:
        url = _read_until(process, tmp_path / "serve.log", r"listening on (\S+)")
        _read_until(process, tmp_path / "serve.log", r"ready in [\d.]+ s: (\w+)")
        assert httpx.get(f"{url}/health/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
