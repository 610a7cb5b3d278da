import pytest

from models.data.parts import is_fold, is_unlabelled, part_of, parts_among


@pytest.mark.parametrize(
    "name",
    [
        *(
            "train",
            "Training",
            "TRAIN",
            "training_set",
            "trainset",
            "train_data",
            "seg_train",
            "X_train",
            "train-images",
        ),
        *("TrainImages", "train2017", "Train_Set_Folder", "images_train", "01_train", "train (1)"),
    ],
)
def test_names_of_training_parts(name: str) -> None:
    assert part_of(name) == "train"


@pytest.mark.parametrize(
    "name", ["Testing", "test_set", "testset", "seg_test", "eval", "evaluation", "test1", "X_test"]
)
def test_names_of_test_parts(name: str) -> None:
    assert part_of(name) == "test"


@pytest.mark.parametrize("name", ["val", "VALID", "validation_set", "dev", "val2017", "ValidationData"])
def test_names_of_validation_parts(name: str) -> None:
    assert part_of(name) == "val"


@pytest.mark.parametrize(
    "name", ["trains", "bullet_train", "strain", "contest", "train_test", "invalid", "device", "ant", "7"]
)
def test_names_of_no_parts(name: str) -> None:
    assert part_of(name) is None


def test_folders_that_differ_by_the_part_alone_are_parts() -> None:
    assert parts_among(["flowers_train", "flowers_test"]) == {"flowers_train": "train", "flowers_test": "test"}
    assert parts_among(["bullet_train", "crash_test"]) == {}


def test_folds_and_folders_without_labels() -> None:
    assert all(map(is_fold, ["fold1", "Fold_2", "k-fold 3", "split04"]))
    assert all(map(is_unlabelled, ["unlabeled", "seg_pred", "predict", "unlabelled_images"]))
    assert not any(map(is_unlabelled, ["ant", "train", "predator"]))
    assert not is_fold("folder")
