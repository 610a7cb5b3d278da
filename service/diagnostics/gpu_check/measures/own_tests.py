"""The project's own tests that need a GPU, where the checkout and pytest are at hand."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from service.diagnostics.gpu_check.records import Measurement
from service.diagnostics.gpu_check.session import Session

ROOT = Path(__file__).parents[4]
TESTS_S = 110.0


def own_tests(session: Session) -> Measurement:
    if not session.on_gpu:
        return Measurement(skipped="needs a GPU")
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files or find_spec("pytest") is None:
        return Measurement(skipped="needs a checkout and pytest (`make gpu-check`)")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(  # noqa: S603  (our own tests)
        command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_S, check=False
    )
    return judged(done.returncode, done.stdout)


def judged(code: int, output: str) -> Measurement:
    """By pytest's exit code and last line: 5 means that no test was found."""
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    failed = tuple(re.findall(r"^(?:FAILED|ERROR) (.+)$", output, re.MULTILINE))
    return Measurement(
        summary=last.strip("= "),
        figures={"exit_code": code},
        problems=failed if code == 1 and failed else () if code == 0 else (f"pytest ends with {code}: {last}",),
    )
