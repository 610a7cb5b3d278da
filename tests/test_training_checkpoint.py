from pathlib import Path

import pytest
import torch

from models.training.network import checkpoint
from models.training.network.checkpoint import load, previous, remove, save

CPU = torch.device("cpu")


def state(epoch: int) -> dict[str, object]:
    return {"weights": {"w": torch.full((1000,), float(epoch))}, "epoch": epoch}


def epoch_of(path: Path) -> int | None:
    found = load(path, CPU)
    return found[0]["epoch"] if found else None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of the third epoch, with that of the second beside it."""
    for epoch in (1, 2, 3):
        save(tmp_path / "run" / "c.pt", state(epoch))
    return tmp_path / "run" / "c.pt"


def test_the_last_two_are_kept(path: Path) -> None:
    assert sorted(file.name for file in path.parent.iterdir()) == ["c.pt", "c.pt.previous"]
    found = load(path, CPU)
    assert found is not None
    assert torch.equal(found[0]["weights"]["w"], torch.full((1000,), 3.0))
    assert found[1] == path


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="cut short"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:2000] + b"\0" * 500 + content[2500:], id="a hole"),
        pytest.param(lambda content: content[:-1], id="a byte short"),
    ],
)
def test_a_damaged_one_is_known(path: Path, damage: object) -> None:
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert epoch_of(path) == 2


def test_killed_between_the_two_renames(path: Path) -> None:
    path.rename(previous(path))
    assert epoch_of(path) == 3


def test_a_damaged_one_never_takes_the_place_of_the_previous(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(checkpoint, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, state(4))
    assert epoch_of(path) == 2


@pytest.mark.abuse("J10")
def test_a_full_disk_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save(path, state(4))
    assert epoch_of(path) == 3
    assert len(list(path.parent.iterdir())) == 2


def test_removed_there_is_none(path: Path) -> None:
    remove(path)
    assert epoch_of(path) is None
