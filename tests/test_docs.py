"""The documentation is true: every setting, route, metric, error code and command stands in it, and what stands in it can be asked for."""

import ast
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from pydantic_core import PydanticUndefined
from support.command_lines import in_page, make_files, parse, words

from models.errors import ModelError
from service.app import create_app
from service.cli import COMMANDS
from service.errors import STATUS, ServiceError
from service.http import schemas
from service.observability.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
}
README, SETTINGS, API = PAGES["README.md"], PAGES["docs/reference/settings.md"], PAGES["docs/reference/api.md"]
MONITORING, OPERATIONS, TROUBLESHOOTING = (
    PAGES[f"docs/{page}.md"] for page in ("guide/monitoring", "guide/operations", "reference/troubleshooting")
)
ROUTES = create_app(Settings()).openapi()["paths"]


# Settings


def shown(default: Any) -> str:
    if default in (None, (), "") or default is PydanticUndefined:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def section(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def renew(path: Path, name: str, table: str) -> None:
    head, rest = path.read_text().split(f"<!-- {name} -->")
    tail = rest.split(f"<!-- /{name} -->")[1]
    path.write_text(f"{head}<!-- {name} -->\n{table}\n<!-- /{name} -->{tail}")


def settings_rows() -> list[str]:
    """The settings, as `Settings` says them."""
    return [
        f"| `--{name.replace('_', '-')}` | `IMAGO_{name.upper()}` | {shown(field.default)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]


def settings_table() -> str:
    return "\n".join(["| flag | environment | default | |", "|---|---|---|---|", *settings_rows()])


def test_there_is_every_setting() -> None:
    """To renew the table: `python tests/test_docs.py`."""
    assert section(SETTINGS, "settings") == settings_table()


def test_the_settings_in_the_readme_are_what_they_are() -> None:
    rows = re.findall(r"^\| `--.*$", README, re.MULTILINE)
    assert rows
    assert [row for row in rows if row not in settings_rows()] == []


# Routes, and the requests that pages show


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in ROUTES.items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def found(method: str, path: str) -> tuple[str, dict[str, Any]]:
    """The route that answers there, and what it takes; a literal path goes before one with a parameter."""
    fitting = []
    for known_method, template, operation in operations():
        pattern = re.sub(r"\{\w+\}", "[^/]+", template)
        if known_method == method and re.fullmatch(pattern, path):
            fitting.append((template.count("{"), template, operation))
    assert fitting, f"no route {method} {path}"
    _, template, operation = min(fitting, key=lambda fit: fit[0])
    return template, operation


def fields_of(operation: dict[str, Any]) -> set[str]:
    content = operation.get("requestBody", {}).get("content", {})
    form = content.get("multipart/form-data", {}).get("schema", {}).get("properties", {})
    return {parameter["name"] for parameter in operation.get("parameters", ())} | set(form)


def asked(line: str) -> tuple[str, dict[str, Any], set[str], str | None]:
    """What a line of curl asks for: route, operation, fields, JSON body."""
    target, method, fields, body, rest = "", "", set(), None, iter(words(line)[1:])
    for word in rest:
        if word in ("-X", "-H", "-d", "-F", "--data-binary", "-o", "--output"):
            value = next(rest)
            method = value if word == "-X" else method or ("POST" if word in ("-d", "-F", "--data-binary") else "")
            fields |= {value.partition("=")[0]} if word == "-F" else set()
            body = value if word == "-d" and not value.startswith("@") else body
        elif not word.startswith("-"):
            target = word
    url = urlsplit(f"http://{target}")
    template, operation = found(method or "GET", url.path)
    return f"{method or 'GET'} {template}", operation, fields | {name for name, _ in parse_qsl(url.query)}, body


def curls(page: str) -> list[str]:
    lines = in_page(page, "curl") + re.findall(r"`(curl [^`]*)`", page)
    return [line for line in lines if "localhost:8000" in line]


CURLS = [(name, line) for name, page in PAGES.items() for line in curls(page)]


def test_every_route_is_described_and_asked_for() -> None:
    routes = [f"{method} {path}" for method, path, _ in operations()]
    assert len(routes) > 40
    assert [route for route in routes if f"`{route}`" not in API] == []
    assert set(routes) - {asked(line)[0] for line in curls(API)} == set()


@pytest.mark.parametrize(("page", "line"), CURLS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(CURLS)])
def test_what_a_page_sends_can_be_sent(page: str, line: str) -> None:
    route, operation, fields, body = asked(line)
    assert fields <= fields_of(operation), route
    reference = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if body is not None and "$ref" in reference:
        getattr(schemas, reference["$ref"].rpartition("/")[2]).model_validate_json(body)
    elif body is not None:
        assert json.loads(body).keys() <= reference["properties"].keys()


@pytest.mark.parametrize(
    "line", ["curl localhost:8000/model", "curl 'localhost:8000/predict?k=1'", "curl -X PUT localhost:8000/models"]
)
def test_a_request_with_a_mistake_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        test_what_a_page_sends_can_be_sent("", line)


# Metrics, errors


def metrics_table() -> str:
    """The table of docs/guide/monitoring.md, as `Metrics` says it."""
    metrics = Metrics()
    labels = {
        metric._name: ", ".join(metric._labelnames) for metric in vars(metrics).values() if hasattr(metric, "_name")
    }
    rows = ["| metric | type | labels | what |", "|---|---|---|---|"]
    for family in metrics.registry.collect():
        if not family.name.startswith("imago_process_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append(f"| `{name}` | {family.type} | {labels[family.name]} | {family.documentation} |")
    return "\n".join(rows)


def test_every_metric_is_documented_in_its_own_words() -> None:
    """To renew the table: `python tests/test_docs.py`."""
    assert section(MONITORING, "metrics") == metrics_table()


def test_every_metric_of_the_process_is_documented() -> None:
    lines = Metrics().exposition().decode().splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE imago_process_")}
    assert names
    assert not [name for name in names if f"`{name}`" not in MONITORING]


def test_every_error_code_is_documented_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+)", TROUBLESHOOTING, re.MULTILINE))
    raised = {error for error in STATUS if error not in (ModelError, ServiceError)}
    assert {error.code: str(STATUS[error]) for error in raised} == rows  # type: ignore[attr-defined]


def texts() -> Iterator[str]:
    """Every string in the code, with `...` for what is filled in."""
    for path in [*(ROOT / "service").rglob("*.py"), *(ROOT / "models").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)  # type: ignore[misc]


QUOTED = re.findall(r"^\| `([^`]*[ ][^`]*)` \|", TROUBLESHOOTING.partition("## By code")[0], re.MULTILINE)
TEXTS = "\n".join(texts()).replace("`", "")


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_message_is_quoted_as_the_code_says_it(quoted: str) -> None:
    pieces = [piece.strip() for piece in quoted.split("...")]
    assert [piece for piece in pieces if piece.strip(string.punctuation + " ") and piece not in TEXTS] == []


# Commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"imago {command}" in README


LINES = [(name, line) for name, page in PAGES.items() for line in in_page(page, "imago")]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}-{n}" for n, (page, _) in enumerate(LINES)])
def test_a_command_in_a_page_parses(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(line, tmp_path)
    parse(line)


# Figures


def test_the_comparison_has_the_figures_of_the_benchmarks() -> None:
    figures = re.findall(r"[\d.]+ \([\d.]+ to [\d.]+\)", PAGES["docs/guide/comparison.md"])
    assert len(figures) == 16
    assert [figure for figure in figures if figure not in PAGES["docs/benchmarks.md"]] == []


# Links


def anchors(page: str) -> set[str]:
    """Of the headings, as forges make them."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_every_page_is_in_the_index() -> None:
    index = PAGES["docs/README.md"]
    pages = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    assert [page for page in pages if page != "README.md" and f"({page})" not in index] == []


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 220


if __name__ == "__main__":
    renew(DOCS / "reference" / "settings.md", "settings", settings_table())
    renew(DOCS / "guide" / "monitoring.md", "metrics", metrics_table())
