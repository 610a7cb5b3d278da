"""The server process: uvicorn with our protocol, a drain that loses nothing, and exit codes that mean something.

SIGTERM or SIGINT: not ready, new requests 503 -> requests under way finish -> connections close -> exit 0
a second signal, or the grace time over: exit 1          a lost device: exit 4, so that a supervisor starts it again
"""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI

from models.runtime import tune_allocator
from models.store.store import ModelStore
from service.app import create_app
from service.errors import NotReady
from service.http.auth import Keys
from service.http.connection.guarded_protocol import GuardedProtocol
from service.http.connection.guards import Guards
from service.http.memory_trimming import Trimmer
from service.http.middleware import LINGER_S, Traffic
from service.inference.engine import Engine
from service.inference.traces import Traces
from service.observability import logs
from service.observability.metrics import Metrics
from service.settings import Settings
from service.system.open_files import connections_within, raise_limit
from service.system.platform_variables import injected

log = logging.getLogger(__name__)

EXIT_CUT_SHORT = 1  # requests were under way
EXIT_DEVICE_LOST = 4  # 3 is uvicorn's: it could not start, the port being taken, say
LOOK_S = 1.0  # how often a server that was not ready looks whether it is

_IMPORTED_AT = time.monotonic()


def run(settings: Settings) -> NoReturn:
    """Serves until a signal comes, and ends the process. First raises DeviceUnavailable, SettingsError where an extra is
    missing, or OSError for the data folder."""
    metrics = Metrics()
    logs.configure(settings, metrics)
    traces = Traces.of(settings)
    if names := injected(os.environ):
        log.info("not settings, but set by Kubernetes or docker --link: %s", ", ".join(sorted(names)))
    tune_allocator()
    keys, traffic, store = Keys.of(settings), Traffic(), ModelStore(settings.weights)
    engine = Engine(settings, store, metrics, traces)
    log.info("computing on %s", ", ".join(map(str, engine.devices)))
    app = create_app(settings, engine, store, metrics, keys, traffic, traces=traces)
    server = make_server(settings, app, engine, traffic)
    exit_code = exit_code_of(server)
    if traces is not None:
        traces.close()
    # Without the interpreter's own end: it waits for threads that still load a model, and a device thread that returns from torch
    # meanwhile aborts the process.
    logging.shutdown()
    os._exit(exit_code)


def exit_code_of(server: "Server") -> int:
    """Runs the server to its end, whatever that is."""
    try:
        server.run()
    except SystemExit as error:  # uvicorn's: it could not start
        return error.code if isinstance(error.code, int) else EXIT_CUT_SHORT
    except BaseException:
        log.exception("the server failed")
        return EXIT_CUT_SHORT
    return server.exit_code


def make_server(settings: Settings, app: FastAPI, engine: Engine, traffic: Traffic) -> "Server":
    connections, backlog = connections_within(raise_limit(), settings.max_connections)
    protocol: Any = partial(GuardedProtocol, guards=Guards.of(settings, connections))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=protocol,
        ws="none",
        backlog=backlog,
        timeout_keep_alive=settings.keep_alive_s,
        lifespan="on",
        log_config=None,
        access_log=False,  # the middleware writes one of its own
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        server_header=False,
    )
    return Server(config, engine, traffic, settings.drain_seconds)


class Server(uvicorn.Server):
    """A uvicorn server that keeps listening while it drains, so that whoever still comes is told so."""

    def __init__(self, config: uvicorn.Config, engine: Engine, traffic: Traffic, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine, self.traffic = engine, traffic
        self.drain_seconds = drain_seconds
        self.exit_code = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        self._tasks.append(asyncio.create_task(self._announce()))
        self._tasks.append(asyncio.create_task(Trimmer(self.traffic).run()))

    async def _announce(self) -> None:
        try:
            await self.engine.wait_ready()
        except NotReady as error:
            log.error("not ready: %s", error)
            while not self.engine.ready:  # noqa: ASYNC110  (a load that lacked memory is tried again)
                await asyncio.sleep(LOOK_S)
        except Exception:
            log.exception("not ready: the models could not be loaded")
            return
        app: Any = self.config.app
        await asyncio.to_thread(app.openapi)  # is cached; the first request for it would stop the event loop for 0.15 s
        # What is in memory now stays: let no collection walk it again (a full one takes 0.1 s and more with torch imported).
        gc.collect()
        gc.freeze()
        ready = [model.name for model in self.engine.registry.models() if model.state == "ready"]
        log.info("ready in %.1f s: %s", process_age_s(), ", ".join(ready))

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 9 and not self._draining and not self.engine.live:  # once a second
            log.critical("a device is lost or hangs; leaving, to be started again")
            self.exit_code = EXIT_DEVICE_LOST
            self.should_exit = self.force_exit = True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn, we do not raise the signal again at the end: a drained server exits 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """The first time drains and leaves, the second time leaves."""
        if not self._draining:
            self._draining = True
            self._tasks.append(asyncio.create_task(self._drain()))
            return
        log.warning("told twice to stop: leaving at once")
        self.exit_code = EXIT_CUT_SHORT
        self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        log.info("shutting down: requests under way have %g s to finish", self.drain_seconds)
        ends = time.monotonic() + self.drain_seconds
        for connection in list(self.server_state.connections):
            if isinstance(connection, GuardedProtocol):
                connection.leave()
        answered = await self.engine.drain(self.drain_seconds)
        if not (answered and await self.traffic.ended(max(0.0, ends - time.monotonic()))):  # uploads that had begun
            log.error("requests were still under way after %g s", self.drain_seconds)
            self.exit_code = EXIT_CUT_SHORT
        self.config.timeout_graceful_shutdown = math.ceil(max(0.0, ends - time.monotonic()))
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn cancels at the end of the grace time is told 503, and has the time to read it."""
        await super().shutdown(sockets)
        if self.server_state.tasks and not self.force_exit:
            await asyncio.wait(self.server_state.tasks, timeout=LINGER_S + 1)


def process_age_s() -> float:
    """Seconds since this process began, imports included; where there is no /proc, since this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic() - _IMPORTED_AT
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): in ticks, since the machine booted
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
