"""The documentation is true: every setting, route, metric, error code and command stands in it."""

import re
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic_core import PydanticUndefined

from models.errors import ModelError
from service.app import create_app
from service.cli import COMMANDS, main
from service.errors import STATUS, ServiceError
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
MONITORING = (ROOT / "docs" / "monitoring.md").read_text()


def shown(default: Any) -> str:
    if default is None or default == () or default is PydanticUndefined:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def section(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def renew(path: Path, name: str, table: str) -> None:
    head, rest = path.read_text().split(f"<!-- {name} -->")
    tail = rest.split(f"<!-- /{name} -->")[1]
    path.write_text(f"{head}<!-- {name} -->\n{table}\n<!-- /{name} -->{tail}")


def settings_table() -> str:
    """The README's table of settings, as `Settings` says it."""
    rows = ["| flag | environment | default | |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(
            f"| `--{name.replace('_', '-')}` | `IMAGO_{name.upper()}` | {shown(field.default)} | {field.description} |"
        )
    return "\n".join(rows)


def test_the_readme_has_every_setting() -> None:
    """To renew the table: `python -m tests.test_docs`."""
    assert section(README, "settings") == settings_table()


def test_every_route_is_documented() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    routes = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert len(routes) > 10
    assert not [route for route in routes if f"`{route}`" not in OPERATIONS]


def metrics_table() -> str:
    """The table of docs/monitoring.md, as `Metrics` says it."""
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
    """To renew the table: `python -m tests.test_docs`."""
    assert section(MONITORING, "metrics") == metrics_table()


def test_every_metric_of_the_process_is_documented() -> None:
    lines = Metrics().exposition().decode().splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE imago_process_")}
    assert names
    assert not [name for name in names if f"`{name}`" not in MONITORING]


def test_every_error_code_is_documented_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+)", OPERATIONS, re.MULTILINE))
    raised = {error for error in STATUS if error not in (ModelError, ServiceError)}
    assert {error.code: str(STATUS[error]) for error in raised} == rows  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme_and_has_an_example(command: str) -> None:
    assert f"imago {command}" in README
    context = click.Context(main, info_name="imago")
    found = main.get_command(context, command)
    assert found is not None
    assert f"imago {command}" in found.get_help(context)


if __name__ == "__main__":
    renew(ROOT / "README.md", "settings", settings_table())
    renew(ROOT / "docs" / "monitoring.md", "metrics", metrics_table())
