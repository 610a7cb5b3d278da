"""`imago doctor`: what a report of a bug needs, and what is wrong here."""

import json
from typing import TYPE_CHECKING, Any

import click

from service.cli.options import settings_options

if TYPE_CHECKING:
    from service.doctor import Section


@click.command(
    epilog="""\b
Examples:
  imago doctor
  imago doctor --weights /var/lib/imago/weights --data /var/lib/imago/data
  imago doctor --json > report.json"""
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@settings_options()
def command(as_json: bool, **flags: Any) -> None:
    """Look at everything that a report of a bug needs: versions, machine, GPUs, settings, folders, jobs, server, torch, store.

    It takes the settings of `imago serve`, changes nothing, and shows no key. Lines marked ! are problems, with which the
    exit code is 1; lines marked ? are warnings.
    """
    from service.doctor import examine

    sections = []
    for section in examine(flags):
        sections.append(section)
        if not as_json:
            show(section)
    problems = sum(len(section.problems) for section in sections)
    if as_json:
        click.echo(json.dumps(document(sections), indent=2))
    else:
        click.echo(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'} found{warnings_of(sections)}")
    raise SystemExit(1 if problems else 0)


def show(section: "Section") -> None:
    click.echo(section.name)
    width = max(map(len, section.facts), default=0)
    for name, value in section.facts.items():
        click.echo(f"  {name:{width}}  {value}")
    for warning in section.warnings:
        click.echo(f"  ? {warning}")
    for problem in section.problems:
        click.echo(f"  ! {problem}")


def warnings_of(sections: "list[Section]") -> str:
    """ ", 2 warnings", or nothing."""
    count = sum(len(section.warnings) for section in sections)
    return f", {count} warning{'' if count == 1 else 's'}" if count else ""


def document(sections: "list[Section]") -> dict[str, Any]:
    found = {
        section.name: {"facts": section.facts, "warnings": section.warnings, "problems": section.problems}
        for section in sections
    }
    return {"ok": not any(section.problems for section in sections), "sections": found}
