"""Collects what a bug report needs, and what is wrong here, in independent sections.

A failure in a section is one of its problems, and never stops the others. Torch comes late, because a broken one may end the process. No
key is shown: secrets are masked, also in messages that quote them.
"""

import math
import os
import platform
import re
import shutil
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from pydantic import SecretStr

from models.files import cgroup
from service.settings import PREFIX, Settings, SettingsError

if TYPE_CHECKING:
    import torch

OPTIONAL = ("openvino", "opentelemetry-sdk", "psycopg")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
PCI = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # a PCI device's vendor, and how the class of a GPU begins
MEANT = ("torch_without_cuda", "gpu_hidden")  # codes of a GpuProblem that somebody may have chosen
MIN_FREE_MB = 256  # below it uploads and jobs are refused
SERVER_S, GPU_S, DATABASE_S = 5, 20, 5
MASK = "********"


@dataclass
class Section:
    """Facts about one subject. `problems` are wrong; `warnings` may be intended."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine(flags: Mapping[str, Any]) -> Iterator[Section]:
    """Yields one section after the other, as each is done. `flags` are settings; None means not given."""
    settings, refused = Settings.model_construct(), None
    try:
        settings = Settings.load(**flags)
    except SettingsError as error:
        refused = f"{error}; the rest is looked at with the default settings"
    secrets = _secrets(settings)
    for name, look in SECTIONS.items():
        section = Section(name)
        try:
            look(section, settings)
        except Exception as error:
            section.problems.append(f"{type(error).__name__}: {error}")
        if name == "settings" and refused is not None:
            section.problems.append(refused)
        yield Section(name, *(_masked(lines, secrets) for lines in (section.facts, section.problems, section.warnings)))


# Sections


def _versions(section: Section, settings: Settings) -> None:
    section.facts |= {"imago": version("imago"), "python": platform.python_version(), "system": platform.platform()}
    required = [re.split(r"[^\w-]", line)[0] for line in requires("imago") or () if "extra ==" not in line]
    for name in (*required, *OPTIONAL):
        try:
            section.facts[name] = version(name)
        except PackageNotFoundError:
            section.facts[name] = "not installed"
            if name not in OPTIONAL:
                section.problems.append(f"{name} is not installed; `make setup`, or install imago again")


def _machine(section: Section, settings: Settings) -> None:
    cpu = dict(re.findall(r"^(model name|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    memory = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    section.facts["processor"] = cpu.get("model name", platform.machine())
    section.facts["cores"] = f"{os.cpu_count()}, of which this process may use {cgroup.cpu_count()}"
    section.facts["flags"] = " ".join(flag for flag in CPU_FLAGS if flag in cpu.get("flags", "").split())
    section.facts["load"] = " ".join(f"{load:.1f}" for load in os.getloadavg())
    section.facts["memory"] = f"{int(memory['MemTotal']) >> 10} MB, {int(memory['MemAvailable']) >> 10} MB available"
    if (quota := cgroup.cpu_quota()) != math.inf:
        section.facts["cpu quota"] = f"{quota:g} cores"
    section.facts["threads"] = (
        f"inference {settings.threads or cgroup.cpu_count()} at most, decoding {settings.decoders}, training {settings.trainer_cores}"
    )
    if (limit := cgroup.memory_limit()) < int(memory["MemTotal"]) << 10:
        section.facts["memory limit"] = f"{limit >> 20} MB"


def _gpus(section: Section, settings: Settings) -> None:
    """Finds GPUs by the driver's own tool, which works without torch; if there is none, by the PCI bus."""
    section.facts |= {f"card {address}": "NVIDIA" for address in _cards()}
    if shutil.which("nvidia-smi") is None:
        section.facts["nvidia-smi"] = "not found: no NVIDIA driver, or not shown to this container"
        return
    for index, name, driver, total, used in _nvidia_smi("gpu", "index,name,driver_version,memory.total,memory.used"):
        section.facts[f"GPU {index}"] = f"{name}, driver {driver}, {total}, {used} used"
    for pid, name, used in _nvidia_smi("compute-apps", "pid,process_name,used_memory"):
        section.facts[f"process {pid}"] = f"{name} uses {used} of GPU memory"


