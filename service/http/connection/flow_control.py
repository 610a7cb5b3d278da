"""Flow control of a connection: PausingFlowControl pauses reading, WriteWatch ends connections whose client does not read its answer."""

import asyncio
import fcntl
import struct
import termios

from uvicorn.protocols.http.flow_control import FlowControl

from service.http.connection.held_bytes import Share

RATE = 1024  # bytes a second that a client must take


class PausingFlowControl(FlowControl):
    """Flow control that does not resume reading while requests wait behind one that is being answered."""

    ahead = False

    def resume_reading(self) -> None:
        if not self.ahead:
            super().resume_reading()


class WriteWatch:
    """Watches one connection: within each `span_s` seconds its client must take bytes at RATE. `share` counts the unsent bytes."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, share: Share, span_s: float
    ) -> None:
        self._transport, self._loop, self._share, self._span_s = transport, loop, share, span_s
        self._left = 0  # bytes at the last check
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Watches until everything is written, or the connection is closed. Aborts at once if too many unread bytes are held."""
        if self._timer is None:
            self._left = self._unsent()
            self._timer = self._loop.call_later(self._span_s, self._check)
        if not self._share.set(self._transport.get_write_buffer_size()):
            self._transport.abort()

    def end(self) -> None:
        """Stops watching and counting."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._share.set(0)

    def hurry(self, span_s: float) -> None:
        """Shortens the time within which a client must take bytes, from now on."""
        self._span_s = min(self._span_s, span_s)
        if self._timer is not None:
            self.end()
            self.begin()

    def _check(self) -> None:
        self._timer = None
        left = self._unsent()
        if self._transport.get_write_buffer_size() == 0:
            self._share.set(0)
        elif self._left - left < min(self._span_s * RATE, self._left):
            self._transport.abort()
        else:
            self.begin()

    def _unsent(self) -> int:
        """Returns the bytes that are written but not acknowledged: in this process and, if the system tells, in the kernel."""
        size = self._transport.get_write_buffer_size()
        socket = self._transport.get_extra_info("socket")
        if socket is None:
            return size
        try:
            (queued,) = struct.unpack("i", fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4)))
        except (OSError, ValueError):  # ValueError: the socket is closed
            return size
        return size + int(queued)
