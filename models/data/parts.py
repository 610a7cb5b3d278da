"""Names of the parts of a dataset: the one place that knows `train`, `Training`, `seg_test`, `X_val` and the like.

It also knows names of folders that are not parts: folds, and images without labels.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

Part = Literal["train", "val", "test"]

PARTS: tuple[Part, ...] = ("train", "val", "test")

# `dev` and `eval` as the Hugging Face Hub has them
WORDS: dict[Part, str] = {
    "train": "train|training|trainval|trn",
    "val": "val|valid|validation|validate|validating|dev|development",
    "test": "test|testing|tst|eval|evaluation|holdout",
}
BESIDE = (
    "set|sets|data|dataset|datasets|image|images|imgs?|pics?|pictures?|photos?|samples?|examples?|split|splits|part|"
    "folders?|dir|files?|seg|x|raw|full|all|final|new|original|cropped|resized|small|jpe?gs?|pngs?|[0-9]+"
)  # allowed beside the word of a part: `train_images`, `X_train`, `seg_test`, `train2017`
UNLABELLED = re.compile("(un|not)?label+ed|unlabel+ed|pred|predict|predictions?|inference|submissions?|no label")
FOLD = re.compile(r"((k ?)?fold|cv|split|batch|partition|subset)s? ?[0-9]+")

_PART = {part: re.compile(rf"({words})({BESIDE})?") for part, words in WORDS.items()}
_BESIDE = re.compile(BESIDE)


@lru_cache(4096)  # folders and cells of a column repeat
def part_of(name: str) -> Part | None:
    """Returns the part that a folder, file or value of this name is; None if the name has other words too (`bullet_train`)."""
    words = _words(name)
    found = _marked(words)
    if found is None:
        return None
    at, part = found
    return part if all(_BESIDE.fullmatch(word) for word in words[:at] + words[at + 1 :]) else None


def parts_among(names: Iterable[str]) -> dict[str, Part]:
    """Returns which folders side by side are parts: by `part_of`, or because their names differ only in the word of a part
    (`flowers_train`, `flowers_test`)."""
    parts: dict[str, Part] = {}
    alike: dict[tuple[str, ...], dict[str, Part]] = {}
    for name in names:
        words = _words(name)
        if part := part_of(name):
            parts[name] = part
        elif found := _marked(words):
            rest = tuple(words[: found[0]] + words[found[0] + 1 :])
            alike.setdefault(rest, {})[name] = found[1]
    for group in alike.values():
        if len(set(group.values())) > 1:
            parts |= group
    return parts


def is_unlabelled(name: str) -> bool:
    """Whether a folder's name says that its images have no labels: `unlabeled`, `seg_pred`, `predict`."""
    words = [word for word in _words(name) if not _BESIDE.fullmatch(word)]
    return bool(UNLABELLED.fullmatch(" ".join(words)))


def is_fold(name: str) -> bool:
    """Whether a folder's name is that of a fold of a cross-validation: `fold1`, `split_3`."""
    return bool(FOLD.fullmatch(" ".join(_words(name))))


def _words(name: str) -> list[str]:
    """Splits `seg_train` and `segTrain` into seg, train; `train2017` into train, 2017."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W\d_]+|[0-9]+", spaced.lower())


def _marked(words: list[str]) -> tuple[int, Part] | None:
    """Returns the index of the one word that names a part, and that part; None if there is none, or several."""
    marked = [(at, part) for at, word in enumerate(words) for part in PARTS if _PART[part].fullmatch(word)]
    return marked[0] if len(marked) == 1 else None
