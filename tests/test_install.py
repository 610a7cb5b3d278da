"""Installation with CUDA and without: what `make` and the Dockerfile run, by a uv that only writes down how it was called."""

import os
import re
import shutil
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OPERATIONS = (ROOT / "docs" / "guide" / "operations.md").read_text()
CUDA = re.compile(r"^(?:triton|(?:nvidia|cuda)-[\w-]+)==", re.MULTILINE)
LOCKS = ("requirements.lock", "requirements-dev.lock")
INSTALL = ("sh", "deploy/install.sh")


def installed(lock: str, variant: str, tmp_path: Path) -> list[tuple[list[str], str]]:
    """The calls of uv that an installation makes: arguments, and the requirements on standard input."""
    fake = tmp_path / "uv"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$*" "$(cat)" "<end>" >> "$0.log"\n')
    fake.chmod(0o755)
    words = [*INSTALL, lock, variant, str(fake), "pip", "install"]
    subprocess.run(words, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    calls = (tmp_path / "uv.log").read_text().split("<end>\n")[:-1]
    return [(call.split("\n", 1)[0].split(), call.split("\n", 1)[1]) for call in calls]


@pytest.mark.parametrize("lock", LOCKS)
def test_with_cuda_the_lock_is_installed_as_it_is(lock: str, tmp_path: Path) -> None:
    assert installed(lock, "cuda", tmp_path) == [(["pip", "install", "--require-hashes", "--requirement", lock], "\n")]


@pytest.mark.parametrize("lock", LOCKS)
def test_without_cuda_everything_but_torch_keeps_its_hash(lock: str, tmp_path: Path) -> None:
    text = (ROOT / lock).read_text()
    (rest, requirements), (torch, _) = installed(lock, "cpu", tmp_path)
    assert rest == ["pip", "install", "--require-hashes", "--no-deps", "--requirement", "-"]
    names = {line.split()[0] for line in text.splitlines() if line[:1].isalnum()}
    versions = {name for name in names if re.match(r"torch(vision)?==", name)}
    assert {line.split()[0] for line in requirements.splitlines() if line[:1].isalnum()} == {
        name for name in names - versions if not CUDA.match(name)
    }
    assert all(line in text for line in requirements.splitlines())
    assert requirements.count("--hash") == text.count("--hash") - _hashes_of_cuda(text)
    assert torch[:2] == ["pip", "install"]
    assert torch[torch.index("--torch-backend") + 1] == "cpu"
    assert "--no-deps" in torch
    assert {word for word in torch if "==" in word} == versions


def _hashes_of_cuda(text: str) -> int:
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    return sum(entry.count("--hash") for entry in entries if CUDA.match(entry) or re.match(r"torch(vision)?==", entry))


def test_what_needs_cuda_is_all_left_out() -> None:
    """torch's own requirements of CUDA are those that the pattern takes out."""
    needed = [line for line in requires("torch") or () if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0] for line in needed}
    without = {"filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec"}
    assert {name for name in names - without if not CUDA.match(f"{name}==")} == set()


def test_another_variant_is_refused() -> None:
    words = [*INSTALL, LOCKS[0], "cu126", "false"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "TORCH=cu126: it is cuda, or cpu for torch without CUDA\n")


def made(tmp_path: Path, *words: str) -> str:
    """What make would run, in a checkout where nothing, or what `tmp_path` holds, is installed."""
    for name in ("Makefile", *LOCKS, "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS")}
    done = subprocess.run(["make", "-n", *words], cwd=tmp_path, capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr


@pytest.mark.parametrize("target", ["setup", "serve"])
@pytest.mark.parametrize(
    ("words", "variant", "stamp"),
    [
        pytest.param((), "cuda", ".venv/.ready", id="default"),
        pytest.param(("TORCH=cuda",), "cuda", ".venv/.ready", id="cuda"),
        pytest.param(("TORCH=cpu",), "cpu", ".venv/.ready-cpu", id="cpu"),
    ],
)
def test_make_installs_the_variant_that_was_asked_for(
    target: str, words: tuple[str, ...], variant: str, stamp: str, tmp_path: Path
) -> None:
    said = made(tmp_path, target, *words)
    assert f"sh deploy/install.sh requirements-dev.lock {variant} .venv/bin/uv pip install --python" in said
    assert f"touch {stamp}\n" in said


def test_make_stays_with_the_variant_that_is_installed(tmp_path: Path) -> None:
    """`make test` after `make serve TORCH=cpu` must not download CUDA; another TORCH starts anew."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready-cpu").touch()
    assert "install.sh" not in made(tmp_path, "serve")
    said = made(tmp_path, "serve", "TORCH=cuda")
    assert "rm -rf .venv" in said
    assert "install.sh requirements-dev.lock cuda" in said


def test_make_refuses_another_variant(tmp_path: Path) -> None:
    assert "TORCH=gpu: it is cuda, or cpu" in made(tmp_path, "serve", "TORCH=gpu")


def test_the_image_has_a_build_argument_for_the_variant() -> None:
    assert re.search(
        r"^ARG TORCH=cuda\nRUN sh /src/install\.sh /src/requirements\.lock \$\{TORCH\}", DOCKERFILE, re.MULTILINE
    )
    assert "!deploy/install.sh" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("name", ["Makefile", "Dockerfile", "compose.yaml", "deploy/install.sh", *LOCKS])
def test_no_index_address_stands_in_a_file(name: str) -> None:
    assert not re.search(r"(?<!no-emit-)index-url|find-links|download\.pytorch|whl/c", (ROOT / name).read_text())


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_the_table_of_gpus_has_the_architectures_of_this_torch() -> None:
    carried = set((torch._C._cuda_getArchFlags() or "").split())
    assert set(re.findall(r"^\| [\d., ]+ \| `(sm_\d+)`", OPERATIONS, re.MULTILINE)) == carried
    assert not any(name.startswith("compute_") for name in carried)  # the page says that there is no PTX
