import json
import sys
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.training_data import COLOURS, PREPROCESSING, archive, folder, png

from models.data.dataset import load
from models.data.files import FolderFiles
from models.data.formats import parquet
from models.data.samples import DatasetSource
from models.data.sources import open_source
from models.errors import DatasetError

TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001-0a1b2c3d.parquet"
NAMES = tuple(COLOURS)


def features(image: str = "image", label: str = "label", names: Sequence[str] = NAMES) -> dict[bytes, bytes]:
    declared = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
    return {b"huggingface": json.dumps({"info": {"features": declared}}).encode()}


def squares(per_class: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Images as structs, and labels."""
    labels = list(range(len(NAMES))) * per_class
    colours = list(COLOURS.values())
    images = [{"bytes": png(colours[label], seed + row), "path": f"{row}.png"} for row, label in enumerate(labels)]
    return images, labels


def shard(
    images: list[Any],
    labels: list[Any],
    image: str = "image",
    label: str = "label",
    metadata: dict[bytes, bytes] | None = None,
    row_group_size: int = 4,
) -> bytes:
    """One parquet file; images without a row are null."""
    table = pa.table({image: images, label: labels, "extra": [1.5] * len(labels)})
    content = BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata or {}), content, row_group_size=row_group_size)
    return content.getvalue()


def hub(per_class: int = 4) -> dict[str, bytes]:
    return {
        TRAIN: shard(*squares(per_class), metadata=features()),
        TEST: shard(*squares(1, 500), metadata=features()),
        "README.md": b"x",
    }


def listed(path: Path) -> DatasetSource:
    with open_source(path) as source:
        return source


@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
def test_a_repository_of_the_hub(tmp_path: Path, pack: Any) -> None:
    with open_source(pack(tmp_path / "d", hub())) as source:
        first = source.read("train-00000-of-00001.parquet[1]")
    assert first == squares(4)[0][1]["bytes"]
    assert source.classes == NAMES
    assert Counter(item.part for item in source.items) == {"train": 12, "test": 3}
    assert source.layout.endswith("train-00000-of-00001.parquet (12 images)")


def test_it_trains_as_any_other(tmp_path: Path) -> None:
    data = load(folder(tmp_path, hub()), PREPROCESSING, val_fraction=0.25, seed=0)
    assert data.audit.parts == {"train": 9, "val": 3, "test": 3}
    means = data.pixels.float().mean(dim=(2, 3))
    assert (means.argmax(dim=1) == 2 - data.labels).all()


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        pytest.param(shard(["a", "b"], ["x", " y "]), None, id="images of text"),
        pytest.param(shard([b"a", b"b"], ["x", " y "]), ("x", "y"), id="binary, strings"),
        pytest.param(shard([b"a", b"b"], [3, 7], image="img", label="fine_label"), ("3", "7"), id="no names"),
        pytest.param(shard([b"a", b"b"], [1, 0], "photo", "kind", features("photo", "kind")), NAMES[:2], id="declared"),
        pytest.param(shard([b"a", b"b"], [1, 0], metadata={b"huggingface": b"{"}), ("0", "1"), id="odd metadata"),
    ],
)
def test_columns(tmp_path: Path, content: bytes, classes: tuple[str, ...] | None) -> None:
    (tmp_path / "photos.parquet").write_bytes(content)
    if classes is None:
        with pytest.raises(DatasetError, match="column image holds string; it should hold the bytes"):
            listed(tmp_path / "photos.parquet")
    else:
        assert listed(tmp_path / "photos.parquet").classes == classes


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param("data/validation-00000-of-00002.parquet", "val", id="shard"),
        pytest.param("test.parquet", "test", id="file"),
        pytest.param("default/valid/0000.parquet", "val", id="folder"),
        pytest.param("unsupervised-00000-of-00001.parquet", None, id="another split"),
    ],
)
def test_the_part_is_told_by_the_name(tmp_path: Path, name: str, part: str | None) -> None:
    source = listed(folder(tmp_path, hub() | {name: shard(*squares(1, 900), metadata=features())}))
    assert Counter(item.part for item in source.items) == Counter({"train": 12, "test": 3}) + Counter(
        {part: 3} if part else {}
    )
    assert bool(source.notes) == (part is None)


def test_row_groups_are_read_when_needed_and_two_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FolderFiles(folder(tmp_path, hub(8)))
    reads: list[int] = []
    with files.closing:
        shard = parquet.Shard(files, TRAIN)
        read_row_group = shard._file.read_row_group

        def counted(group: int, **options: Any) -> Any:
            reads.append(group)
            return read_row_group(group, **options)

        monkeypatch.setattr(shard._file, "read_row_group", counted)
        images = [shard.image(row) for row in (0, 5, 3, 4, 23, 5, 0)]
    assert reads == [0, 1, 5, 0]
    assert images == [squares(8)[0][row]["bytes"] for row in (0, 5, 3, 4, 23, 5, 0)]


def test_a_row_without_bytes_is_a_bad_file(tmp_path: Path) -> None:
    images, labels = squares(4)
    images[1], images[2] = None, {"bytes": None, "path": "2.png"}
    files = {TRAIN: shard(images, labels, metadata=features())}
    audit = load(folder(tmp_path, files), PREPROCESSING, val_fraction=0.25, seed=0).audit
    assert [(bad.path[-3:], bad.reason) for bad in audit.bad] == [
        ("[1]", "cannot be read: the row holds no bytes of an image"),
        ("[2]", "cannot be read: the row holds no bytes of an image"),
    ]


def test_bytes_of_an_image_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "FILE_BYTES", 10)
    with open_source(folder(tmp_path, hub())) as source:
        assert len(source.read("train-00000-of-00001.parquet[0]")) == 11


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is damaged, or no parquet file", id="empty"),
        pytest.param(b"PAR1" + bytes(100) + b"PAR1", "is damaged", id="rubbish"),
        pytest.param(hub()[TRAIN][:-40], "is damaged", id="cut off"),
        pytest.param(shard([b"a", b"b"], [0, -1]), r"row 1 has no label \(-1\)", id="no label"),
        pytest.param(shard([b"a", b"b"], [0, None]), r"row 1 has no label \(None\)", id="null"),
        pytest.param(shard([b"a", b"b"], [0.5, 1.0]), "row 0 has no label", id="numbers"),
        pytest.param(shard([b"a"], [3], metadata=features()), "label 3 of row 0 has no name", id="label out of range"),
        pytest.param(shard([b"a"], [3], image="photo"), "rename that of the images; it has photo, label", id="image"),
        pytest.param(shard([b"a"], [3], label="kind"), "rename that of the labels", id="label"),
        pytest.param(shard([[1, 2]], [3]), "column image holds list", id="pixels in a list"),
    ],
)
def test_what_is_malformed_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as error:
        listed(folder(tmp_path, {"train.parquet": content}))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("train.parquet")


def test_a_damaged_row_group_makes_bad_files(tmp_path: Path) -> None:
    content = bytearray(hub(8)[TRAIN])
    content[100:300] = bytes(200)  # of the first row group's images
    audit = load(folder(tmp_path, {TRAIN: bytes(content)}), PREPROCESSING, val_fraction=0.25, seed=0).audit
    assert (len(audit.bad), audit.images) == (4, 20)
    assert "is damaged" in audit.bad[0].reason


def test_a_row_group_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 100)
    with pytest.raises(DatasetError, match=r"row group with .* bytes of images.*row_group_size"):
        listed(folder(tmp_path, hub()))


@pytest.mark.system
def test_a_bomb(tmp_path: Path) -> None:
    content = BytesIO()
    pq.write_table(pa.table({"image": [bytes(20 * 2**20)], "label": [1]}), content, compression="zstd")
    with pytest.raises(DatasetError, match="would grow to 20,971,"):
        listed(folder(tmp_path, {"train.parquet": content.getvalue()}))


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DatasetError, match=r"pip install 'imago\[parquet\]'"):
        listed(folder(tmp_path, hub()))


def bomb(rows: int, size: int, of: str, store_schema: bool) -> bytes:
    """A parquet file in which every row has the one value of a dictionary."""
    value = b"x" * size if of == "image" else "x" * size
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    columns = {"image": pa.array([b"i"] * rows), "label": pa.array([i % 2 for i in range(rows)])} | {of: repeated}
    content = BytesIO()
    pq.write_table(pa.table(columns), content, compression="gzip", row_group_size=rows, store_schema=store_schema)
    return content.getvalue()


@pytest.mark.abuse("A905")
@pytest.mark.parametrize("store_schema", [True, False])
def test_a_dictionary_is_no_bomb(tmp_path: Path, store_schema: bool) -> None:
    path = folder(tmp_path, {"train.parquet": bomb(500, 10**6, "image", store_schema)})
    before, peak = pa.total_allocated_bytes(), pa.default_memory_pool().max_memory()
    with open_source(path) as source:
        assert source.read("train.parquet[499]") == b"x" * 10**6
        assert pa.total_allocated_bytes() - before < 16 * 2**20
    assert pa.default_memory_pool().max_memory() <= max(peak, before + 64 * 2**20)


@pytest.mark.abuse("A905")
def test_labels_in_a_dictionary_are_no_bomb(tmp_path: Path) -> None:
    path = folder(tmp_path, {"train.parquet": bomb(500, 10**6, "label", False)})
    tracemalloc.start()
    with pytest.raises(DatasetError):
        listed(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20


def varint(value: int, length: int) -> bytes:
    """Of Thrift's zigzag integers, in so many bytes, more than it needs."""
    return bytes([(value * 2 >> 7 * i) & 0x7F | 0x80 for i in range(length - 1)] + [value * 2 >> 7 * (length - 1)])


@pytest.mark.system
@pytest.mark.abuse("A905")
def test_pages_that_are_larger_than_the_footer_says_are_refused(tmp_path: Path) -> None:
    images = [bytes(4 * 2**20) for _ in range(12)]
    content = BytesIO()
    table = pa.table({"image": images, "label": [i % 2 for i in range(12)]})
    pq.write_table(table, content, compression="gzip", use_dictionary=False, row_group_size=12)
    data, start = content.getvalue(), content.getvalue().rfind(b"PAR1", 0, -4)
    size = pq.ParquetFile(content).metadata.row_group(0).column(0).total_uncompressed_size
    exact = varint(size, (size * 2).bit_length() // 7 + 1)
    assert data.count(exact, start + 4) >= 1
    at = data.rindex(exact)  # in the footer
    lied = data[:at] + varint(1000, len(exact)) + data[at + len(exact) :]
    path = folder(tmp_path, {"train.parquet": lied})
    claimed = pq.ParquetFile(BytesIO(lied)).metadata.row_group(0)
    assert 1000 in (claimed.column(0).total_uncompressed_size, claimed.total_byte_size)
    with pytest.raises(DatasetError, match="would grow to 50,"):
        listed(path)
