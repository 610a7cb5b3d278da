"""Several processes that write at once, and writers that die."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models import architectures
from models.classifier import Head, ModelConfig
from models.files import atomic_files
from models.preprocessing import Preprocessing
from models.store.store import ModelStore

PREPROCESSING = Preprocessing(resize=28, crop=28, channels=1, mean=(0.13,), std=(0.31,))


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    torch.set_num_threads(1)
    return ModelStore(tmp_path / "weights")


def publish(store: ModelStore, name: str = "digits", seed: int = 0) -> ModelConfig:
    torch.manual_seed(seed)
    network = architectures.create("mnist_cnn", 3, 1)
    ref = store.put_backbone("mnist_cnn", network.backbone, PREPROCESSING)
    return store.publish(name, [ref], Head.of(network.layer), ["a", "b", "c"])


def temporaries(store: ModelStore) -> list[Path]:
    return list(store.root.rglob(".tmp-*"))


def test_threads_take_turns(store: ModelStore) -> None:
    publish(store)
    threads = [threading.Thread(target=publish, args=(store,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.versions("digits") == list(range(1, 8))


def test_a_folder_that_is_being_written_is_not_swept(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with atomic_files.staging(tmp_path, lock) as folder:
        atomic_files.temporary(tmp_path).mkdir()
        atomic_files.temporary(tmp_path).touch()
        with atomic_files.locked(lock):
            atomic_files.sweep(tmp_path)
        assert list(tmp_path.glob(".tmp-*")) == [folder]
    assert list(tmp_path.glob(".tmp-*")) == []


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "serving.json"
    atomic_files.replace(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_files.replace(path, b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "models.store.store", "models.architectures", "models.store.ensembles"])


def publish_many(root: Path, count: int) -> None:
    torch.set_num_threads(1)
    store = ModelStore(root)
    for _ in range(count):
        config = publish(store, seed=os.getpid())
        store.activate("digits", config.version)
        store.activate(publish(store, f"own-{os.getpid()}").name, 1)


def test_two_processes_publish_at_once(store: ModelStore) -> None:
    processes = [FORKS.Process(target=publish_many, args=(store.root, 4)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    assert store.versions("digits") == list(range(1, 9))
    assert len({store.config("digits", version).backbones for version in range(1, 9)}) == 2
    assert set(store.serving().models) == {"digits", *(f"own-{process.pid}" for process in processes)}
    assert temporaries(store) == []


def publish_until(root: Path, step: int) -> None:
    """Dies by SIGKILL just before the given write or rename."""
    steps = iter(range(1000))

    def deadly(action: Callable[..., None]) -> Callable[..., None]:
        def act(*arguments: object) -> None:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            action(*arguments)

        return act

    atomic_files.write, atomic_files.move = deadly(atomic_files.write), deadly(atomic_files.move)
    atomic_files.flush_folder = deadly(atomic_files.flush_folder)
    torch.set_num_threads(1)
    store = ModelStore(root)
    store.activate("digits", publish(store, seed=99).version)


@pytest.mark.abuse("J9")
@pytest.mark.parametrize("step", range(13))
def test_a_writer_killed_at_any_step_leaves_a_sound_store(store: ModelStore, step: int) -> None:
    publish(store)
    process = FORKS.Process(target=publish_until, args=(store.root, step))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert_sound(store)


def assert_sound(store: ModelStore) -> None:
    for name in store.names():
        for version in store.versions(name):
            store.load(name, version)
    for name, version in store.serving().models.items():
        store.load(name, version)
    store.activate("digits", publish(store, seed=99).version)
    store.sweep()
    assert temporaries(store) == []


def publish_for_ever(root: Path) -> None:
    for seed in range(10_000):
        publish(ModelStore(root), seed=seed)
        ModelStore(root).activate("digits", 1 + seed % 3)


@pytest.mark.abuse("J9")
@pytest.mark.parametrize("seed", range(6))
def test_a_writer_killed_at_any_moment_leaves_a_sound_store(store: ModelStore, seed: int) -> None:
    for _ in range(3):
        publish(store)
    process = FORKS.Process(target=publish_for_ever, args=(store.root,))
    process.start()
    time.sleep(random.Random(seed).uniform(0.05, 0.4))
    process.kill()
    process.join(200)
    assert_sound(store)
