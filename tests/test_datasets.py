"""Where a dataset may be."""

import os
import socket
import stat
from contextlib import closing, suppress
from pathlib import Path

import pytest

from models.errors import DatasetError
from models.training.job.job_files import NO_DATASET
from service import datasets


@pytest.mark.abuse("H21", "J2")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param("none", id="not there"),
        pytest.param("photos/../photos", id="dots"),
        pytest.param("/etc", id="absolute"),
        pytest.param("//etc", id="two slashes"),
        pytest.param("~/photos", id="home"),
        pytest.param("$HOME", id="variable"),
        pytest.param("file:photos", id="scheme"),
        pytest.param("http://169.254.169.254/photos", id="URL"),
        pytest.param("photos\0", id="NUL"),
        pytest.param("x" * 5000, id="long"),
        pytest.param(".", id="the root itself"),
        pytest.param("link", id="link to a folder"),
        pytest.param("link/cat", id="through a link"),
        pytest.param("chain", id="link to a link"),
        pytest.param("archive.zip", id="link to a file"),
        pytest.param("fifo", id="FIFO"),
        pytest.param("listening", id="socket"),
        pytest.param("null", id="device"),
        pytest.param("socket/x", id="under a file"),
    ],
)
def test_whatever_is_not_a_dataset_has_one_answer(tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside"
    root = tmp_path / "datasets"
    (outside / "cat").mkdir(parents=True)
    (root / "photos").mkdir(parents=True)
    (outside / "file").touch()
    (root / "socket").touch()
    os.mkfifo(root / "fifo")
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(f"{os.path.relpath(root)}/listening")  # a socket's name has at most 108 characters
    with suppress(PermissionError):  # root alone may make one
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for name, target in (("link", outside), ("chain", root / "link"), ("archive.zip", outside / "file")):
        (root / name).symlink_to(target)
    with pytest.raises(DatasetError) as refused:
        datasets.resolve(root, Path(path))
    assert str(refused.value) == NO_DATASET


def test_datasets_are_folders_and_files_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b.zip").touch()
    assert datasets.resolve(tmp_path, Path("a/b")) == tmp_path / "a" / "b"
    assert datasets.resolve(tmp_path, Path("a//b.zip")) == tmp_path / "a" / "b.zip"
