"""Bytes of a request body while they arrive.

The heap is the wrong place for bodies that grow slowly side by side: each leaves holes that the others do not fit into, and
what was freed stays with the process (models/runtime/allocator.py). Beyond SMALL bytes they go into blocks of mapped
memory, which take no more than what has arrived and, but for a few, go back to the system at once.
"""

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

SMALL = 2**18  # bytes: most photographs
BLOCK = 2**20
MOST_SPARE = 16  # blocks that are kept for the next body: a fresh one costs 0.5 ms, most of it page faults

_spare: list[mmap] = []


class BodyBuffer:
    """Grows by `add`; `take` and `take_array` return all of it, once."""

    def __init__(self) -> None:
        self._small = bytearray()
        self._blocks: list[mmap] = []
        self._left = 0  # bytes in the last block

    def add(self, data: bytes | memoryview) -> None:
        if not self._blocks and len(self._small) + len(data) <= SMALL:
            self._small += data
            return
        if not self._blocks:
            small, self._small = self._small, bytearray()
            self._fill(memoryview(small))
        self._fill(memoryview(data))

    def take(self) -> bytes:
        """Returns the bytes and releases the memory."""
        body = b"".join(self._pieces())
        self.close()
        return body

    def take_array(self) -> bytearray:
        """Returns the bytes where they can be written to, and releases the memory."""
        body = bytearray().join(self._pieces())
        self.close()
        return body

    def _pieces(self) -> list[bytearray | mmap | bytes]:
        if not self._blocks:
            return [self._small]
        return [*self._blocks[:-1], self._blocks[-1][: BLOCK - self._left]]

    def close(self) -> None:
        """Releases the memory."""
        for block in self._blocks:
            if len(_spare) < MOST_SPARE:
                _spare.append(block)
            else:
                block.close()
        self._blocks, self._left, self._small = [], 0, bytearray()

    def _fill(self, data: memoryview) -> None:
        while data:
            if not self._left:
                self._blocks.append(_block())
                self._left = BLOCK
            size = min(len(data), self._left)
            self._blocks[-1].write(data[:size])
            self._left -= size
            data = data[size:]


def _block() -> mmap:
    if not _spare:
        return mmap(-1, BLOCK, MAP_PRIVATE | MAP_ANONYMOUS)
    block = _spare.pop()
    block.seek(0)
    return block
