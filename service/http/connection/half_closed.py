"""The transport of an answer to a client that has ended its sending side."""

import asyncio

START = b"HTTP/1.1 "  # of every answer
FIRST_WAIT_S = 0.25  # doubled from byte to byte


class HalfClosed(asyncio.Transport):
    """Writes the first, known bytes of an answer one at a time until the answer is there.

    A client that has closed its connection looks the same as one that waits for its answer, but it resets the connection on the first
    byte. The second byte then fails, the connection is lost, and no answer is computed for it.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport, self._loop = transport, loop
        self._sent = 0
        self._answered = False

    def probe(self) -> None:
        if self._answered or self._transport.is_closing() or self._sent == len(START):
            return
        self._transport.write(START[self._sent : self._sent + 1])
        self._sent += 1
        self._loop.call_later(FIRST_WAIT_S * 2 ** (self._sent - 1), self.probe)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._answered:
            self._answered = True
            data = bytes(data)[self._sent :]
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()
