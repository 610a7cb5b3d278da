"""Checkpoints in the format of the Hugging Face Hub: `config.json`, `model.safetensors` and a model card, in a repository or a folder.

    repository --huggingface_hub--> data/downloads/hub --_checkpoint--> Checkpoint

huggingface_hub downloads and resumes; it reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. Only these three files are downloaded: no code
of a repository, and no pickled file.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import DownloadError, WeightsError
from models.files.weights_file import sha256_of
from models.progress import DownloadProgress, silent

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OLD_WEIGHTS = "pytorch_model.bin"  # of torch.save; read from a folder, never downloaded
PREFIX = "hf-hub:"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
MAX_CONFIG = 16 * 2**20  # bytes; 21,841 class names with descriptions are 3 MB
PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".npz", ".msgpack", ".h5")
SHA256 = re.compile(r"[0-9a-f]{64}")

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain HTTP: can be resumed, and works with proxies and mirrors


@dataclass(frozen=True)
class HubCheckpoint:
    """Weights and their metadata. `revision`: the commit of the repository; None for a folder."""

    source: str
    revision: str | None
    config: dict[str, Any]
    weights: Path
    licence: str | None


def is_hub(name: str) -> bool:
    """Returns whether the name is that of a repository on the Hub."""
    return name.startswith(PREFIX)


def split_repository(name: str) -> tuple[str, str]:
    """Splits `hf-hub:user/repo@revision` into ("user/repo", "revision"), by default "main". Raises DownloadError."""
    text = name.removeprefix(PREFIX)
    if len(text) > 200 or ".." in text or not REPOSITORY.fullmatch(text):
        raise DownloadError(
            f"{text[:80]!r} is not a repository of the Hub: write hf-hub:<user>/<repository>[@<revision>]"
        )
    repository, _, revision = text.partition("@")
    return repository, revision or "main"


def read_folder(folder: Path) -> HubCheckpoint:
    """Reads a folder in the format of the Hub. Raises WeightsError."""
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder} has no {CONFIG}: a folder of the Hub holds {CONFIG} and {WEIGHTS}")
    weights = next((folder / name for name in (WEIGHTS, OLD_WEIGHTS) if (folder / name).is_file()), None)
    if weights is None:
        raise WeightsError(_without_safetensors(str(folder), sorted(path.name for path in folder.iterdir())))
    return HubCheckpoint(folder.name, None, _read_config(folder / CONFIG), weights, _licence(folder / CARD))


class Repository:
    """One revision of a repository on the Hub. `close` deletes its downloads, unless the folder was there before."""

    def __init__(self, name: str, cache: Path) -> None:
        self.name, self.revision = split_repository(name)
        self.cache = cache / "hub"
        self._folder = self.cache / f"models--{self.name.replace('/', '--')}"
        self._was_there = self._folder.exists()

    def config(self) -> tuple[dict[str, Any], str]:
        """Returns the content of `config.json`, and the commit. Raises WeightsError, DownloadError."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = self._fetch(CONFIG, self.revision)
        except EntryNotFoundError as error:
            raise WeightsError(
                f"{PREFIX}{self.name} has no {CONFIG}, so its network is unknown: choose a repository of timm's"
            ) from error
        return _read_config(path), path.parent.name

    def checkpoint(self, config: dict[str, Any], commit: str, progress: DownloadProgress = silent) -> HubCheckpoint:
        """Downloads the weights, and compares their hash with that of the Hub.

        Raises DownloadError, and WeightsError where the repository has only pickled weights.
        """
        from huggingface_hub.errors import EntryNotFoundError

        try:
            weights = self._fetch(WEIGHTS, commit, progress)
        except EntryNotFoundError as error:
            raise WeightsError(_without_safetensors(f"{PREFIX}{self.name}", self._files(commit))) from error
        self._check_hash(weights)
        try:
            licence = _licence(self._fetch(CARD, commit))
        except (EntryNotFoundError, DownloadError):
            licence = None
        return HubCheckpoint(f"{PREFIX}{self.name}", commit, config, weights, licence)

    def close(self) -> None:
        """Deletes the downloads."""
        if not self._was_there:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _fetch(self, file: str, revision: str, progress: DownloadProgress = silent) -> Path:
        from huggingface_hub import hf_hub_download

        with _explained(self.name, self.revision):
            return Path(
                hf_hub_download(
                    self.name,
                    file,
                    revision=revision,
                    cache_dir=self.cache,
                    endpoint=os.environ.get("HF_ENDPOINT") or None,
                    token=os.environ.get("HF_TOKEN") or None,
                    local_files_only=is_offline(),
                    tqdm_class=_progress_bar(progress),
                )
            )

    def _files(self, commit: str) -> list[str]:
        from huggingface_hub import HfApi

        with _explained(self.name, self.revision):
            api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=os.environ.get("HF_TOKEN") or None)
            return list(api.list_repo_files(self.name, revision=commit))

    def _check_hash(self, weights: Path) -> None:
        """Compares the SHA-256 with the name of the file in the cache: the Hub names large files by it. Raises DownloadError."""
        expected = weights.resolve().name
        if SHA256.fullmatch(expected) and (found := sha256_of(weights)) != expected:
            weights.resolve().unlink()
            weights.unlink(missing_ok=True)
            raise DownloadError(
                f"{WEIGHTS} of {PREFIX}{self.name} is not what the Hub says: expected SHA-256 {expected[:16]}..., "
                f"got {found[:16]}...; the file was deleted, try again"
            )


