import gzip
import io
import os
import tarfile
import tempfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.packed_data import CIFAR10, gzipped, mnist
from support.training_data import PREPROCESSING, coloured, folder

from models.data import tar
from models.data.dataset import load
from models.data.samples import DatasetSource
from models.data.sources import open_source
from models.errors import DatasetError


def packed(path: Path, files: Mapping[str, bytes], mode: str = "w:gz", format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, mode, format=format) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def special(path: Path, kind: bytes) -> Path:
    """Class folders, and one member that is no regular file."""
    packed(path, coloured(4), "w")
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("red/odd.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    return path


def listed(path: Path) -> DatasetSource:
    with open_source(path) as source:
        return source


@pytest.mark.parametrize(("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar", "w"), ("any", "w:gz")])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_it_is_the_same_dataset_as_its_folder(tmp_path: Path, name: str, mode: str, format: int) -> None:
    files = {f"./photos/{'long-' * 15}/{name}": content for name, content in coloured(4).items()}
    plain = load(folder(tmp_path / "d", files), PREPROCESSING, val_fraction=0.25, seed=0)
    other = load(packed(tmp_path / name, files, mode, format), PREPROCESSING, val_fraction=0.25, seed=0)
    assert (other.sha256, other.paths, other.audit.images) == (plain.sha256, plain.paths, 12)


@pytest.mark.parametrize(
    ("files", "images"),
    [
        pytest.param({f"cifar-10-batches-bin/{name}": content for name, content in CIFAR10.items()}, 8, id="CIFAR-10"),
        pytest.param({f"MNIST/raw/{name}": content for name, content in gzipped(mnist()).items()}, 30, id="MNIST"),
    ],
)
def test_packed_pixels_as_they_are_published(tmp_path: Path, files: dict[str, bytes], images: int) -> None:
    path = packed(tmp_path / "a.tar.gz", files)
    with open_source(path) as source:
        assert len({source.read(item.file) for item in source.items}) == len(source.items) == images


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_what_is_no_regular_file_is_a_bad_file(tmp_path: Path, kind: bytes) -> None:
    audit = load(special(tmp_path / "a.tar", kind), PREPROCESSING, val_fraction=0.25, seed=0).audit
    (bad,) = audit.bad
    reason = "a symbolic link, which is not followed" if kind == tarfile.SYMTYPE else "no regular file"
    assert (bad.path, reason in bad.reason, audit.images) == ("red/odd.png", True, 12)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "ant/../../evil.png", r"..\evil.png", "C:/evil.png"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=r"evil\.png.*outside"):
        listed(packed(tmp_path / "a.tar.gz", coloured(1) | {name: b"x"}))


def rewritten(path: Path, change: Any) -> Path:
    content = bytearray(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(bytes(change(content) or content)))
    return path


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data[:700], id="cut off"),
        pytest.param(lambda data: data.__setitem__(slice(124, 135), b"7" * 11), id="a size beyond the end"),
        pytest.param(lambda data: data.__setitem__(slice(124, 136), b"\xff" * 12), id="a size below nothing"),
        pytest.param(lambda data: data.__setitem__(156, ord("x")), id="a header that is none"),
        pytest.param(lambda data: data.__setitem__(1024, ord("x")), id="a second header that is none"),
    ],
)
def test_a_damaged_tar(tmp_path: Path, change: Any) -> None:
    with pytest.raises(DatasetError, match=r"damaged or cut off|neither a folder") as error:
        listed(rewritten(packed(tmp_path / "a.tar.gz", coloured(1)), change))
    assert "\n" not in str(error.value)


def test_a_gzip_that_is_cut_off(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar.gz", coloured(4))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"a\.tar\.gz is damaged or cut off"):
        listed(path)


@pytest.mark.system
def test_a_bomb_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder(tmp_path / "tmp", {"kept": b""})))
    path = packed(tmp_path / "a.tar.gz", coloured(1) | {"ant/big.png": bytes(40 * 2**20)})
    with pytest.raises(DatasetError, match=r"a\.tar\.gz is refused: its .* bytes would grow"):
        listed(path)
    assert os.listdir(tmp_path / "tmp") == ["kept"]


def test_headers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a/" * 300 + "b.png"
    path = packed(tmp_path / "a.tar", coloured(1) | {name: b"x"}, "w")
    monkeypatch.setattr(tar, "MAX_HEADER_BYTES", 512)
    with pytest.raises(DatasetError, match="damaged"):
        listed(path)


def long_names(count: int, size: int) -> bytes:
    """A chain of GNU headers for long names, each of which tarfile reads for the next, and none of which is a member."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, size
    return (member.tobuf(tarfile.GNU_FORMAT) + bytes(-(-size // 512) * 512)) * count


def sparse_map(entries: int) -> bytes:
    """A sparse file of the PAX format 1.0, whose map tarfile reads as a list of numbers."""
    text = f"{entries}\n".encode() + b"0\n" * (2 * entries)
    text += bytes(-len(text) % 512)
    member = tarfile.TarInfo("ant/sparse.png")
    member.size = len(text)
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "ant/sparse.png"}
    return member.tobuf(tarfile.PAX_FORMAT) + text


def global_headers(count: int) -> bytes:
    member = tarfile.TarInfo("ant/1.png").tobuf(tarfile.USTAR_FORMAT)
    keys = [tarfile.TarInfo.create_pax_global_header({f"k{i}": "v" * 8000}) for i in range(count)]
    return b"".join(key + member for key in keys)


@pytest.mark.system
@pytest.mark.abuse("A906")
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(long_names(5000, 100), id="a chain of long names"),
        pytest.param(long_names(1, 2**22), id="a long name"),
        pytest.param(sparse_map(200_000), id="a sparse map"),
        pytest.param(global_headers(2000), id="global headers"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_headers_cost_no_memory(tmp_path: Path, headers: bytes, mode: str) -> None:
    path = packed(tmp_path / "a.tar", coloured(1), "w")
    content = headers + path.read_bytes()
    path.write_bytes(gzip.compress(content) if mode == "w:gz" else content)
    tracemalloc.start()
    with pytest.raises(DatasetError, match=r"damaged|would grow"):
        listed(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20


@pytest.mark.system
@pytest.mark.abuse("A906")
def test_a_member_costs_its_name(tmp_path: Path) -> None:
    member = tarfile.TarInfo("red/1.png").tobuf(tarfile.USTAR_FORMAT)
    path = packed(tmp_path / "a.tar", coloured(1), "w")
    path.write_bytes(member * 4000 + path.read_bytes())
    tracemalloc.start()
    source = listed(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20
    assert source.notes[0].startswith("3999 files have the name of another")


def test_a_single_gzipped_file_is_no_dataset(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzipped(mnist())[path.name])
    with pytest.raises(DatasetError, match="is a gzip file: unpack it"):
        listed(path)
