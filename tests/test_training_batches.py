from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_data import PREPROCESSING, in_memory, settings
from torch import Tensor, nn

from models.preprocessing import denormalise, normalise
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.job.request import Budget, EarlyStopping
from models.training.network.batches import Batches, TrainingBatch, first_images
from models.training.network.process_group import ALONE, ProcessGroup
from models.training.network.trainer import TrainingPlan, train
from models.training.outcome.thumbnails import caption, training_batch

DATA = in_memory()
CLASSES = DATA.classes


def first(chosen: ResolvedHyperparameters, ranks: ProcessGroup = ALONE) -> TrainingBatch:
    return next(Batches(DATA, PREPROCESSING, chosen, torch.device("cpu"), ranks).epoch(1))


def test_the_way_back_from_what_a_network_sees() -> None:
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(denormalise(normalise(pixels, PREPROCESSING), PREPROCESSING), pixels)


@pytest.mark.parametrize("small_until", [0.0, 0.5])
def test_the_sample_is_what_the_network_was_shown_first(tmp_path: Path, small_until: float) -> None:
    chosen, seen = settings(2, augmentation="standard", small_until=small_until), list[Tensor]()
    network = nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, 3))
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    rule = EarlyStopping(criterion="none")
    train(network, TrainingPlan(DATA, PREPROCESSING, chosen, rule, Budget(), tmp_path / "c.pt"), lambda event: None)
    sample = first_images(DATA, PREPROCESSING, chosen)
    assert torch.equal(sample.pixels, denormalise(seen[0], PREPROCESSING))
    assert sample.said.endswith("augmentation standard.")


def test_an_epoch_shows_each_training_image_at_most_once() -> None:
    batches = Batches(DATA, PREPROCESSING, settings(), torch.device("cpu"))
    shown = [batch.images for batch in batches.epoch(1)]
    assert [len(images) for images in shown] == [batches.images] * batches.steps
    assert len(torch.unique(torch.cat(shown).flatten(1), dim=0)) == batches.images * batches.steps


@pytest.mark.parametrize("recipe", [{}, {"mixup": 0.2}, {"cutmix": 1.0}], ids=["plain", "mixup", "cutmix"])
def test_ranks_share_the_batch_of_one(recipe: dict[str, Any]) -> None:
    chosen = settings(augmentation="standard", small_until=0.5, **recipe)
    parts, whole = [first(chosen, ProcessGroup(rank, 3)) for rank in range(3)], first(chosen)
    assert [len(images) for images, _ in parts] == [2, 3, 3]
    assert torch.allclose(torch.cat([images for images, _ in parts]), whole.images, atol=1e-6)
    assert torch.allclose(torch.cat([labels for _, labels in parts]), whole.labels)


def test_the_sample_is_what_several_ranks_were_shown() -> None:
    """Policies draw otherwise where a batch is shared."""
    chosen = settings(augmentation="trivial").model_copy(update={"devices": 2})
    shown = torch.cat([first(chosen, ProcessGroup(rank, 2)).images for rank in range(2)])
    assert torch.equal(first_images(DATA, PREPROCESSING, chosen).pixels, denormalise(shown, PREPROCESSING))
    assert not torch.equal(shown, first(chosen).images)


def test_a_sample_does_not_disturb_chance() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first_images(DATA, PREPROCESSING, settings())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        pytest.param(torch.tensor(2), "red", id="label"),
        pytest.param(torch.tensor([0.0, 0.3, 0.7]), "70% red, 30% green", id="shares"),
    ],
)
def test_captions(label: Tensor, said: str) -> None:
    assert caption(label, CLASSES) == said


def test_mixed_images_are_pictures_with_shares() -> None:
    sample = first_images(DATA, PREPROCESSING, settings(mixup=1.0))
    batch = training_batch(sample, CLASSES)
    assert all("%" in said and picture.startswith(b"\xff\xd8") for said, picture in batch.pictures)
    assert batch.said.endswith("augmentation none and mixed.")
