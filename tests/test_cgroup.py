"""The cores that a process may use: affinity, and quotas of control groups, version 1 and 2, nested or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.files import cgroup
from models.runtime import cpu_count, device
from service.settings import Settings

UNIT = "0::/system.slice/imago.service\n"
V1 = "4:memory:/docker/4f2a\n3:cpu,cpuacct:/docker/4f2a\n0::/\n"


@pytest.fixture(autouse=True)
def _on_128_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(128))
    monkeypatch.setattr(device, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 128, id="no groups"),
        pytest.param({"cpu.max": "max 100000\n"}, 128, id="no limit"),
        pytest.param({"cpu.max": "400000 100000\n"}, 4, id="version 2"),
        pytest.param({"cpu.max": "150000 100000\n"}, 2, id="one and a half"),
        pytest.param({"cpu.max": "5000 100000\n"}, 1, id="a twentieth"),
        pytest.param({"cpu.max": "99900000 100000\n"}, 128, id="more than there are"),
        pytest.param({"cpu.max": "nonsense"}, 128, id="damaged"),
        pytest.param(
            {"membership": UNIT, "system.slice/imago.service/cpu.max": "400000 100000", "cpu.max": "max 100000"},
            4,
            id="nested, its own limit",
        ),
        pytest.param(
            {
                "membership": UNIT,
                "system.slice/imago.service/cpu.max": "max 100000",
                "system.slice/cpu.max": "300000 100000",
            },
            3,
            id="nested, the limit of the group above",
        ),
        pytest.param(
            {"membership": V1, "cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4,
            id="version 1 in a container",
        ),
        pytest.param(
            {
                "membership": V1,
                "cpu/docker/4f2a/cpu.cfs_quota_us": "50000\n",
                "cpu/docker/4f2a/cpu.cfs_period_us": "25000\n",
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
            id="version 1 on the host",
        ),
        pytest.param(
            {"membership": V1, "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            128,
            id="version 1 without a limit",
        ),
        pytest.param({"membership": "0::/../..\n", "cpu.max": "400000 100000"}, 4, id="outside of the namespace"),
    ],
)
def test_a_quota_bounds_the_cores(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path, files)
    assert cpu_count() == cgroup.cpu_count(tmp_path) == expected


def test_the_pools_of_the_server_follow_the_quota(tmp_path: Path) -> None:
    """128 decode threads on 4 cores would only wait for each other."""
    write(tmp_path, {"cpu.max": "400000 100000"})
    settings = Settings.model_construct()
    assert (settings.decoders, settings.trainer_cores) == (4, 2)


def test_a_setting_wins_over_the_quota(tmp_path: Path) -> None:
    write(tmp_path, {"cpu.max": "400000 100000"})
    settings = Settings.model_construct(decode_threads=9, trainer_threads=7)
    assert (settings.decoders, settings.trainer_cores) == (9, 7)


def test_a_single_core_trains_with_one_thread(tmp_path: Path) -> None:
    write(tmp_path, {"cpu.max": "100000 100000"})
    assert Settings.model_construct().trainer_cores == 1


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        pytest.param(UNIT, {"system.slice/imago.service/memory.max": "1000\n"}, 1000, id="unit"),
        pytest.param(UNIT, {"memory.max": "max\n", "system.slice/memory.max": "2000"}, 2000, id="nested"),
        pytest.param(V1, {"memory/docker/4f2a/memory.limit_in_bytes": "3000"}, 3000, id="version 1"),
    ],
)
def test_memory_is_that_of_the_container(tmp_path: Path, membership: str, files: dict[str, str], limit: int) -> None:
    write(tmp_path, {"membership": membership, **files})
    assert cgroup.memory_limit(tmp_path) == limit
    assert cgroup.memory_limit(tmp_path / "none") > 2**28


def test_counting_cores_imports_no_torch() -> None:
    program = "import sys, models.files.cgroup; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
