"""Logs to stderr: one line per event, as text for people or as JSON for log collectors.

No line holds a control character, whatever a caller sent. In text logs, only our own lines begin with a time: the lines of a traceback
are indented.
"""

import json
import logging
import re
import time
from contextvars import ContextVar
from typing import Any

from service.observability.metrics import Metrics
from service.settings import Settings

ACCESS = "service.access"  # the logger of one line per request, with a switch of its own
OWN_FAILURES = "service.http.middleware"  # the logger of requests that failed; those are counted as requests

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that is being answered

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Fields(dict[str, Any]):
    """A message made of fields: a JSON object in text logs, members of the line's own object in JSON logs."""

    def __str__(self) -> str:
        return json.dumps(self)


class TextLines(logging.Formatter):
    """`2026-11-22 15:04:05,678 INFO message`, with the lines of an exception below it, indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's own name)
        return _printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(f"  {_printable(line)}" for line in super().formatException(ei).split("\n"))


class JsonLines(logging.Formatter):
    """One object per line: time (RFC 3339, UTC), level, logger, then message or fields; request_id and exception if there are any."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.msg, Fields):
            line |= record.msg
        else:
            line["message"] = record.getMessage()
        if (id := request_id.get()) is not None:
            line["request_id"] = id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class ErrorCounter(logging.Handler):
    """Counts errors outside of requests: models that do not load, jobs, devices, databases."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(logging.ERROR)
        self._metrics = metrics

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != OWN_FAILURES:
            self._metrics.background_errors.inc()


def configure(settings: Settings, metrics: Metrics) -> None:
    """Sends all logs of this process, and Python's warnings, to stderr as the settings say."""
    lines = logging.StreamHandler()
    lines.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    level = settings.log_level.upper()
    logging.basicConfig(level=level, handlers=[lines, ErrorCounter(metrics)], force=True)
    logging.captureWarnings(True)
    logging.getLogger(ACCESS).setLevel(logging.INFO if settings.access_log else logging.CRITICAL)
    if level != "DEBUG":  # what uvicorn and httpx say of every step is ours to say
        for name in ("uvicorn", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # It warns of every malformed form, as often as anyone likes.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)


def _printable(text: str) -> str:
    """Escapes control characters as Python does: a line stays one line, and no terminal obeys it."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
