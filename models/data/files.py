"""The files of a dataset, in a folder or an archive, under one interface. (`tar` implements it for tar archives.)

Nothing outside the dataset is ever read. A zip is read in place, member by member, and never extracted. A link that leads out of the
folder is an error of that file. Scans and reads are bounded.
"""

import gzip
import os
import posixpath
import shutil
import stat
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from lzma import LZMAError
from pathlib import Path
from typing import IO, BinaryIO

from models.data.samples import UNREADABLE, IgnoredFiles, counted, tallied
from models.data.system_files import left_by_systems, system_reason
from models.errors import DatasetError
from models.files.safe_open import open_beneath
from models.files.text_encodings import AUTO, decode_text, described
from models.files.zip_directory import Member
from models.files.zip_file import Archive, check_count, printable
from models.images.cost import FILE_BYTES, TRAINING_BYTES

IMAGES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".ppm", ".pgm",
})  # fmt: skip


def is_image(name: str) -> bool:
    """Whether the name has the suffix of an image format."""
    return posixpath.splitext(name)[1].lower() in IMAGES


PIECE = 2**20
SEPARATORS = (b"\n", b",", b";", b"\t", b'"')  # around a word, to show it
LINKED = "a symbolic link, which is not followed in an archive"
MAX_DEPTH = 32  # folders in folders
DAMAGED = (EOFError, zlib.error, LZMAError, gzip.BadGzipFile, zipfile.BadZipFile)


class Files(ABC):
    """The files of one folder or archive. Several threads may read at once.

    `names` maps relative names, with `/` between their parts, to the names that the methods take. It has every file, and every empty
    folder with a `/` at the end. Hidden files and files left by operating systems (`__MACOSX`, `Thumbs.db`) are left out.
    """

    label: str  # of the folder or archive, for messages
    closing: ExitStack  # closed at the end
    notes: tuple[str, ...] = ()  # sentences on the names, for the audit
    encoding: str = AUTO  # of text files without a byte order mark; AUTO is UTF-8
    unread: Mapping[str, bytes] = {}  # names in an unknown code page, as they are shown, with their bytes
    ignored: tuple[IgnoredFiles, ...] = ()  # left by operating systems; set once `names` was read
    links: tuple[str, ...] = ()  # links that are not followed; set once `names` was read

    @property
    def advice(self) -> str:
        """Counts the links that are not followed and says what to do; empty if there are none."""
        if not self.links:
            return ""
        count = counted(len(self.links), "file is a symbolic link, which is", "files are symbolic links, which are")
        said = f"{count} not followed, the first {printable(self.links[0])}"
        return f"{said}: {self.remedy}"

    remedy = "pack the archive again with the files themselves (tar -h)"

    @property
    @abstractmethod
    def names(self) -> dict[str, str]: ...

    @abstractmethod
    def open(self, file: str) -> IO[bytes]:
        """Opens a file for sequential reading. Raises one of UNREADABLE, as the other methods do."""

    @abstractmethod
    def size(self, file: str) -> tuple[int, int]:
        """Returns the declared size of the content, and the bytes that it takes on the disk."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this relative name."""
        return name in self.names

    def file_of(self, name: str) -> str:
        """Returns the name that the methods take for a relative name."""
        return self.names.get(name, name)

    def read(self, file: str) -> bytes:
        """Reads at most one byte more than a decoder accepts, so that a huge file costs no memory."""
        with self.open(file) as opened:
            return b"".join(_pieces(opened, FILE_BYTES + 1))

    def seekable(self, file: str) -> IO[bytes]:
        """Opens a file for random access: the file itself, or a copy that is deleted when it is closed."""
        with ExitStack() as closing:
            copy = closing.enter_context(tempfile.TemporaryFile())
            with self.open(file) as content:
                shutil.copyfileobj(content, copy, 2**20)
            copy.seek(0)
            closing.pop_all()  # the caller closes it
        return copy

    def text(self, name: str) -> str:
        """Reads a small text file by its relative name. Raises DatasetError if it is unreadable, too large, or in another encoding."""
        with opened(self, name) as content:
            data = content.read(TRAINING_BYTES + 1)
        if len(data) > TRAINING_BYTES:
            raise DatasetError(f"{printable(name)} has more than {TRAINING_BYTES:,} bytes; split the dataset")
        try:
            return decode_text(data, self.encoding)
        except UnicodeDecodeError as error:
            raise DatasetError(undecodable(name, error, self.encoding), "encoding") from None


