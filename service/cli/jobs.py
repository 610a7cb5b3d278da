"""`imago jobs`: the fine-tuning jobs of a running server, over HTTP, with the admin key."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.options import examples, settings_options
from service.settings import Settings

if TYPE_CHECKING:
    import httpx

PAGE = 100
POLL_S = 1.0
TIMEOUT_S = 60.0
WIDTH = 100  # of the list, at least: ids are copied into the next command, and in 80 columns they would be cut
ELSEWHERE = {  # what a proxy says for itself
    413: "a proxy before the server limits request bodies (nginx: client_max_body_size); docs/guide/proxies.md has its settings",
    502: "a proxy before the server does not reach it",
    503: "a proxy before the server does not reach it",
    504: "a proxy before the server did not wait for the answer (nginx: proxy_read_timeout); docs/guide/proxies.md has its settings",
}
JOB = "ftjob-0f8fad5bd9cb469fa16570867728950e"  # of the examples


@click.group(
    epilog=examples("imago jobs list", f"imago jobs watch {JOB}", f"imago jobs report {JOB} --html report.html")
)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Address of the server")
@settings_options("data", "admin_key")
@click.pass_context
def command(context: click.Context, /, url: str, **flags: Any) -> None:
    """Watch and steer the fine-tuning jobs of a running server.

    The admin key is that of IMAGO_ADMIN_KEY, or the one in the server's data folder.
    """
    context.obj = context.with_resource(connect(url, flags))


def connect(url: str, flags: Mapping[str, Any]) -> "httpx.Client":
    """A client of the server there, with the admin key that the flags and the environment lead to. It uses the environment's proxy
    (`http_proxy`, `ALL_PROXY`) unless the server is on this machine."""
    import httpx

    from models.store.download import client_of
    from service.system.hosts import is_loopback

    headers = {"Authorization": f"Bearer {admin_key(Settings.load(**flags))}"}
    local = is_loopback(httpx.URL(url).host)
    return client_of(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=not local)


def admin_key(settings: Settings) -> str:
    """Of the settings, or of the data folder; nothing is made here, for only the server can."""
    if settings.admin_key:
        return settings.admin_key.get_secret_value()
    from service.http.auth import ADMIN_KEY_FILE

    try:
        return (settings.data / ADMIN_KEY_FILE).read_text().strip()
    except OSError:
        raise click.ClickException(
            f"no admin key in {settings.data}: name the server's data folder with --data, or set IMAGO_ADMIN_KEY"
        ) from None


@command.command("list", epilog=examples("imago jobs list --limit 5", "imago jobs list --json"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@click.option("--limit", type=click.IntRange(1, PAGE), default=20, show_default=True, help="Jobs to show")
@click.pass_obj
def list_jobs(client: "httpx.Client", as_json: bool, limit: int) -> None:
    """The latest jobs."""
    jobs = ask(client, "GET", "/finetune", params={"limit": limit})["data"]
    if as_json:
        click.echo(json.dumps(jobs, indent=2))
    else:
        print_jobs(jobs)


@command.command("show", epilog=examples(f"imago jobs show {JOB}"))
@click.argument("job_id", metavar="ID")
@click.pass_obj
def show(client: "httpx.Client", job_id: str) -> None:
    """Everything about one job, as JSON."""
    click.echo(json.dumps(ask(client, "GET", f"/finetune/{job_id}"), indent=2))


@command.command("events", epilog=examples(f"imago jobs events {JOB}", f"imago jobs events {JOB} --after 12 --json"))
@click.argument("job_id", metavar="ID")
@click.option("--after", type=click.IntRange(0), default=0, help="Number of the last event that is known")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line")
@click.pass_obj
def events(client: "httpx.Client", job_id: str, after: int, as_json: bool) -> None:
    """What a job has told so far."""
    tell_events(client, job_id, after, as_json)


@command.command("watch", epilog=examples(f"imago jobs watch {JOB}"))
@click.argument("job_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line")
@click.pass_obj
def watch(client: "httpx.Client", job_id: str, as_json: bool) -> None:
    """Follow a job to its end. Exit code 1 unless it succeeds."""
    after = 0
    while True:
        job = ask(
            client, "GET", f"/finetune/{job_id}"
        )  # before its events: the last of them comes just after the last status
        after = tell_events(client, job_id, after, as_json)
        if job["terminal"]:
            break
        time.sleep(POLL_S)
    if job["status"] != "succeeded":
        raise SystemExit(1)


@command.command("cancel", epilog=examples(f"imago jobs cancel {JOB}"))
@click.argument("job_id", metavar="ID")
@click.pass_obj
def cancel(client: "httpx.Client", job_id: str) -> None:
    """Discard a job that waits or runs."""
    click.echo(f"{job_id} is {ask(client, 'POST', f'/finetune/{job_id}/cancel')['status']}")


@command.command("stop", epilog=examples(f"imago jobs stop {JOB}"))
@click.argument("job_id", metavar="ID")
@click.pass_obj
def stop(client: "httpx.Client", job_id: str) -> None:
    """End a running job early, and keep the best so far."""
    ask(client, "POST", f"/finetune/{job_id}/stop")
    click.echo(f"{job_id} ends after its current step")


@command.command("report", epilog=examples(f"imago jobs report {JOB}", f"imago jobs report {JOB} --html report.html"))
@click.argument("job_id", metavar="ID")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as a page to this file")
@click.pass_obj
def report(client: "httpx.Client", job_id: str, html: Path | None) -> None:
    """A job's report, as JSON or as a page."""
    if html is None:
        click.echo(json.dumps(ask(client, "GET", f"/finetune/{job_id}/report", params={"format": "json"}), indent=2))
        return
    html.write_bytes(send(client, "GET", f"/finetune/{job_id}/report", params={"format": "html"}).content)
    click.echo(f"wrote {html}")


