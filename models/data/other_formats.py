"""Names formats that Imago does not read, for errors: boxes, masks, lists, exports of other tools, archives in archives.

Only the beginning of a few files of each kind is read.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from itertools import chain

from models.data.files import Files, is_image
from models.data.samples import UNREADABLE, listed
from models.files.zip_file import printable
from models.images import formats

PEEKED = 2**16  # bytes of a file
LOOKED_AT = 2  # files of each suffix in each folder name
MAX_FILES = 40
BOXES = "sort the images, or crops of the boxes, into a folder per class, or list them in a CSV with the columns path and label"
LIST = "list the images in a CSV with the columns path and label"
UNPACK = "unpack it, and give the folder or a zip of it"
ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
SPREADSHEET = "a spreadsheet, which is not read: save it as CSV UTF-8"
LABELS = (".json", ".jsonl", ".ndjson", ".manifest", ".xml", ".txt", ".lst", ".mat", *SPREADSHEETS)
PACKED = (
    ".h5", ".hdf5", ".npy", ".npz", ".pkl", ".pickle", ".tfrecord", ".tfrec", ".record", ".lmdb", ".mdb", ".arrow",
)  # fmt: skip

# Names of folders beside each other, without marks between words
IMAGES = re.compile("(jpeg)?images?|imgs?|jpe?gs?|png|rgb|photos?|pictures?")
BESIDE = re.compile(
    "masks?|labels?|annot(ation)?s?|ground ?truth|gt|depth|trimaps?|seg(mentation)?s?(class|object)?|imagesets|bbox(es)?|boxes|xmls?|"
    "jsons?|txt|meta|lists"
)
_YOLO = re.compile(rb"(\d+( -?\d*\.?\d+){4,}\s*)+")
_LISTED = re.compile(
    r"(\S+\.(?:jpe?g|png|bmp|webp|gif|tiff?))[ \t]+\S|\S[ \t]+(\S+\.(?:jpe?g|png|bmp|webp|gif|tiff?))\s", re.IGNORECASE
)
_STEM = re.compile(r"(.*?[^\W\d_])[ ._-]*\(?\d[\d._ -]*\)?$")  # `cat.12`, `Abyssinian_100`, `daisy (3)`


def labels_of(files: Files) -> str:
    """Returns a clause on the first labels or archives that are found, for the end of an error; empty if there are none."""
    by_kind: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in files.names:
        suffix = posixpath.splitext(name)[1].lower()
        kind = (suffix, posixpath.basename(posixpath.dirname(name)).lower())
        if suffix in (*LABELS, *ARCHIVES, *PACKED) and len(by_kind[kind]) < LOOKED_AT:
            by_kind[kind].append(name)
    names = sorted(chain(*by_kind.values()), key=lambda name: (_rank(name), name))[:MAX_FILES]
    found = next(filter(None, (_named(files, name) for name in names)), "") or _names_with_labels(files.names)
    return f"; {found}" if found else ""


def container(data: bytes) -> str:
    """Returns a clause on a file that is no dataset, by its first bytes: `is a RAR file: unpack it ...`."""
    if not data:
        return "is empty: copy or download it again"
    if data.startswith(b"PK\3\4"):
        return "is a zip file that is damaged or cut off: copy or download it again"
    if formats.format_of(data):
        return "is one image, and no dataset"
    if kind := json_kind(data):
        return f"is {kind}"
    if data.startswith(b"MATLAB"):
        return f"is a MATLAB file, which is not read: {LIST}"
    what, _, remedy = formats.described(data).partition("; ")
    if what == "an HTML page":
        return "is an HTML page, which was saved in its place: download the dataset itself"
    if what in ("text", "of unknown format", "a form without a file", "an address"):
        return "is of a format that is not read"
    if remedy == formats.UNPACK:
        return f"is {what}: {UNPACK}"
    return f"is {what}" + (f": {remedy}" if what == "a pointer of Git LFS" else "")


def _rank(name: str) -> int:
    suffix = posixpath.splitext(name)[1].lower()
    return 0 if suffix in LABELS and not suffix.startswith((".txt", ".mat")) else 1 if suffix in LABELS else 2


def _named(files: Files, name: str) -> str:
    suffix = posixpath.splitext(name)[1].lower()
    shown = printable(name)
    if suffix in ARCHIVES:
        return f"{shown} is an archive in the dataset, which is not read: {UNPACK}"
    if suffix in PACKED:
        return f"{shown} is a file of arrays or records, which is not read: export its images as PNG or JPEG, in a folder per class"
    if suffix == ".mat":
        return f"{shown} is a MATLAB file, which is not read: {LIST}"
    if suffix in SPREADSHEETS:
        return f"{shown} is {SPREADSHEET}"
    try:
        with files.open(files.names[name]) as content:
            start = content.read(PEEKED).removeprefix(b"\xef\xbb\xbf").lstrip()
    except UNREADABLE:
        return ""
    kind, remedy = next(((what, remedy) for matches, what, remedy in KINDS if matches(start)), ("", ""))
    if not kind and suffix in (".txt", ".lst") and _LISTED.search(start.decode("utf-8", "replace")):
        kind, remedy = "a list of images that is no table", f"{LIST}, separated by commas"
    return f"{shown} is {kind}: {remedy}" if kind else ""


def json_kind(start: bytes) -> str:
    """Returns what a JSON file with this beginning is, and the remedy: `a COCO file (...): sort the images ...`; empty if unknown."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((f"{what}: {remedy}" for matches, what, remedy in KINDS if matches(start)), "")


