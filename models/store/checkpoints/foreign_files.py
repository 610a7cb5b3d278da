"""Files without a state dict, recognised by their first bytes: their format, and the remedy."""

import itertools
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

SAVE = 'torch.save(model.state_dict(), "weights.pth")'
EXPORT = f"import the weights that it was made from, saved with {SAVE}"
UNPACK = "unpack it first, and import the file in it"
AGAIN = "download or copy it again"
JOIN = 'save them in one, as with model.save_pretrained(folder, max_shard_size="100GB")'
TRANSFORMERS = "its networks are not read; pull the same network from timm (`imago models search`), and train its head (`imago finetune`)"
TRANSFORMERS_KEY = re.compile(
    r"(^|\.)(encoder\.(layer|stages)\.\d+\.|embeddings\.(cls_token$|patch_embeddings\.)|embedder\.embedder\.)"
)
SHARD = re.compile(r"-\d{5}-of-(?!00001\b)\d{5}\b")
IN_PARTS = (
    "it is one part of a model that was trained in several (DeepSpeed, FSDP): join them where it was trained, "
    "as `python zero_to_fp32.py . joined` does for DeepSpeed"
)
MAX_NAMES = 10_000  # of a folder that are looked at
MAX_CONFIG = 2**22  # bytes
WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".th", ".pkl", ".tar")

STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes (.h5)", "weights of Keras are not read"),
    (b"\x1f\x8b", "packed with gzip", UNPACK),
    (b"BZh", "packed with bzip2", UNPACK),
    (b"\xfd7zXZ\x00", "packed with xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"\x93NUMPY", "a NumPy array (.npy)", "it has no names of layers: save a state dict instead"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` where it lies"),
    (b"GGUF", "a GGUF file", "it holds a language model or quantised weights, which are not read"),
    (b"\x08\x01\x12", "a SavedModel of TensorFlow", "weights of TensorFlow are not read"),
    (b"\x08", "a graph, of ONNX or TensorFlow", EXPORT),
    (b"\x89PNG", "an image (PNG)", "give the file with the weights"),
    (b"\xff\xd8\xff", "an image (JPEG)", "give the file with the weights"),
    (b"%PDF", "a PDF document", "give the file with the weights"),
    (b"GIF8", "an image (GIF)", "give the file with the weights"),
    (b"P5\n", "an image (PGM)", "give the file with the weights"),
    (b"P6\n", "an image (PPM)", "give the file with the weights"),
    (b"\x00\x05\x16\x07", "a side file of macOS (._name)", "give the file without `._` in its name"),
    (b"ftrt", "an engine of TensorRT", EXPORT),
    (b"ptrt", "an engine of TensorRT", EXPORT),
)


def named(start: bytes, size: int) -> str | None:
    """Returns `it is WHAT: REMEDY` for the first bytes of a file that is not of torch.save or safetensors; None if unknown."""
    if size == 0:
        return f"it is empty: {AGAIN}"
    for magic, what, remedy in STARTS:
        if start.startswith(magic):
            return f"it is {what}: {remedy}"
    if start[4:8] == b"TFL3":
        return f"it is a TFLite model: {EXPORT}"
    if not start.strip(b"\0"):
        return f"it begins with zeros only, as a download that was broken off: {AGAIN}"
    return _text(start)


def _text(start: bytes) -> str | None:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype html|html|head|script|\?xml[^>]*>\s*<(!doctype )?html)", text, re.IGNORECASE):
        return (
            "it is a web page (HTML), not the weights: the download needs a login or a confirmation; "
            "open the link in a browser and save the file itself"
        )
    if text.startswith((b"<?xml", b"<Error", b"<net")):
        if b"<net" in text:
            return f"it is a model of OpenVINO: {EXPORT}"
        return f"it is XML, often the error message of a download: {AGAIN}"
    if text.startswith(b"{") and b'"weight_map"' in text:
        return f"it is the index of weights in several files: {JOIN}"
    if text.startswith(b"{\\rtf"):
        return "it is a document (RTF): give the file with the weights"
    if text.startswith((b"{", b"[")) and text.isascii():
        return f"it is JSON text, a configuration or the error message of a download: {AGAIN}"
    if (
        len(start) >= 32
        and start.isascii()
        and b"\0" not in start
        and start[:200].decode("ascii").replace("\n", "").replace("\r", "").isprintable()
    ):
        return f"it is text, not weights: {AGAIN}"
    return None


