"""Fixtures that every test file may use, and the split into unit and system tests.

A test is a system test when its module imports what starts processes, when it carries another mark of `SYSTEM_MARKS`, or when it is marked
`system` itself. `-m "not system"` (`make unit`) does not import modules of system tests, and fails a test that starts a process or listens.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

UNIT = "not system"
SYSTEM_MARKS = ("data", "gpu", "soak")
STARTERS = re.compile(
    r"^\s*(?:import|from) (?:subprocess|multiprocessing|playwright|socket|socketserver|uvicorn)\b"
    r"|^from support\.(?:attack_driver|hub_server|live_server|page_server|postgres_server|small_disk)\b"
    r"|^pytestmark = .*\bpytest\.mark\.system\b"
    r"|^from test_(?:jobs|proxies|serve|server|takeover) import",
    re.MULTILINE,
)
STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "socket.bind", "subprocess.Popen"}  # audit events
unit_test: str | None = None  # the one that runs, under `-m "not system"`


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs of this machine from tests and from what they start, before torch looks, unless `-m` asks for the tests of a GPU."""
    if config.option.markexpr not in ("gpu", "gpu or soak"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.option.markexpr == UNIT:
        sys.addaudithook(refuse_start)


def refuse_start(event: str, args: tuple[Any, ...]) -> None:
    """Fails a unit test that starts a process or listens on a socket."""
    if unit_test is not None and event in STARTS:
        pytest.fail(f"{unit_test} is a unit test, and does {event}: mark it with @pytest.mark.system")


def is_system_module(path: Path) -> bool:
    return STARTERS.search(path.read_text()) is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Spares `make unit` the import of modules that have no unit test."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if config.option.markexpr == UNIT and is_test and is_system_module(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    modules = {path: is_system_module(path) for path in {item.path for item in items}}
    for item in items:
        if modules[item.path] or any(item.get_closest_marker(name) for name in SYSTEM_MARKS):
            item.add_marker(pytest.mark.system)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    global unit_test
    unit_test = item.nodeid if item.config.option.markexpr == UNIT else None
    try:
        return (yield)
    finally:
        unit_test = None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images: `IMAGO_TEST_DATA`, or `shared/data` beside the checkout. The test skips where there is none."""
    path = Path(os.environ.get("IMAGO_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real images at {path}; set IMAGO_TEST_DATA to run this test")
    return path


@pytest.fixture
def anyio_backend() -> str:
    """Coroutine tests run on asyncio."""
    return "asyncio"