def _has(*keys: str) -> Callable[[bytes], bool]:
    wanted = [f'"{key}"'.encode() for key in keys]
    return lambda start: start.startswith((b"{", b"[")) and all(key in start for key in wanted)


KINDS: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (_has("source-ref"), "a manifest of SageMaker Ground Truth, which is not read", LIST),
    (_has("_via_settings"), "a project of VGG Image Annotator, which is not read", LIST),
    (_has("file_attributes", "regions"), "an export of VGG Image Annotator, which is not read", LIST),
    (_has("shapes", "imagePath"), "a file of Labelme, with shapes in an image", BOXES),
    (_has("annotations", "result", "data"), "Label Studio's full JSON, which is not read", "export JSON-MIN or CSV"),
    (
        _has("annotation_id", "annotator"),
        "an export of Label Studio without the columns image and choice",
        "name the tags so in the labelling setup, or rename them in the file",
    ),
    (_has("tags", "regions"), "an export of Azure Custom Vision, which is not read", LIST),
    (_has("images", "categories"), "a COCO file, with boxes, masks or labels of images", BOXES),
    (_has("images", "annotations"), "a COCO file, with boxes, masks or labels of images", BOXES),
    (lambda start: start.startswith(b"<") and b"<annotations>" in start, "an export of CVAT, which is not read", LIST),
    (
        lambda start: start.startswith(b"<") and b"<annotation" in start,
        "a file of Pascal VOC, with boxes in an image",
        BOXES,
    ),
    (lambda start: bool(_YOLO.match(start)) and b"." in start[:64], "a file of YOLO, with boxes in an image", BOXES),
)


def _names_with_labels(names: Iterable[str]) -> str:
    """A clause where the names of images begin with a few words, as `cat.0.jpg` and `dog.0.jpg` do."""
    words: dict[str, int] = defaultdict(int)
    for name in names:
        stem = posixpath.splitext(posixpath.basename(name))[0]
        if is_image(name) and not re.fullmatch(r"[\d._ -]*", stem):
            match = _STEM.fullmatch(stem)
            words[match[1] if match else ""] += 1
    several = sorted(word for word, count in words.items() if count > 1 and word)
    if len(several) < 2 or sum(words[word] for word in several) < 0.8 * sum(words.values()):
        return ""
    return (
        f"labels in names of files are not read ({listed(several)}): sort the images into a folder per class, or {LIST}"
    )


def are_parts_of_images(folders: Collection[str]) -> bool:
    """Whether folders beside each other are images and what belongs to them (masks, labels), and no classes."""
    names = {re.sub(r"[\W_]+", "", name).lower() for name in folders}
    images, beside = (set(filter(known.fullmatch, names)) for known in (IMAGES, BESIDE))
    return bool(images) and bool(beside) and names == images | beside
