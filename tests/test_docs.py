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


def shown(default: Any) -> str:
    if default is None or default == () or default is PydanticUndefined:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


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
    stands = README.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    assert stands == settings_table()


def test_every_route_is_documented() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    routes = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert len(routes) > 10
    assert not [route for route in routes if f"`{route}`" not in OPERATIONS]


def test_every_metric_is_documented() -> None:
    families = {family.name for family in Metrics().registry.collect()}
    missing = [name for name in families if not name.startswith("imago_process_") and f"`{name}" not in OPERATIONS]
    assert not missing


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
    head, tail = README.split("<!-- settings -->")[0], README.split("<!-- /settings -->")[1]
    (ROOT / "README.md").write_text(f"{head}<!-- settings -->\n{settings_table()}\n<!-- /settings -->{tail}")
