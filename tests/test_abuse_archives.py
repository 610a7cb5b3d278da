"""Archives that hold more than they say: what comes out is bounded, and so is the table of contents."""

import bz2
import lzma
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.hostile_zips import claim, many_entries, overlapping, packed, zeros
from support.training_data import PREPROCESSING, coloured

from models.data.dataset import load
from models.data.sources import open_source
from models.errors import DatasetError
from models.files import zip_file
from models.files.zip_file import open_archive

MIB = 2**20
BOMB = 256 * MIB  # of a stream; a reader that believes in it takes twice as much
SLACK = 24 * MIB


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """The peak of what Python allocates."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size, f"{peak / MIB:.0f} MiB"


def read(path: Path, name: str) -> bytes:
    with open_archive(path) as zipped, zipped.open(zipped.member(name)) as content:
        return content.read()


@pytest.mark.abuse("A901")
@pytest.mark.parametrize(
    ("method", "make", "reason"),
    [
        pytest.param(12, lambda: bz2.BZ2Compressor(9), "packed with bzip2", id="bzip2"),
        pytest.param(14, lambda: lzma.LZMACompressor(lzma.FORMAT_ALONE), "packed with LZMA", id="LZMA"),
        pytest.param(9, None, "packed with Deflate64", id="Deflate64"),
        pytest.param(93, None, "packed with Zstandard", id="Zstandard"),
        pytest.param(77, None, "packed with method 77", id="unknown"),
    ],
)
def test_a_member_of_another_method_is_a_bad_file(
    tmp_path: Path, method: int, make: Callable[[], object] | None, reason: str
) -> None:
    stream = zeros(64 * MIB, make) if make else b"x"  # type: ignore[arg-type]
    path = packed(tmp_path / "a.zip", coloured(4) | {"red/bomb.png": stream}, zipfile.ZIP_STORED)
    claim(path, "red/bomb", method=method, size=1_000_000)
    with at_most(SLACK):
        (bad,) = load(path, PREPROCESSING, val_fraction=0.25, seed=0).audit.bad
    assert (bad.path, reason in bad.reason, "with Deflate" in bad.reason) == ("red/bomb.png", True, True)


@pytest.mark.abuse("A902")
@pytest.mark.parametrize("size", [pytest.param(1000, id="less"), pytest.param(40 * MIB, id="more")])
def test_no_more_comes_out_than_the_table_says(tmp_path: Path, size: int) -> None:
    stream = zeros(BOMB if size == 1000 else 16 * MIB)
    path = packed(tmp_path / "a.zip", {"red/bomb.png": stream + bytes(80_000)}, zipfile.ZIP_STORED)
    claim(path, "red/bomb", method=8, size=size)
    with at_most(size + 8 * MIB), pytest.raises(zipfile.BadZipFile, match="not of the size"):
        read(path, "red/bomb.png")


@pytest.mark.abuse("A902")
def test_stored_members_end_where_the_table_says(tmp_path: Path) -> None:
    path = claim(packed(tmp_path / "a.zip", {"red/1.png": b"12345678"}, 0), "red", size=4)
    with pytest.raises(zipfile.BadZipFile, match="not of the size"):
        read(path, "red/1.png")


@pytest.mark.abuse("A902")
def test_encrypted_members_and_wrong_checksums_are_bad_files(tmp_path: Path) -> None:
    path = claim(packed(tmp_path / "a.zip", coloured(4)), "red/000", flags=1)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\1\2", 0, content.rfind(b"red/001"))
    content[at + 16] ^= 1  # the CRC
    path.write_bytes(content)
    bad = load(path, PREPROCESSING, val_fraction=0.25, seed=0).audit.bad
    assert ["without a password" in bad[0].reason, "checksum" in bad[1].reason, len(bad)] == [True, True, 2]


@pytest.mark.abuse("A902")
def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="members overlap"), open_source(overlapping(tmp_path / "a.zip", 40)):
        pass


def test_a_zip64_with_data_descriptors_and_a_prefix_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with path.open("wb") as file:
        file.write(b"#!/bin/sh\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
            for name, content in coloured(3).items():
                with target.open(name, "w", force_zip64=True) as member:
                    member.write(content)
    with open_source(path) as source:
        assert [source.read(item.file) for item in source.items] == [
            content for _, content in sorted(coloured(3).items())
        ]


# The table of contents


@pytest.mark.abuse("A1001")
def test_the_number_of_entries_is_read_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_file, "MAX_FILES", 1000)
    monkeypatch.setattr(zip_file, "read_directory", lambda *given: pytest.fail("the table was read"))
    with at_most(MIB), pytest.raises(DatasetError, match="more than 1,000 files"):
        zip_file.check(many_entries(tmp_path / "a.zip", 20_000))


@pytest.mark.abuse("A1001")
def test_an_end_record_that_lies_costs_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_file, "MAX_FILES", 1000)
    path = many_entries(tmp_path / "a.zip", 200_000, claimed=3)
    with at_most(MIB), pytest.raises(DatasetError, match="more than 1,000 files"):
        zip_file.check(path)
    monkeypatch.setattr(zip_file, "MAX_DIRECTORY_BYTES", 2**16)
    with at_most(MIB), pytest.raises(DatasetError, match="its table of contents has 9,400,000 bytes"):
        zip_file.check(path)


@pytest.mark.abuse("A1002")
@pytest.mark.timeout(60)
def test_the_check_of_an_upload_has_a_bound_on_its_memory(tmp_path: Path) -> None:
    """As the server runs it, with a smaller bound."""
    path = many_entries(tmp_path / "a.zip", 300_000)
    script = (
        f"import models.files.zip_file as a; from pathlib import Path; a.CHECK_BYTES = 2**25; a.main(Path({str(path)!r}));"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    message, peak_kb = done.stdout.splitlines()
    assert message == "a.zip is refused: its table of contents takes more than 32 MB of memory; split the dataset"
    assert int(peak_kb) < 2**16