def _nvidia_smi(what: str, columns: str) -> list[list[str]]:
    """Returns rows of a query to the driver's tool; none if there is no such tool. Raises RuntimeError with the tool's message."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    asked = [tool, f"--query-{what}={columns}", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=GPU_S, check=False)  # noqa: S603
    if answer.returncode:
        raise RuntimeError(f"nvidia-smi fails: {(answer.stdout + answer.stderr).strip()}")
    return [line.split(", ") for line in answer.stdout.splitlines()]


def _cards() -> list[str]:
    """Returns the PCI addresses of NVIDIA GPUs. They are visible without a driver, and in a container without access to a GPU."""
    found = []
    for device in sorted(PCI.glob("*")):
        with suppress(OSError):
            kind = (device / "class").read_text()
            if (device / "vendor").read_text().strip() == NVIDIA and kind.startswith(DISPLAY):
                found.append(device.name)
    return found


def _settings(section: Section, settings: Settings) -> None:
    """Returns the settings that differ from the defaults."""
    for name, about in Settings.model_fields.items():
        if (value := getattr(settings, name)) != about.default:
            section.facts[name] = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    section.facts["others"] = f"{len(Settings.model_fields) - len(section.facts)} at their defaults"


def _folders(section: Section, settings: Settings) -> None:
    for name in ("data", "weights", "datasets"):
        folder: Path = getattr(settings, name).resolve()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free_mb = shutil.disk_usage(there).free >> 20
        refused = _refused(there)
        missing = "" if there == folder else "not there yet, "
        section.facts[name] = f"{folder}: {missing}{refused or 'can be written to'}, {free_mb} MB free"
        if name == "data" and refused:
            section.problems.append(f"the data folder {refused}; `imago serve` needs it")
        if name == "data" and free_mb < MIN_FREE_MB:
            section.problems.append(f"the disk of the data folder has {free_mb} MB left; uploads and jobs are refused")
    key = settings.data / "admin.key"
    if key.exists() and (mode := stat.S_IMODE(key.stat().st_mode)) & 0o077:
        section.problems.append(f"{key} can be read by others (mode {mode:o}): chmod 600 it")


def _jobs(section: Section, settings: Settings) -> None:
    if settings.jobs_database is not None:
        _ask_postgresql(section, settings.jobs_database.get_secret_value())
        return
    path = (settings.data / "jobs.sqlite").resolve()
    section.facts["database"] = str(path) if path.exists() else "none yet"
    if not path.exists():
        return
    try:
        _ask_sqlite(section, path)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname != "SQLITE_READONLY_ROLLBACK":
            raise
        section.facts["state"] = "a server was killed in the middle of a change; its next start takes that back"


def _ask_sqlite(section: Section, path: Path) -> None:
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=DATABASE_S)) as database:
        faults = [fault for (fault,) in database.execute("PRAGMA integrity_check(5)")]
        section.problems += [f"{path} is damaged: {fault}" for fault in faults if fault != "ok"]
        section.facts |= database.execute("SELECT status, count(*) FROM imago_jobs GROUP BY status").fetchall()


def _ask_postgresql(section: Section, address: str) -> None:
    import sqlalchemy as sa

    url = sa.make_url(address).set(drivername="postgresql+psycopg")
    section.facts["database"] = url.render_as_string(hide_password=True)
    engine = sa.create_engine(url, connect_args={"connect_timeout": DATABASE_S}, poolclass=sa.NullPool)
    with engine.connect() as connection:
        if sa.inspect(connection).has_table("imago_jobs"):
            rows = connection.execute(sa.text("SELECT status, count(*) FROM imago_jobs GROUP BY status"))
            section.facts |= {row[0]: row[1] for row in rows}


def _server(section: Section, settings: Settings) -> None:
    """Finds out whether a server answers where the settings say. It is no problem if none runs."""
    import httpx

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}/health/ready"
    try:
        answer = httpx.get(url, timeout=SERVER_S, trust_env=False)
    except httpx.ConnectError:
        section.facts[url] = "nobody listens there"
        return
    section.facts[url] = answer.status_code
    if answer.status_code != 200:
        section.problems.append(f"{url} answers {answer.status_code}: {answer.text[:300]}")


def _torch(section: Section, settings: Settings) -> None:
    import torch
    import torchvision  # type: ignore[import-untyped, unused-ignore]  # noqa: F401  (its operators fit this torch, or it fails here)

    section.facts["CUDA of this torch"] = torch.version.cuda or "none"
    if torch.version.cuda is not None:
        section.facts["GPU architectures"] = torch._C._cuda_getArchFlags()
    section.facts["threads"] = torch.get_num_threads()
    for device in _devices(section, settings):
        section.facts[str(device)] = _computes(device)


def _computes(device: "torch.device") -> str:
    """Returns the device's name and memory after a small product. Passes on torch's errors."""
    import torch

    from models.runtime import memory

    torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device)).sum().item()
    used = memory(device)
    if used is None:
        return "computes"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    name = torch.cuda.get_device_name(device)
    return f"computes, {name}, capability {capability}, {used[0] >> 20} of {used[1] >> 20} MB in use"


def _devices(section: Section, settings: Settings) -> "list[torch.device]":
    """Returns the devices that `imago serve` would use. Raises DeviceUnavailable for a requested GPU that cannot be used.

    With `auto`, such a GPU is a problem if the driver shows it, a warning if that may be intended, and a fact if there is no card.
    """
    import torch

    from models.runtime import devices
    from models.runtime.gpus import gpus

    if settings.device != "auto":
        return devices(settings.device)
    usable, unusable = gpus()
    for name, problem in unusable.items():
        line = f"{name} is not used: {problem}" if usable else f"the server runs on the CPU: {problem}"
        if problem.code not in MEANT and _driver_shows_gpus():
            section.problems.append(line)
        elif _driver_shows_gpus() or _cards():
            section.warnings.append(f"{line}. IMAGO_DEVICE=cpu says that this is meant")
        else:
            section.facts["GPU"] = f"none: {problem.cause}"
    return usable or [torch.device("cpu")]


def _driver_shows_gpus() -> bool:
    try:
        return bool(_nvidia_smi("gpu", "index"))
    except (RuntimeError, OSError, subprocess.TimeoutExpired):
        return False


def _store(section: Section, settings: Settings) -> None:
    """Checks every version's files against their hashes, each backbone once."""
    from models.classifier import BackboneRef
    from models.errors import ModelError
    from models.store.store import ModelStore

    store, sound = ModelStore(settings.weights), dict[BackboneRef, bool]()
    serving = store.serving()
    for name in store.names():
        served = f", {serving.models[name]} serves" if name in serving.models else ""
        section.facts[name] = f"versions {', '.join(map(str, store.versions(name)))}{served}"
        for number in store.versions(name):
            try:
                config = store.config(name, number)
                store.load_reference(config)
            except ModelError as error:
                section.problems.append(str(error))
                continue
            if not store.has_hash(config):
                section.warnings.append(
                    f"{name}@{number}: its record has no hash, so an edit of it is not noticed; publish it again"
                )
            if not store.head_is_sound(config):
                section.problems.append(f"{name}@{number}: head.safetensors is missing or damaged; make it again")
            for ref in config.backbones:
                if ref not in sound:
                    sound[ref] = store.backbones.is_sound(ref)
                if not sound[ref]:
                    section.problems.append(f"{name}@{number}: the weights of {ref.key} are missing or damaged")
    section.facts["default"] = serving.default or "none"
    gone = [f"{name}@{n}" for name, n in serving.models.items() if n not in store.versions(name)]
    section.problems += [f"{label} is to be served, and is not in the store" for label in gone]
    if not serving.models and not settings.models:
        section.problems.append("the store serves no model: pull, import or train one")