def undecodable(name: str, error: UnicodeDecodeError, encoding: str) -> str:
    """Says what to do about a text file in another encoding, and how its first undecodable bytes read in the likely ones."""
    start = max(error.object.rfind(end, 0, error.start) for end in SEPARATORS) + 1
    ends = [at for end in SEPARATORS if (at := error.object.find(end, error.start)) >= 0]
    sample = error.object[max(start, error.start - 40) : min([*ends, error.start + 40])].strip()
    known = "UTF-8" if encoding == AUTO else encoding
    return (
        f"{printable(name)} is not text in {known}; it reads {described([sample])}: give the encoding with --encoding "
        "(field `encoding`), or save the file as UTF-8"
    )


def _pieces(content: IO[bytes], size: int) -> Iterator[bytes]:
    """Reads at most `size` bytes, in pieces: `read` allocates the whole size that it is asked for."""
    while size > 0 and (piece := content.read(min(size, PIECE))):
        size -= len(piece)
        yield piece


class FolderFiles(Files):
    """A folder. Reads only files below `root`, even if a folder is replaced by a link meanwhile.

    `follow_links` also reads the targets of links: for the command line, whose user may read these files anyway.
    """

    remedy = (
        "upload the dataset as a zip, or copy it with `cp -rL`, which replaces links by what they lead to; "
        "`imago finetune` on the command line follows them"
    )

    def __init__(self, root: Path, only: str | None = None, follow_links: bool = False) -> None:
        """`only`: the single file of the folder that is read."""
        self._root, self._inside, self.label, self.closing = root, os.path.realpath(root), root.name, ExitStack()
        self._only, self._follow = only, follow_links

    @cached_property
    def names(self) -> dict[str, str]:
        if self._only:
            return {self._only: self._only}
        scan = _Scan(self._root, self._inside, self._follow)
        self.links, self.ignored = tuple(sorted(scan.links)), tallied(scan.ignored)
        return {name: name for name in scan.names}

    def has(self, name: str) -> bool:
        """Looks up this name alone: folders beside a table may not belong to the dataset."""
        try:
            return not stat.S_ISDIR(os.lstat(f"{self._inside}/{name}").st_mode)
        except (OSError, ValueError):
            return False

    def file_of(self, name: str) -> str:
        return name

    def open(self, file: str) -> BinaryIO:
        try:
            real = os.path.realpath(os.path.join(self._inside, file), strict=True)
        except FileNotFoundError:
            if os.path.islink(os.path.join(self._inside, file)):
                raise FileNotFoundError("a link to a file that does not exist") from None
            raise
        if not self._follow and not _lies_in(real, self._inside):
            raise OSError("a link that leads out of the dataset")
        handle = open_beneath("/", real.strip("/").split("/"), os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would block
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError("a link to a folder, a pipe or a device, and no regular file")
        return open(handle, "rb")

    def seekable(self, file: str) -> BinaryIO:
        return self.open(file)

    def size(self, file: str) -> tuple[int, int]:
        with self.open(file) as opened:
            size = os.fstat(opened.fileno()).st_size
        return size, size


class ZipFiles(Files):
    remedy = "pack the zip again with the files themselves (zip -r, without -y)"

    def __init__(self, archive: Archive) -> None:
        self._archive, self.label, self.closing = archive, archive.path.name, ExitStack()
        self._names, self.notes, self.ignored = relative_names(archive.names)
        self.unread = archive.unread
        self.links = tuple(name for name, file in self._names.items() if archive.member(file).is_link)
        if self.unread:
            first = described([next(iter(self.unread.values()))[:200]])
            count = counted(len(self.unread), "name is not UTF-8, and its", "names are not UTF-8, and their")
            note = f"{count} code page is not known; the first reads {first}"
            self.notes += (
                f"{note}: give it with --encoding (field `encoding`), or pack the zip again with names in UTF-8",
            )

    @property
    def names(self) -> dict[str, str]:
        return self._names

    def open(self, file: str) -> IO[bytes]:
        member = self._member(file)
        if member.is_link:
            raise OSError(LINKED)
        return self._archive.open(member)

    def size(self, file: str) -> tuple[int, int]:
        member = self._member(file)
        return member.size, member.packed

    def _member(self, file: str) -> Member:
        try:
            return self._archive.member(file)
        except KeyError:
            raise FileNotFoundError("there is no such file in the zip") from None


@contextmanager
def opened(files: Files, name: str) -> Iterator[IO[bytes]]:
    """Opens a file that the dataset needs. Any failure to read it is a DatasetError."""
    try:
        with files.open(files.names.get(name, name)) as content:
            yield content
    except DAMAGED as error:
        raise DatasetError(f"{printable(name)} is damaged or cut off: copy or download it again") from error
    except UNREADABLE as error:
        raise DatasetError(f"{printable(name)} cannot be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Returns why a file could not be read, in the words of the system or of the archive's reader."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def is_text(files: Files, name: str, empty: bool = True) -> bool:
    """Whether the first 512 bytes are text. An empty file counts if `empty` is set; an unreadable one does not."""
    try:
        with files.open(files.names[name]) as content:
            start = content.read(512)
    except (KeyError, *UNREADABLE):
        return False
    if not start:
        return empty
    return start.startswith((b"\xff\xfe", b"\xfe\xff")) or all(byte >= 32 or byte in b"\t\r\n\f" for byte in start)


# Folders


def _lies_in(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


class _Scan:
    """Lists a folder. `names`: every file below `root`, and every empty folder with a `/` at its end. `ignored`: pairs of a reason and a
    name. `links`: those that are not followed."""

    def __init__(self, root: Path, inside: str, follow_links: bool) -> None:
        self.names: list[str] = []
        self.ignored: list[tuple[str, str]] = []
        self.links: list[str] = []
        self._root, self._inside, self._follow = root, inside, follow_links
        folders: list[tuple[str, frozenset[str]]] = [("", frozenset({inside}))]  # with all real folders it lies in
        looked = 0
        while folders:
            folder, above = folders.pop()
            folders += self._look(folder, above)
            looked += 1
            check_count(len(self.names) + len(self.ignored) + looked)  # links may lead to a folder any number of times

    def _look(self, folder: str, above: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
        """Adds the files of one folder, and returns the folders in it with the real folders above each."""
        if folder.count("/") > MAX_DEPTH:
            raise DatasetError(f"{printable(folder)} lies more than {MAX_DEPTH} folders deep; this is no dataset")
        try:
            entries = list(os.scandir(self._root / folder))
        except OSError as error:
            name = printable(folder) or self._root.name
            raise DatasetError(f"the folder {name} cannot be read: {error.strerror}") from error
        folders, kept = [], 0
        for entry in entries:
            name = folder + entry.name
            if why := system_reason(entry.name):
                is_folder = entry.is_dir(follow_symlinks=False)
                self.ignored.append((why, f"{name}/" if is_folder else name))
                continue
            kept += 1
            if entry.is_symlink() and entry.is_dir():
                folders += self._linked(name, above)
            elif entry.is_dir(follow_symlinks=False):
                folders.append((f"{name}/", above))
            else:
                self.names.append(name)
                if entry.is_symlink() and not self._follow and not _lies_in(os.path.realpath(entry.path), self._inside):
                    self.links.append(name)
        if folder and not kept:
            self.names.append(folder)
        return folders

    def _linked(self, name: str, above: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
        """Returns the folder that a link leads to, unless the link lies in it."""
        if not self._follow:
            self.links.append(name)
            self.names.append(name)
            return []
        real = os.path.realpath(self._root / name)
        above |= {os.path.realpath((self._root / name).parent)}
        if any(folder == real or _lies_in(folder, real) for folder in above):
            self.ignored.append(("a link to a folder that it lies in", name))
            return []
        return [(f"{name}/", above | {real})]


# Archives


def relative_names(members: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...], tuple[IgnoredFiles, ...]]:
    """Returns `Files.names`, `notes` and `ignored` for the members of an archive.

    Names of folders end in `/`. A folder is empty if no other member lies in it. Of several members with one name the last is kept.
    """
    names: dict[str, str] = {}
    twice: list[str] = []
    for member in members:
        name = plain_name(member)
        if name in names and not name.endswith("/"):
            twice.append(name)
        names[name] = member
    filled = _parents(names) | {""}  # "" is the archive itself, packed as "./"
    ignored = {name: left for name in names if (left := left_by_systems(name))}
    kept = {name: file for name, file in names.items() if name not in filled and name not in ignored}
    count = counted(len(twice), "file has the name of another and is", "files have the name of another and are")
    lost = f"{count} left out, the first {twice[0][:200]}" if twice else ""
    notes = (f"{printable(lost)}: only the last file of a name is read; give each its own",) if lost else ()
    return kept, notes, tallied(dict.fromkeys(ignored.values()))


def plain_name(name: str) -> str:
    """`./ant/1.jpg`, as `tar` and `zip` write it when told to pack `.`, and `ant//1.jpg` -> `ant/1.jpg`. A backslash separates folders
    where no slash does; beside one it is part of a character of another code page."""
    parts = (name if "/" in name else name.replace("\\", "/")).split("/")
    return "/".join([*(part for part in parts[:-1] if part not in ("", ".")), parts[-1] if parts[-1] != "." else ""])


def _parents(names: Iterable[str]) -> set[str]:
    """Every folder that something lies in, `/` at its end."""
    parents: set[str] = set()
    folders = {name.rstrip("/").rpartition("/")[0] for name in names}
    while folders:
        parents |= {f"{folder}/" for folder in folders}
        folders = {folder.rpartition("/")[0] for folder in folders} - {""}
    return parents
