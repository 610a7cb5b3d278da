"""The open-files limit: raised at start, and shared out."""

import resource
import subprocess
import sys

import pytest

from service.system.open_files import connections_within

RAISE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from service.system.open_files import raise_limit
print(raise_limit())
"""


@pytest.mark.abuse("A1501")
def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    answer = subprocess.run([sys.executable, "-c", RAISE], capture_output=True, check=True, text=True)
    assert int(answer.stdout) == (2**31 if hard == resource.RLIM_INFINITY else hard)


@pytest.mark.abuse("A1501")
@pytest.mark.parametrize(
    ("limit", "wanted", "connections", "backlog"),
    [(2**31, 1024, 1024, 2048), (4096, 1024, 1024, 1536), (1024, 1024, 768, 128), (64, 1024, 32, 16), (1, 5, 1, 1)],
)
def test_connections_leave_files_for_the_rest(
    limit: int, wanted: int, connections: int, backlog: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert connections_within(limit, wanted) == (connections, backlog)
    assert ("open-files limit" in caplog.text) == (connections < wanted)
