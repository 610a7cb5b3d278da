"""CPU cores and memory that this process may use, by its affinity and its control groups. Does not import torch."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # lines of "0::/imago.service", in version 1 "3:cpu,cpuacct:/docker/4f2a"
V1_CPU = ("cpu", "cpu,cpuacct", "cpuacct,cpu")  # some containers lack the link


def cpu_count(root: Path = ROOT) -> int:
    """Returns the cores of the affinity mask, or the quota rounded up where that is less. `root`: see `cpu_quota`."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return available if quota == math.inf else max(1, min(available, math.ceil(quota)))


def cpu_quota(root: Path = ROOT) -> float:
    """Returns the smallest limit in cores of this process's control group and its parents; infinity where there is none.

    `root`: the mount point of version 2; version 1 has one of the folders V1_CPU in it.
    """
    paths = _group_paths()
    unified = (_unified_quota(group) for group in _groups(root, paths.get("", "/")))
    v1 = (_v1_quota(group) for name in V1_CPU for group in _groups(root / name, paths.get("cpu", "/")))
    return min([math.inf, *unified, *v1])


def memory_limit(root: Path = ROOT) -> int:
    """Returns the bytes of memory of the machine, or the limit of a control group where that is less. `root`: see `cpu_quota`."""
    paths = _group_paths()
    files = [group / "memory.max" for group in _groups(root, paths.get("", "/"))]
    files += [group / "memory.limit_in_bytes" for group in _groups(root / "memory", paths.get("memory", "/"))]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit in map(_number_in, files) if limit)])


def _number_in(path: Path) -> int | None:
    """Returns None where there is no such file, or no limit in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None


def _group_paths() -> dict[str, str]:
    """Returns the path of this process's group by controller; "" is version 2."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split(":", 2) for line in lines if line.count(":") >= 2)
    return {controller: path for _, controllers, path in fields for controller in controllers.split(",")}


def _groups(root: Path, path: str) -> Iterator[Path]:
    """Yields the folders from this process's group up to the root. A container may have only the root."""
    group = Path(path.strip("/"))
    yield from (root / folder for folder in (group, *group.parents) if ".." not in folder.parts)


def _unified_quota(group: Path) -> float:
    """`cpu.max`: "200000 100000" is two processors; "max 100000" is no limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def _v1_quota(group: Path) -> float:
    """`cpu.cfs_quota_us` and `cpu.cfs_period_us`; a quota of -1 is no limit."""
    try:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return math.inf
    return quota / period if quota > 0 else math.inf
