"""`imago doctor`: what a report of a bug needs, and what is wrong here; with `--gpu`, whether Imago works on the GPU."""

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.options import settings_options

if TYPE_CHECKING:
    from service.diagnostics.doctor import Section
    from service.diagnostics.gpu_check.records import GpuReport

STDOUT = "-"


@click.command(
    epilog="""\b
Examples:
  imago doctor
  imago doctor --weights /var/lib/imago/weights --data /var/lib/imago/data
  imago doctor --json > report.json
  imago doctor --gpu --json gpu.json"""
)
@click.option(
    "--json",
    "json_to",
    metavar="[FILE]",
    is_flag=False,
    flag_value=STDOUT,
    help="Print JSON alone, or write it to FILE",
)
@click.option("--gpu", is_flag=True, help="Check the GPU instead: up to eight minutes, a table, and a JSON document")
@click.option("--check", "names", multiple=True, metavar="NAME", help="With --gpu: this check alone; may be repeated")
@click.option(
    "--dataset",
    type=click.Path(exists=True, path_type=Path),
    help="With --gpu: train on this dataset instead of generated images",
)
@click.option("--rehearse", is_flag=True, help="With --gpu: run the checks on the CPU with tiny sizes, to test them")
@settings_options()
def command(
    json_to: str | None, gpu: bool, names: tuple[str, ...], dataset: Path | None, rehearse: bool, **flags: Any
) -> None:
    """Look at everything that a report of a bug needs: versions, machine, GPUs, settings, folders, jobs, server, torch, store.

    It takes the settings of `imago serve`, changes nothing, and shows no key. Lines marked ! are problems, with which the
    exit code is 1; lines marked ? are warnings.

    With --gpu it runs every part of Imago on the GPU, with a temporary store. Exit code 0: all checks passed; 1: a check failed; 3: no GPU
    can be used; 4: nothing failed, and not all checks ran.
    """
    if gpu:
        raise SystemExit(check_gpu(json_to, names, dataset, rehearse, flags["device"]))
    if names or dataset or rehearse:
        raise click.UsageError("--check, --dataset and --rehearse need --gpu")
    from service.diagnostics.doctor import examine

    sections = []
    for section in examine(flags):
        sections.append(section)
        if json_to is None:
            show(section)
    problems = sum(len(section.problems) for section in sections)
    if json_to is None:
        click.echo(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'} found{warnings_of(sections)}")
    else:
        write(json.dumps(document(sections), indent=2), json_to)
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


def write(text: str, json_to: str) -> None:
    if json_to == STDOUT:
        click.echo(text)
    else:
        Path(json_to).write_text(text + "\n")


# The GPU


def check_gpu(
    json_to: str | None, names: tuple[str, ...], dataset: Path | None, rehearse: bool, device: str | None
) -> int:
    """The table on stdout as the checks end, then the document as the last line; its exit code."""
    from service.diagnostics.gpu_check import report
    from service.diagnostics.gpu_check.checks import selected
    from service.diagnostics.gpu_check.runner import GpuCheckRun, run
    from service.settings import Settings

    device = Settings.load(device=device).device
    try:
        checks = selected(names)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    how = GpuCheckRun(rehearse, dataset.resolve() if dataset else None, None if rehearse else gpu_number(device))
    table_on_stderr = json_to == STDOUT
    click.echo(report.header(checks, rehearse), err=table_on_stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the document is printed all the same
    found: GpuReport = run(checks, how, lambda result: click.echo(report.row(result), err=table_on_stderr))
    click.echo(report.footer(found), err=table_on_stderr)
    write(found.line(), json_to or STDOUT)
    return found.exit_code


def gpu_number(device: str) -> int | None:
    """Of the setting `device`. Raises UsageError for the CPU."""
    if device == "cpu":
        raise click.UsageError("the device is set to cpu (--device, IMAGO_DEVICE): name a GPU, or leave it out")
    number = device.partition(":")[2]
    return int(number) if number else None
