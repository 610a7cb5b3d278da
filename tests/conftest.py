"""Fixtures that every test file may use."""

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs of this machine from tests and from what they start, before torch looks, unless `-m` asks for the tests of a GPU."""
    if config.option.markexpr not in ("gpu", "gpu or soak"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