def named_zip(file: BinaryIO) -> tuple[str, str] | None:
    """Returns ("torch", ""), ("script", ""), or ("other", description and remedy); None where the zip cannot be read."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return None
    inner = [name.partition("/")[2] or name for name in names]
    if any("exported_program" in name or name.endswith("archive_format") for name in names):
        return "other", f"it is a program of torch.export: {EXPORT}"
    if any(name == "constants.pkl" or name.startswith("code/") for name in inner):
        return "script", ""
    if any(PurePosixPath(name).name == "data.pkl" for name in names):
        return "torch", ""
    if "model.weights.h5" in names or ("metadata.json" in names and "config.json" in names):
        return "other", "it is a Keras model (.keras): weights of Keras are not read"
    if any(PurePosixPath(name).name == "saved_model.pb" for name in names):
        return "other", "it is a packed SavedModel of TensorFlow: weights of TensorFlow are not read"
    if names and all(name.endswith(".npy") for name in names):
        return "other", f"it holds NumPy arrays (.npz), which are no state dict: save it with {SAVE}"
    weights = [name for name in names if name.lower().endswith(WEIGHTS) and not name.startswith("__MACOSX/")]
    if weights:
        return "other", f"it is a zip that holds {weights[0][:200]!r}: {UNPACK}"
    return "other", "it is a zip file, but no file of torch.save"


def named_keys(keys: Iterable[str], source: str) -> str | None:
    """Describes the origin of tensors that are not supported, by their names; None if unknown."""
    if any(TRANSFORMERS_KEY.search(key) for key in keys):
        return f"the names are those of Transformers: {TRANSFORMERS}"
    if SHARD.search(source):
        return f"by its name it is one of several files: {JOIN}"
    return None


def named_folder(folder: Path) -> str | None:
    """Returns description and remedy of a folder; None for one of timm or the Hub."""
    names = sorted(path.name for path in itertools.islice(folder.iterdir(), MAX_NAMES))
    if "config.json" in names:
        return _named_config(folder / "config.json")
    if "saved_model.pb" in names or "keras_metadata.pb" in names:
        return "it is a SavedModel of TensorFlow: weights of TensorFlow are not read"
    if any(name.endswith(".index.json") for name in names):
        return f"it is a folder with the weights in several files: {JOIN}"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "it is a checkpoint of torch.distributed: join it, as with "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth`"
        )
    if "zero_to_fp32.py" in names or any(name.startswith("zero_pp_rank_") for name in names):
        return IN_PARTS
    if "MAR-INF" in names:
        return "it is an unpacked TorchServe archive: pack it again (`zip -r NAME.mar .` in it), and import that"
    if any((place / "data.pkl").is_file() for place in (folder, *(folder / name for name in names[:100]))):
        return "it is an unpacked file of torch.save: give the file as it was before"
    inner = [path for name in names[:100] for path in _files_in(folder / name)]
    weights = [path for path in inner if path.name.lower().endswith(WEIGHTS)]
    if weights:
        return f"it is a folder: give the file in it, {str(weights[0])!r}"
    return "it is a folder without weights: give a file of weights, or a folder with config.json and model.safetensors"


def _files_in(path: Path) -> list[Path]:
    """Returns the file, or the files in the folder."""
    return sorted(itertools.islice(path.iterdir(), 100)) if path.is_dir() else [path]


def _named_config(file: Path) -> str | None:
    """Describes a configuration of Transformers; None for another, and for one that cannot be read."""
    try:
        config = json.loads(file.read_bytes()[:MAX_CONFIG])
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or "architecture" in config or not config.keys() & {"architectures", "model_type"}:
        return None
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    return f"it is a model of Transformers ({str(name)[:80]}): {TRANSFORMERS}"
