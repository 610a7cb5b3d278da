import json
import zipfile
from pathlib import Path

import pytest
import torch
from training_data import archive, coloured, folder

from models.classifier import ModelConfig
from models.errors import ArchitectureNotFound, ModelNotFound
from models.images import decode, stack
from models.store import ModelStore
from models.training.dataset import load
from models.training.evaluate import outputs
from models.training.finetune import Event, FinetuneRequest, Hyperparameters, run

FILES = coloured(20, "train/", side=32) | coloured(5, "test/", seed=50, side=32)
SHIPPED = Path(__file__).parents[1] / "weights"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photos"), FILES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> tuple[ModelStore, ModelConfig, list[Event]]:
    """A store with one model, `colours`, trained from scratch in float16."""
    store, events = ModelStore(tmp_path_factory.mktemp("weights")), list[Event]()
    return store, run(scratch(photos), store, events.append), events


def scratch(dataset: Path, name: str = "colours", half: bool = True) -> FinetuneRequest:
    torch.set_num_threads(1)
    chosen = Hyperparameters(epochs=8, batch_size=8, lr=0.02)
    return FinetuneRequest(dataset=dataset, name=name, base="lenet5", mode="scratch", half=half, hyperparameters=chosen)


def silent(event: Event) -> None:
    pass


def test_a_scratch_run_learns_and_is_served(trained: tuple[ModelStore, ModelConfig, list[Event]]) -> None:
    store, config, _ = trained
    assert config.metrics["test"]["accuracy"] > 0.8
    assert store.serving().models == {"colours": 1}
    assert store.serving().default == "colours"


def test_the_published_model_predicts_what_the_metrics_say(
    trained: tuple[ModelStore, ModelConfig, list[Event]],
) -> None:
    store, config, _ = trained
    classifier = store.load("colours")
    names = [name for name in FILES if name.startswith("test/")]
    images = [decode(FILES[name], config.backbones[0].preprocessing) for name in names]
    found = classifier.probabilities([stack(images)]).argmax(dim=1)
    right = [config.classes[i] == name.split("/")[1] for i, name in zip(found.tolist(), names, strict=True)]
    assert sum(right) / len(right) == pytest.approx(config.metrics["test"]["accuracy"])


def test_the_lineage_says_how_to_make_it_again(trained: tuple[ModelStore, ModelConfig, list[Event]]) -> None:
    _, config, _ = trained
    assert config.lineage["dataset"]["images"] == {"train": 48, "val": 12, "test": 15}
    assert config.lineage["hyperparameters"]["batch_size"] == 8
    assert config.lineage["command"].startswith("imago finetune photos")
    assert set(config.lineage["code"]) == {"version", "commit", "torch"}
    json.dumps(config.lineage)


def test_events_name_the_phases_in_order(trained: tuple[ModelStore, ModelConfig, list[Event]]) -> None:
    phases = [event.phase for event in trained[2]]
    assert list(dict.fromkeys(phases)) == ["decode", "train", "features", "evaluate", "publish"]


def test_a_finished_run_leaves_no_checkpoint(trained: tuple[ModelStore, ModelConfig, list[Event]]) -> None:
    assert not list(trained[0].root.rglob("*.pt"))


def test_the_same_request_gives_the_same_weights(
    trained: tuple[ModelStore, ModelConfig, list[Event]], tmp_path: Path
) -> None:
    _, config, _ = trained
    again = run(scratch(archive(tmp_path / "photos.zip", FILES)), ModelStore(tmp_path / "weights"), silent)
    assert again.backbones[0].sha256 == config.backbones[0].sha256
    assert again.head_sha256 == config.head_sha256
    assert again.lineage["dataset"]["sha256"] == config.lineage["dataset"]["sha256"]


def test_a_head_shares_its_bases_backbone_to_the_byte(
    trained: tuple[ModelStore, ModelConfig, list[Event]], photos: Path
) -> None:
    store, base, _ = trained
    config = run(FinetuneRequest(dataset=photos, name="head", base="colours"), store, silent)
    assert config.backbones == base.backbones
    assert config.metrics["test"]["accuracy"] > 0.8  # chance is a third