SECTIONS: dict[str, Callable[[Section, Settings], None]] = {
    "versions": _versions,
    "machine": _machine,
    "GPUs": _gpus,
    "settings": _settings,
    "folders": _folders,
    "jobs": _jobs,
    "server": _server,
    "torch": _torch,
    "store": _store,
}


def _refused(folder: Path) -> str | None:
    """Returns why nothing can be written there; tries with a file without a name."""
    if not folder.is_dir():
        return "is not a folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written to: {error.strerror}"


# Secrets


def _secrets(settings: Settings) -> list[str]:
    """Returns everything that must not be shown, the longest first: from the settings, and from an environment that was refused."""
    names = [name for name, about in Settings.model_fields.items() if "SecretStr" in str(about.annotation)]
    values = [value.get_secret_value() for name in names if isinstance(value := getattr(settings, name), SecretStr)]
    values += [os.environ.get(f"{PREFIX}{name.upper()}", "") for name in names]
    values += [urlsplit(value).password or "" for value in values if "://" in value]
    return sorted({value for value in values if len(value) >= 8}, key=len, reverse=True)


def _masked(found: Any, secrets: list[str]) -> Any:
    """Replaces every secret, and what stands before the @ of an address."""
    if isinstance(found, dict):
        return {key: _masked(value, secrets) for key, value in found.items()}
    if isinstance(found, list):
        return [_masked(value, secrets) for value in found]
    if not isinstance(found, str):
        return found
    for secret in secrets:
        found = found.replace(secret, MASK)
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", MASK, found)
