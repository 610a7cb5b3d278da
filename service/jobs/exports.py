"""Exports of models, each in a process of its own, one at a time.

    reserved -> python -m models.store.export -> a zip in <data>/exports/ -> opened and unlinked -> streamed

The file goes with its last reader, whether the client takes all of it or leaves. The store is only read.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from models.classifier import ModelConfig
from models.errors import ExportError
from models.store.export.files import ExportFormat
from service.errors import ExportBusy, InsufficientStorage, error_of
from service.jobs.trainer import SECRETS, signal_name
from service.settings import Settings

COMMAND = (sys.executable, "-P", "-m", "models.store.export")  # -P: what lies in the current folder is not imported
RETRY_S = 10.0
BLOCK_BYTES = 2**20
LOG_BYTES = 2000  # of what the process says on stderr, in the message of one that crashed: the last line


@dataclass(frozen=True)
class ExportedZip:
    """A finished export: an open file that no folder holds any more."""

    filename: str
    size: int
    warnings: list[str]
    file: BinaryIO

    def blocks(self) -> Iterator[bytes]:
        """The content, once."""
        with self.file:
            while block := self.file.read(BLOCK_BYTES):
                yield block


class Exports:
    """To be used from one event loop."""

    def __init__(self, settings: Settings, command: tuple[str, ...] = COMMAND) -> None:
        self._folder = (settings.data / "exports").resolve()
        self._weights = settings.weights.resolve()
        self._threads = settings.trainer_cores
        self._command = command
        self._busy = False
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Removes what a killed server left."""
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def close(self) -> None:
        """Ends the export that is under way."""
        self._kill()

    async def make(self, config: ModelConfig, file_format: ExportFormat) -> ExportedZip:
        """Raises ExportBusy while another is made, ExportError, WeightsError, InsufficientStorage. Cancelled, it ends the process."""
        if self._busy:
            raise ExportBusy("another model is being exported; try again", retry_after_s=RETRY_S)
        self._busy, folder = True, None
        try:
            folder = await asyncio.to_thread(self._new_folder)
            out = folder / f"{config.name}-{config.version}.zip"
            report = await self._run(config, file_format, out)
            if "code" in report:
                raise error_of(report["code"], report["message"])
            if "disk" in report:
                raise InsufficientStorage(f"the data folder cannot be written to: {report['disk']}")
            name = f"{config.name}-{config.version}-{file_format}.zip"
            return ExportedZip(name, out.stat().st_size, report["warnings"], out.open("rb"))
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)  # one file or two
            self._busy = False

    def _new_folder(self) -> Path:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self._folder))
        except OSError as error:
            raise InsufficientStorage(f"the data folder cannot be written to: {error.strerror}") from error

    async def _run(self, config: ModelConfig, file_format: ExportFormat, out: Path) -> dict[str, Any]:
        """The report of the process."""
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
        environment |= {"OMP_NUM_THREADS": str(self._threads), "OMP_WAIT_POLICY": "PASSIVE"}
        arguments = (str(self._weights), config.name, str(config.version), file_format, str(out))
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command,
            *arguments,
            stdin=asyncio.subprocess.PIPE,  # its end, should this process die, ends that one
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            output, complaints = await asyncio.gather(*map(_read, (process.stdout, process.stderr)))
            returncode = await process.wait()
        finally:  # where the caller has left, it still runs
            self._kill()
            await process.wait()
        if returncode != 0:
            last = complaints[-LOG_BYTES:].decode("utf-8", "replace").strip().rpartition("\n")[2]
            reason = "memory ran out, perhaps" if returncode == -signal.SIGKILL else last or "the log has nothing"
            raise ExportError(f"the export ended with {signal_name(returncode)}: {reason}")
        report: dict[str, Any] = json.loads(output.strip().rpartition(b"\n")[2])
        return report

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


async def _read(stream: asyncio.StreamReader | None) -> bytes:
    return b"" if stream is None else await stream.read()
