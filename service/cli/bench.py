"""`imago bench`: load over HTTP, and what came of it."""

import json
from pathlib import Path

import click

from service.cli.options import a_number, examples
from service.cli.progress import progress
from service.diagnostics.load_generator import LoadPlan, LoadReport, read_images, run


@click.command(
    epilog=examples("imago bench photos/", "imago bench --model resnet50 --concurrency 1 --requests 200 photos/cat.jpg")
)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, path_type=Path))
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Address of the server")
@click.option("--model", "models", multiple=True, help="Model to ask; several are taken in turn. Default: the server's")
@click.option("--concurrency", type=click.IntRange(1, 4096), default=32, show_default=True, help="Connections")
@click.option(
    "--duration", type=click.FloatRange(0, min_open=True), callback=a_number, help="Seconds to run  [default: 10]"
)
@click.option("--requests", type=click.IntRange(1), help="Requests to send; alone, it runs as long as they take")
@click.option("--api-key", envvar="IMAGO_API_KEY", help="Key of the user routes  [IMAGO_API_KEY]")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    callback=a_number,
    default=30.0,
    show_default=True,
    help="Seconds",
)
def command(
    folder: Path,
    url: str,
    models: tuple[str, ...],
    concurrency: int,
    duration: float | None,
    requests: int | None,
    api_key: str | None,
    timeout: float,
) -> None:
    """Send the images of DIR to a running server, each of the connections its next one when the last answer is in.

    The last line on stdout is one JSON document. Exit code 1 if no request succeeded.
    """
    duration = 10.0 if duration is None and requests is None else duration
    try:
        load = LoadPlan(url, "/predict", models, concurrency, duration, requests, api_key, timeout)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with progress("bench", "requests") as update:
        report = run(load, read_images(folder), lambda _, done: update(done, requests))
    click.echo(_summary(report))
    click.echo(json.dumps(report.as_dict()))
    if not report.ok:
        raise SystemExit(1)


def _summary(report: LoadReport) -> str:
    counts = {**{f"status {status}": n for status, n in report.statuses.items()}, **report.errors}
    latency = "  ".join(f"{name} {ms:.1f} ms" for name, ms in report.latency_ms.items())
    return (
        f"{report.images_per_second} images/s over {report.seconds:.1f} s, {report.concurrency} connections\n"
        f"{', '.join(f'{what}: {n}' for what, n in counts.items())}\n"
        f"{latency or 'no request succeeded'}\n"
        f"client CPU {report.client_cpu_seconds:.2f} s"
    )
