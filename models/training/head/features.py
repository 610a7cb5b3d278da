"""Computes features of a frozen backbone, once for each image, and keeps them on disk.

    <root>/<backbone's sha256, 16 digits>-<hash of preprocessing, output and precision>/<hash of the file>.safetensors
        keys     uint8 (n, 16)      the digests of the images' pixels
        features float32 (n, D)

A shard is written about every half minute and never changed, so a pass that was killed resumes. When the cache grows too large, the least
recently used folders are removed. Errors of the cache never fail a run: what cannot be read is computed again, and what cannot be written
is not kept.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from models.classifier import Backbone
from models.errors import TrainingError, WeightsError
from models.files import atomic_files, folder_cache, weights_file
from models.progress import Progress, Stop, never, silent
from models.runtime.compiler import TOLERANCE
from models.runtime.device import half_precisions
from models.runtime.failures import is_device_lost, is_out_of_memory
from models.runtime.options import Precision
from models.runtime.probe import Probe
from models.runtime.torch_engine import TorchEngine

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
BATCH = 64  # images
SHARD_BYTES = 64 * 2**20
SHARD_S = 30.0  # the most work that a kill may cost
KEY_BYTES = 16

Warn = Callable[[str], None]


class Stopped(Exception):
    """A pass over the images was stopped early; what it had computed is kept for the next."""


class FeatureCache:
    """Features on disk under `root`, at most `max_bytes` of them. Several processes may use one."""

    def __init__(self, root: Path, max_bytes: int = 10 * 2**30) -> None:
        self.root = root
        self.max_bytes = max_bytes

    def features(
        self,
        backbone: Backbone,
        pixels: Tensor,
        digests: Sequence[bytes],
        *,
        batch_size: int = BATCH,
        device: torch.device = CPU,
        precision: Precision = "float32",
        progress: Progress = silent,
        warn: Warn = log.warning,
        stop: Stop = never,
    ) -> Tensor:
        """Return the features, float32 (n, D) on the CPU, of uint8 (n, C, H, W) with these 16-byte digests.

        `warn` is called once if the cache cannot be used, and when memory runs out: then the batch is halved, and features computed
        afterwards may differ in their last bits. `stop` is asked before each batch. However a pass ends, what it has computed is kept.
        Raises TrainingError if a feature is not finite, Stopped, and the device's own error if a single image does not fit.
        """
        shards = _Shards(self, _folder_name(backbone, precision), backbone.feature_dim, warn)
        places: dict[bytes, int] = {}  # of each digest in `known`; equal images are computed once
        inverse = torch.tensor([places.setdefault(digest, len(places)) for digest in digests], dtype=torch.int64)
        known = torch.empty(len(places), backbone.feature_dim)
        missing = shards.read(places, known)
        if missing:
            extract = Extractor(backbone, device, precision, batch_size, warn)
            first = {digest: row for row, digest in reversed(list(enumerate(digests)))}
            try:
                for start in range(0, len(missing), batch_size):
                    if stop():
                        raise Stopped
                    batch = missing[start : start + batch_size]
                    features = extract(pixels[[first[digest] for digest in batch]])
                    known[[places[digest] for digest in batch]] = features
                    shards.add(batch, features)
                    progress(1 - (len(missing) - start - len(batch)) / len(places))
            finally:
                shards.flush()
        progress(1.0)
        return known if len(places) == len(digests) else known[inverse]


def _folder_name(backbone: Backbone, precision: Precision) -> str:
    ref = backbone.ref
    made_of = f"{ref.preprocessing.model_dump_json()} {ref.output or ''} {precision}"
    return f"{ref.sha256[:16]}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def feature_precision(backbone: Backbone, device: torch.device) -> Precision:
    """Return the precision of training features: on a GPU the first fast one that agrees with float32, as in serving.

    On the CPU it is float32, because features are computed only once.
    """
    fast = half_precisions(device) if device.type == "cuda" else ()
    probe = Probe(backbone, None) if fast else None
    for precision in fast:
        try:
            agreement = probe.agreement(Extractor(backbone, device, precision)) if probe else None
        except (TrainingError, RuntimeError) as error:  # NaN, or a kernel that does not support this network
            if is_device_lost(error, device):
                raise
            log.info("%s: no features in %s: %s", backbone.ref.key, precision, error)
            continue
        if agreement and agreement.max_difference <= TOLERANCE[precision]:
            return precision
    return "float32"


class Extractor:
    """Computes uint8 (n, C, H, W) -> float32 (n, D) on the CPU, in batches of one size, which is halved whenever memory runs out.

    A smaller batch is filled up, because with batches of one size an image's features are the same to the bit in any batch, and so is the
    head of a resumed run.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        precision: Precision,
        batch_size: int = BATCH,
        warn: Warn = log.warning,
    ) -> None:
        self.engine = TorchEngine(backbone, device, precision, "channels_last", torch.get_num_threads())
        self.batch_size = batch_size
        self.warn = warn

    def __call__(self, pixels: Tensor) -> Tensor:
        while (features := self._tried(pixels)) is None:
            self.engine.release_memory()  # outside the handler, whose traceback keeps activations in memory
            self.batch_size //= 2
            self.warn(f"out of memory: features are computed {self.batch_size} images at a time from here on")
        if not features.isfinite().all():
            raise TrainingError(
                "the backbone gives NaN or infinity for some images; use another base, or pull or train this one again"
            )
        return features

    def rows(self, pixels: Tensor, rows: Tensor, progress: Progress = silent) -> Tensor:
        """Return the features of the images at `rows` (n,) of uint8 (N, C, H, W), batch by batch."""
        features = []
        for start in range(0, len(rows), BATCH):
            features.append(self(pixels[rows[start : start + BATCH]]))
            progress(min(1.0, (start + BATCH) / len(rows)))
        return torch.cat(features)

    def _tried(self, pixels: Tensor) -> Tensor | None:
        """Return the features; None if memory ran out and a smaller batch may fit."""
        try:
            return torch.cat([self._batch(part) for part in torch.split(pixels, self.batch_size)])
        except (RuntimeError, MemoryError) as error:
            if self.batch_size == 1 or not is_out_of_memory(error, self.engine.device):
                raise
            return None

    def _batch(self, pixels: Tensor) -> Tensor:
        count = len(pixels)
        if count < self.batch_size:
            pixels = torch.cat([pixels, pixels[:1].expand(self.batch_size - count, -1, -1, -1)])
        return self.engine(pixels)[:count].cpu()


