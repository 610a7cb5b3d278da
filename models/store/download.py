"""Downloads of published files over HTTP: resumed after an interruption, and checked against the hash in the file name."""

import logging
import re
import time
from pathlib import Path
from typing import Any

import httpx

from models.errors import DownloadError
from models.files import atomic_files
from models.files.weights_file import sha256_of
from models.progress import DownloadProgress, silent

ATTEMPTS = 5
BACKOFF_S = 0.5  # before the second attempt, then doubled
TIMEOUT = httpx.Timeout(60, connect=10)
MAX_BYTES = 4 * 2**30  # the largest published file, vit_h_14's, has 2.5 GB

logger = logging.getLogger(__name__)


class _Interrupted(Exception):
    """A failed attempt that may succeed when it is repeated."""


def client_of(**options: Any) -> httpx.Client:
    """Returns an httpx client with the proxy of the environment. Raises DownloadError for an unusable proxy."""
    try:
        return httpx.Client(**options)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise DownloadError(
            "the proxy in https_proxy, http_proxy or ALL_PROXY cannot be used: name an HTTP proxy, as http://proxy.example:3128; "
            "for one of SOCKS, pip install socksio"
        ) from error


def fetch(url: httpx.URL, folder: Path, progress: DownloadProgress = silent) -> Path:
    """Downloads `<name>-<hash prefix>.<suffix>` into `folder`, unless it is there already; returns its path.

    An incomplete download is kept as `<file>.part` and resumed by a later run. Raises DownloadError.
    """
    target = folder / Path(url.path).name
    prefix = hash_prefix(target.name)
    with atomic_files.locked(folder / ".lock"):  # a second process waits, then finds the file
        if target.is_file() and sha256_of(target).startswith(prefix):
            return target
        part = target.with_name(target.name + ".part")
        _download(url, part, progress)
        if not (found := sha256_of(part)).startswith(prefix):
            _drop(part)
            raise DownloadError(
                f"{url} is not what its name promises: expected a SHA-256 that begins with {prefix}, "
                f"got {found[:16]}...; the file was deleted, try again or use another mirror"
            )
        atomic_files.move(part, target)
        _validator_file(part).unlink(missing_ok=True)
    return target


def hash_prefix(filename: str) -> str:
    """Returns the first digits of the SHA-256 in the names of torchvision's files: `resnet50-0676ba61.pth` -> `0676ba61`.

    Raises DownloadError.
    """
    if match := re.search(r"-([0-9a-f]{8,64})\.\w+$", filename):
        return match[1]
    raise DownloadError(f"{filename!r} has no hash in its name, so it could not be checked; it is not downloaded")


def _download(url: httpx.URL, part: Path, progress: DownloadProgress) -> None:
    with client_of(timeout=TIMEOUT, follow_redirects=True, headers={"Accept-Encoding": "identity"}) as client:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _attempt(client, url, part, progress)
            except (_Interrupted, httpx.TransportError) as error:
                cause = error
                logger.warning("%s: attempt %d of %d failed: %s", url, attempt, ATTEMPTS, error)
            except OSError as error:
                raise DownloadError(f"{part} cannot be written: {error.strerror}") from error
            if attempt < ATTEMPTS:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
    raise DownloadError(f"{url} could not be fetched in {ATTEMPTS} attempts: {cause}; try again, it resumes") from cause


def _attempt(client: httpx.Client, url: httpx.URL, part: Path, progress: DownloadProgress) -> None:
    offset = part.stat().st_size if part.exists() else 0
    with client.stream("GET", url, headers=_resume_headers(part, offset)) as response:
        _check_status(response, part)
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        if response.status_code == 206 and not resumed:
            _drop(part)
            raise _Interrupted("the server sent a range that was not requested")
        if not resumed:
            offset = 0
            _remember_validator(part, response)
        _receive(response, part, offset, progress)


def _resume_headers(part: Path, offset: int) -> dict[str, str]:
    """Returns headers that ask for the rest, or for the whole file if it has changed since."""
    if offset == 0:
        return {}
    headers = {"Range": f"bytes={offset}-"}
    if _validator_file(part).exists():
        headers["If-Range"] = _validator_file(part).read_text()
    return headers


def _check_status(response: httpx.Response, part: Path) -> None:
    if response.status_code == 416:
        _drop(part)
        raise _Interrupted("the incomplete download does not belong to this file; starting again")
    if response.status_code == 429 or response.status_code >= 500:
        raise _Interrupted(f"the server answered {response.status_code} {response.reason_phrase}")
    if response.status_code not in (200, 206):
        raise DownloadError(f"{response.url} could not be fetched: {response.status_code} {response.reason_phrase}")


def _receive(response: httpx.Response, part: Path, offset: int, progress: DownloadProgress) -> None:
    length = response.headers.get("Content-Length")
    total = offset + int(length) if length else None
    with part.open("ab" if offset else "wb") as file:
        done = offset
        for chunk in response.iter_raw():
            done += len(chunk)
            if done > MAX_BYTES:
                raise DownloadError(f"{response.url} is refused: more than {MAX_BYTES} bytes")
            file.write(chunk)
            progress(done, total)


def _remember_validator(part: Path, response: httpx.Response) -> None:
    validator = response.headers.get("ETag", "")
    if not validator or validator.startswith("W/"):  # a weak one must not be used in If-Range
        validator = response.headers.get("Last-Modified", "")
    _validator_file(part).unlink(missing_ok=True)
    if validator:
        _validator_file(part).write_text(validator)


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".validator")


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)