def is_offline() -> bool:
    """Returns whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    """Turns errors of huggingface_hub into one line with a remedy; a missing file stays an EntryNotFoundError."""
    from huggingface_hub import errors

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; one line reports the result
    page = f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{page} is gated: accept its licence on that page, then set HF_TOKEN to a token of your account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{page} does not exist, or is private: check the name, and set HF_TOKEN if it is yours"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{page} has no revision {revision!r}: name a branch, a tag or a commit that it has"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # not in the cache either; its cause is the error of the Hub
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise DownloadError(_refused(page, error.__cause__.response.status_code)) from error
        if isinstance(error.__cause__, errors.FileMetadataError):
            raise DownloadError(f"{page} is not served by a Hub: check HF_ENDPOINT") from error
        raise DownloadError(_unreachable(repository)) from error
    except errors.EntryNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        raise DownloadError(_refused(page, error.response.status_code)) from error
    except OSError as error:
        cause = f"it broke off: {str(error).splitlines()[0]}" if "Consistency check" in str(error) else _cause(error)
        raise DownloadError(f"{page} could not be fetched: {cause}; try again") from error
    except Exception as error:  # of its HTTP library, HFValidationError
        raise DownloadError(f"{page} could not be fetched: {_cause(error)}; try again") from error


def _refused(page: str, status: int) -> str:
    if status in (401, 403):
        return f"{page} may not be read ({status}): set HF_TOKEN to a token that may"
    return f"{page} could not be fetched: the server answered {status}; try again"


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _unreachable(repository: str) -> str:
    if is_offline():
        return f"{PREFIX}{repository} is not in data/downloads, and HF_HUB_OFFLINE forbids the download: pull it once online"
    where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{PREFIX}{repository}: {where} could not be reached; check the network, or set HF_ENDPOINT to a mirror"


def _without_safetensors(source: str, files: list[str]) -> str:
    pickled = [file for file in files if file.endswith(PICKLED)]
    sharded = [file for file in files if file.endswith(".safetensors.index.json")]
    if sharded:
        return f"{source} is refused: its weights are cut into several files ({sharded[0]}); one {WEIGHTS} is read"
    if pickled:
        return (
            f"{source} is refused: it has {', '.join(pickled[:3])} and no {WEIGHTS}, and a pickled file may run code; "
            "ask its owner to convert it to safetensors"
        )
    return f"{source} has no {WEIGHTS}: it holds no weights that can be read"


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG:
        raise WeightsError(f"{path} is refused: larger than {MAX_CONFIG} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is damaged: it is not a JSON object")
    return config


def _licence(card: Path) -> str | None:
    """Returns `license` in the metadata of a model card, between two `---`; for `other`, `license_name`."""
    if not card.is_file() or card.stat().st_size > MAX_CONFIG:
        return None
    _, dashes, text = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    said = dict(
        re.findall(
            r"^(license(?:_name)?):[ \t]*['\"]?([^'\"\n#]+?)['\"]?[ \t]*$", text.partition("\n---")[0], re.MULTILINE
        )
    )
    if not dashes or "license" not in said:
        return None
    return str(said.get("license_name", "other") if said["license"].lower() == "other" else said["license"])


def _progress_bar(progress: DownloadProgress) -> Any:
    """Returns a class with the interface of tqdm that calls `progress`; huggingface_hub makes an instance per file."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.done, self.whole = options.get("initial") or 0, options.get("total")
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            progress(self.done, self.whole)

    return Bar