def ask(client: "httpx.Client", method: str, path: str, **options: Any) -> dict[str, Any]:
    answer: dict[str, Any] = send(client, method, path, **options).json()
    return answer


def send(client: "httpx.Client", method: str, path: str, **options: Any) -> "httpx.Response":
    """The answer, if it is a good one; otherwise what the server says, as the command's error."""
    import httpx

    try:
        answer = client.request(method, path, **options)
    except httpx.HTTPError as error:
        raise click.ClickException(f"no server answers at {client.base_url}: {error}") from None
    if answer.is_success:
        return answer
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = ELSEWHERE.get(answer.status_code, "not an answer of Imago")
    raise click.ClickException(f"{answer.status_code}: {message}")


def tell_events(client: "httpx.Client", job_id: str, after: int, as_json: bool) -> int:
    """Prints all events after this number, and gives the number of the last."""
    while True:
        page = ask(client, "GET", f"/finetune/{job_id}/events", params={"after": after, "limit": PAGE})
        for event in page["data"]:
            present = {name: value for name, value in event.items() if value is not None}
            click.echo(json.dumps(present) if as_json else line_of(present))
            after = event["seq"]
        if not page["has_more"]:
            return after


def line_of(event: dict[str, Any]) -> str:
    """One event, for people."""
    words = [event["at"][11:19]]
    words += [event["status"]] if "status" in event else []
    if "phase" in event:
        words.append(f"{event['phase']} {event['progress']:.0%}")
    words += [f"{name} {event[name]:.4g}" for name in ("epoch", "loss", "val_loss", "accuracy") if name in event]
    words += [event["message"]] if "message" in event else []
    return "  ".join(words)


def print_jobs(jobs: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "model", "status", "phase", "progress", "deployment", box=None, pad_edge=False)
    for job in jobs:
        version = f"@{job['version']}" if job["version"] else ""
        done = f"{job['progress']:.0%}"
        outcome = job["error"]["message"] if job["error"] else job["deployment"] or "-"
        table.add_row(job["id"], job["request"]["name"] + version, job["status"], job["phase"] or "-", done, outcome)
    console = Console(markup=False)
    console.width = max(console.width, WIDTH)
    console.print(table)
