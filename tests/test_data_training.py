"""Data sets of packed pixels through the commands: audited, trained on, and calibrated with."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.packed_data import gzipped, mnist
from support.training_data import archive, folder

from models.store.store import ModelStore
from service.cli import main

SCRATCH = ("--base", "lenet5", "--mode", "scratch", "--channels", "1", "--epochs", "2", "--batch-size", "8")


def imago(root: Path, *words: str) -> str:
    flags = ["--weights", str(root / "weights")]
    flags += [] if words[0] == "models" else ["--data", str(root / "data"), "--trainer-threads", "1"]
    result = CliRunner().invoke(main, [*words, *flags])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
def test_the_dry_run_says_what_was_recognised(tmp_path: Path, pack: Any) -> None:
    path = pack(tmp_path / "digits", gzipped(mnist(per_class=4)))
    lines = imago(tmp_path, "finetune", str(path), "--name", "digits", "--dry-run", *SCRATCH).splitlines()
    assert lines[0] == ("dataset: IDX files: train-images-idx3-ubyte (40 images), t10k-images-idx3-ubyte (10 images)")
    assert lines[1].startswith("10 classes: 0 (5), 1 (5)")
    assert lines[2].startswith("50 images of 50 files")
    assert "split: 30 train, 10 val, 10 test" in lines


@pytest.mark.system
def test_digits_are_trained_on_and_remembered_by_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "digits", mnist(per_class=4))
    output = imago(tmp_path, "finetune", str(path), "--name", "digits", "--json", *SCRATCH)
    report, _ = json.JSONDecoder().raw_decode(output)
    assert (report["audit"]["parts"]["test"], report["test"]["images"]) == (10, 10)
    imago(tmp_path, "models", "calibrate", "digits", str(path), "--images", "9")
    store = ModelStore(tmp_path / "weights")
    config = store.config("digits", 1)
    reference = store.load_reference(config)
    assert reference is not None
    assert reference.neighbourhood is not None
    assert reference.neighbourhood.names[0].startswith("train-images-idx3-ubyte[")
    assert config.classes == tuple("0123456789")


def test_a_malformed_file_is_one_line(tmp_path: Path) -> None:
    files = mnist() | {"train-labels-idx1-ubyte": b"\0\0\x08\x01\0\0"}
    result = CliRunner().invoke(
        main, ["finetune", str(folder(tmp_path, files)), "--name", "digits", "--dry-run", *SCRATCH]
    )
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (1, 1)
    assert "train-labels-idx1-ubyte ends in its header: download it again" in result.stderr