class _Shards:
    """The cache files of one backbone, preprocessing, output and precision."""

    def __init__(self, cache: FeatureCache, name: str, feature_dim: int, warn: Warn) -> None:
        self.cache = cache
        self.folder = cache.root / name
        self.lock = cache.root / ".lock"
        self.feature_dim = feature_dim
        self.warn = warn
        self.writable = True
        self.keys: list[bytes] = []  # of the current shard
        self.parts: list[Tensor] = []
        self.since = time.monotonic()

    def read(self, places: dict[bytes, int], known: Tensor) -> list[bytes]:
        """Fill the rows `places` of `known` with cached features; return the digests that are missing."""
        missing = dict.fromkeys(places)
        for path in sorted(self.folder.glob("*.safetensors")):
            if not missing:
                break
            found = self._load(path)
            if found is None:
                continue
            keys, features = found
            rows = [row for row, key in enumerate(keys) if key in missing]
            known[[places[keys[row]] for row in rows]] = features[rows]
            for row in rows:
                missing.pop(keys[row], None)
        folder_cache.mark_used(self.folder)
        return list(missing)

    def _load(self, path: Path) -> tuple[list[bytes], Tensor] | None:
        """Return a shard's digests and features. Remove a damaged file, and return None."""
        try:
            data = weights_file.read_bytes(path)
            if _name_of(data) != path.name:
                raise WeightsError(f"{path} is damaged")
            shard = weights_file.parse(data, path)
            keys, features = shard["keys"], shard["features"]
            if keys.shape != (len(features), KEY_BYTES) or features.shape != (len(keys), self.feature_dim):
                raise WeightsError(f"{path} has features of another size")
        except (WeightsError, KeyError, OSError) as error:
            log.warning("features are computed again: %s", error)
            with suppress(OSError):
                path.unlink()
            return None
        flat = keys.numpy().tobytes()
        return [flat[start : start + KEY_BYTES] for start in range(0, len(flat), KEY_BYTES)], features

    def add(self, keys: Sequence[bytes], features: Tensor) -> None:
        self.keys += keys
        self.parts.append(features)
        size = len(self.keys) * (self.feature_dim * 4 + KEY_BYTES)
        if size >= SHARD_BYTES or time.monotonic() - self.since > SHARD_S:
            self.flush()

    def flush(self) -> None:
        """Write what has been added as a shard."""
        if self.keys and self.writable:
            keys = torch.frombuffer(bytearray(b"".join(self.keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
            self._write(safetensors.torch.save({"keys": keys, "features": torch.cat(self.parts)}))
        self.keys, self.parts, self.since = [], [], time.monotonic()

    def _write(self, data: bytes) -> None:
        try:
            with atomic_files.locked(self.lock):
                self.folder.mkdir(exist_ok=True)
                atomic_files.sweep(self.folder)
                self.writable = self._make_room(len(data))
                if self.writable:
                    atomic_files.replace(self.folder / _name_of(data), data)
                else:
                    self.warn(f"features beyond {self.cache.max_bytes:,} bytes are not kept for the next run")
        except OSError as error:
            self.writable = False
            why = error.strerror or str(error)
            self.warn(f"features are not kept for the next run, because {self.folder} cannot be written: {why}")

    def _make_room(self, size: int) -> bool:
        """Removes the features of other backbones until `size` bytes more are allowed; returns False where they never are."""
        return folder_cache.make_room(
            self.folder, lambda folders: sum(map(_bytes_in, folders)) + size <= self.cache.max_bytes
        )


def _name_of(data: bytes | bytearray) -> str:
    return f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.safetensors"


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
