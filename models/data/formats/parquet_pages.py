"""Reads the sizes in the page headers of a parquet column: what a reader will allocate, whatever the footer claims.

A header is a struct of Thrift's compact protocol. Its fields 2 and 3 are the bytes of the page, unpacked and packed:
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from typing import IO, Any

MAX_HEADER_BYTES = 2**16  # of a page; statistics of long values lie in it
MAX_PAGES = 1_000_000  # of a column of a row group
MAX_NESTING = 8
STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)


def unpacked_bytes(content: IO[bytes], chunk: Any) -> int:
    """Returns the bytes of all pages of pyarrow's ColumnChunkMetaData, by their headers. Raises ValueError for an invalid header."""
    at, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset or 0
    if 0 < dictionary < at:
        at = dictionary
    end, total = at + chunk.total_compressed_size, 0
    for _ in range(MAX_PAGES):
        if at >= end:
            return total
        content.seek(at)
        header = _Header(content.read(min(MAX_HEADER_BYTES, end - at)))
        sizes = header.integers()
        if not all(sizes.get(field, -1) >= 0 for field in (2, 3)):
            raise ValueError("a page without a size")
        total += sizes[2]
        at += header.at + sizes[3]
    raise ValueError("a column of more pages than images")


class _Header:
    """The bytes of a header, from its start."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def integers(self) -> dict[int, int]:
        """Returns the integers of the struct by field; `at` is then its end."""
        found, field = dict[int, int](), 0
        while (head := self._byte()) != STOP:
            field = field + (head >> 4) if head >> 4 else self._zigzag()
            if head & 15 in INTEGERS:
                found[field] = self._zigzag()
            else:
                self._skip(head & 15, MAX_NESTING)
        return found

    def _skip(self, kind: int, depth: int) -> None:
        if depth == 0:
            raise ValueError("a page header that is nested")
        if kind in INTEGERS:
            self._varint()
        elif kind in (BYTE, DOUBLE):
            self.at += 1 if kind == BYTE else 8
        elif kind == BINARY:
            length = self._varint()
            self.at += length
        elif kind in (LIST, SET):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._skip(head & 15, depth - 1) if head & 15 not in (TRUE, FALSE) else self._byte()
        elif kind == STRUCT:
            while (head := self._byte()) != STOP:
                if not head >> 4:
                    self._varint()
                self._skip(head & 15, depth - 1)
        elif kind not in (TRUE, FALSE):
            raise ValueError("a page header with a field of no known type")

    def _byte(self) -> int:
        if self.at >= len(self._data):
            raise ValueError("a page header that is cut off, or too long")
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("an integer of more than 64 bits")
        return value | byte << shift

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
