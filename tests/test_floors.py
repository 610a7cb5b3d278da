"""No dependency is older than its last known hole: what we ask for, what is locked, what is installed."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FLOORS = {
    "pillow": "13.0.0",  # a heap overflow in JPEG, CVE-2026-112403
    "starlette": "1.6.0",  # Host and Range holes below 1.3.1; max_body_size
    "fastapi": "0.165.0",  # max_body_size and form_limits
    "python-multipart": "0.0.32",  # request smuggling below 0.0.30, a negative length below 0.0.31
    "torch": "2.11",  # memory corruption with weights_only below 2.10, CVE-2026-24747
    "safetensors": "0.8.0",  # below, saving truncates a file that others have mapped
    "h11": "0.16.0",  # request smuggling, CVE-2025-43859; comes with httpx
    "gunicorn": "22.0.0",  # request smuggling, CVE-2024-1135; not used
}
ASKED = {
    r.name: r for r in map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
}


@pytest.mark.parametrize("name", sorted(FLOORS.keys() & ASKED.keys()))
def test_what_is_asked_for(name: str) -> None:
    lowest = [Version(part.version) for part in ASKED[name].specifier if part.operator in (">=", "==")]
    assert lowest
    assert min(lowest) >= Version(FLOORS[name])


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-dev.lock"])
def test_what_is_locked(file: str) -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", (ROOT / file).read_text(), flags=re.MULTILINE))
    assert ASKED.keys() & FLOORS.keys() <= locked.keys()
    assert [name for name, floor in FLOORS.items() if name in locked and Version(locked[name]) < Version(floor)] == []


@pytest.mark.parametrize("name", FLOORS)
def test_what_is_installed(name: str) -> None:
    try:
        installed = version(name)
    except PackageNotFoundError:
        assert name not in ASKED
        return
    assert Version(installed) >= Version(FLOORS[name])
