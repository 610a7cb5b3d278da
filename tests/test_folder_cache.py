import os
from pathlib import Path

from models.files.folder_cache import make_room, mark_used


def folders(root: Path, count: int) -> list[Path]:
    """Folders in the order of their last use."""
    made = [root / str(number) for number in range(count)]
    for number, folder in enumerate(made):
        folder.mkdir()
        os.utime(folder, (number, number))
    return made


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    first, second, third, fourth = folders(tmp_path, 4)
    mark_used(second)
    assert make_room(fourth, lambda left: len(left) <= 2)
    assert not first.exists()
    assert not third.exists()
    assert second.exists()


def test_the_current_folder_is_never_removed(tmp_path: Path) -> None:
    current, other = folders(tmp_path, 2)
    (tmp_path / ".lock").touch()
    assert not make_room(current, lambda left: False)
    assert current.exists()
    assert not other.exists()


def test_a_folder_that_is_gone_is_not_marked(tmp_path: Path) -> None:
    mark_used(tmp_path / "gone")