def test_a_heads_base_keeps_its_batch_norm_statistics(tmp_path: Path, photos: Path) -> None:
    store = ModelStore(tmp_path)
    request = scratch(photos, "normed").model_copy(
        update={"base": "resnet20_v1", "hyperparameters": Hyperparameters(epochs=1)}
    )
    ref = run(request, store, silent).backbones[0]
    before = {name: value.clone() for name, value in store.load_backbone(ref).module.named_buffers()}
    config = run(FinetuneRequest(dataset=photos, name="head", base="normed"), store, silent)
    after = store.load_backbone(config.backbones[0]).module.named_buffers()
    assert before
    assert all(torch.equal(value, before[name]) for name, value in after)


def test_finetuning_gives_a_backbone_of_its_own(
    trained: tuple[ModelStore, ModelConfig, list[Event]], photos: Path
) -> None:
    store, base, _ = trained
    request = FinetuneRequest(
        dataset=photos,
        name="tuned",
        base="colours",
        mode="finetune",
        hyperparameters=Hyperparameters(epochs=4, lr=0.01),
    )
    config = run(request, store, silent)
    assert config.backbones[0].sha256 != base.backbones[0].sha256
    assert config.metrics["val"]["accuracy"] > 0.8
    assert config.lineage["base_model"]["backbone_sha256"] == base.backbones[0].sha256
    assert config.lineage["base_model"]["lineage"] == base.lineage


def test_a_bad_file_is_told_and_recorded(tmp_path: Path) -> None:
    events: list[Event] = []
    photos = folder(tmp_path / "photos", FILES | {"train/red/notes.txt": b"hello"})
    config = run(scratch(photos), ModelStore(tmp_path / "weights"), events.append)
    assert [file["path"] for file in config.lineage["dataset"]["skipped_files"]] == ["train/red/notes.txt"]
    assert any("skipped train/red/notes.txt" in (event.message or "") for event in events)


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        pytest.param("head", ModelNotFound, "imago models pull resnet18", id="no such model"),
        pytest.param("scratch", ArchitectureNotFound, "resnet1x", id="no such architecture"),
    ],
)
def test_an_unknown_base_fails_before_anything_is_read(
    tmp_path: Path, mode: str, error: type[Exception], message: str
) -> None:
    base = "resnet18" if mode == "head" else "resnet1x"
    request = FinetuneRequest.model_validate({"dataset": "nowhere", "name": "a", "base": base, "mode": mode})
    with pytest.raises(error, match=message):
        run(request, ModelStore(tmp_path), silent)


# The default model that the project ships


def test_the_shipped_model_states_its_figure_and_lineage() -> None:
    config = ModelStore(SHIPPED).config("cifar10", 1)
    assert config.metrics["test"]["accuracy"] >= 0.88
    assert config.metrics["test"]["images"] == 10_000
    assert config.lineage["dataset"]["images"]["test"] == 10_000
    first, second = config.lineage["base_model"]["lineage"]["command"], config.lineage["command"]
    assert first.startswith("imago finetune cifar10.zip --name cifar10 --base preact_resnet --mode scratch")
    assert second.startswith("imago finetune cifar10.zip --name cifar10 --base cifar10 --mode finetune")


def test_the_shipped_model_is_small() -> None:
    config = ModelStore(SHIPPED).config("cifar10", 1)
    folders = [SHIPPED / "backbones" / config.backbones[0].key, SHIPPED / "models" / "cifar10" / "1"]
    files = [path for folder in folders for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000


@pytest.mark.data
def test_the_shipped_model_is_as_good_as_it_says(data_dir: Path, tmp_path: Path) -> None:
    classifier = ModelStore(SHIPPED).load("cifar10", 1)
    preprocessing = classifier.config.backbones[0].preprocessing
    data = load(first_test_images(data_dir, tmp_path), preprocessing, val_fraction=0.5, seed=0)
    features = outputs(classifier.backbones[0].module, data.pixels, torch.arange(1000), preprocessing)
    found = classifier.head(features).argmax(dim=1)
    assert classifier.config.classes == data.classes
    stated = classifier.config.metrics["test"]["accuracy"]
    assert abs((found == data.labels).float().mean() - stated) < 0.03  # three deviations of 1,000 images


def first_test_images(data_dir: Path, tmp_path: Path) -> Path:
    """A zip of the first hundred test images of each class of CIFAR-10."""
    with zipfile.ZipFile(data_dir / "cifar10.zip") as source:
        names = [n for n in source.namelist() if n.startswith("test/") and int(Path(n).stem) < 100]
        return archive(tmp_path / "test.zip", {name: source.read(name) for name in names})
