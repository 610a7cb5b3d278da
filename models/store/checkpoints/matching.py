"""Keys of the tensors in a file -> keys of the network, by names and shapes.

    "model_ema.module.backbone.layer1.0.conv1.weight" = prefix + "layer1.0.conv1.weight"

A prefix that all keys of a network share is ignored: the dictionaries around a state dict, DataParallel, torch.compile, the attribute of
a module that contains the network. `rank` chooses among several copies of the network in a file.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]

# Training scripts evaluate the average of the weights; a teacher or a momentum encoder is not the trained network.
AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)|model_ema|ema_model|params_ema", re.IGNORECASE)
OTHER = re.compile(r"teacher|momentum|encoder_k|target_|(^|[._])(gan|discriminator)", re.IGNORECASE)
# Keys beside a network that are no part of it.
FOREIGN = re.compile(
    r"(^|[._])(loss|criterion|metrics?|accuracy|auroc|f1|confmat|teacher|momentum|ema|swa|proj|projector|projection(_head)?|predictor|"
    r"queue|queue_ptr|center|aux\w*|AuxLogits|total_ops|total_params|n_averaged|num_batches_tracked|pos_weight|class_weights?|"
    r"discriminator|decoder|prototypes?|temperature|logit_scale)([._]|$)|(train|val|valid|test)_\w*(acc|f1|loss|metric)"
)
MAX_PLACES = 100
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class BodyMatch:
    """The place of a network without its last layer in a file. `keys`: {key of the network: key of the file}."""

    prefix: str
    keys: dict[str, str]
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether all tensors are there with the right shapes."""
        return not self.missing and not self.wrong


def rank(name: str) -> int:
    """Returns the rank of a copy of the network; the highest is used."""
    if AVERAGE.search(name):
        return 2
    return 0 if OTHER.search(name) else 1


def is_foreign(key: str) -> bool:
    """Returns whether a key belongs to something beside the network, such as a loss or a metric."""
    return bool(FOREIGN.search(key))


def bodies(expected: Mapping[str, Shape], found: Mapping[str, Shape], aliases: Mapping[str, str]) -> list[BodyMatch]:
    """Returns every possible place of the network, the best first. `aliases`: other names of its keys, {alias: key}."""
    names = {**{key: key for key in expected}, **{alias: key for alias, key in aliases.items() if key in expected}}
    places: dict[tuple[str, bool], dict[str, str]] = defaultdict(dict)
    for full in found:
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", full))):
            inner = full[start:]
            if inner in names:
                is_alias = names[inner] != inner
                for kind in (True, False) if not is_alias else (True,):
                    places[full[:start], kind].setdefault(names[inner], full)
    if len(places) > MAX_PLACES:
        largest = set(sorted(places, key=lambda place: len(places[place]), reverse=True)[:MAX_PLACES])
        places = defaultdict(dict, {place: keys for place, keys in places.items() if place in largest})
    made = [_body(prefix, keys, expected, found) for (prefix, _), keys in places.items()]
    return sorted(made, key=lambda b: (not b.fits, -rank(b.prefix) if b.fits else 0, len(b.wrong) - len(b.keys)))


def _body(prefix: str, keys: dict[str, str], expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> BodyMatch:
    missing = [key for key in expected if key not in keys and not key.endswith(COUNTER)]
    wrong = [key for key, full in keys.items() if not same_shape(expected[key], found[full])]
    return BodyMatch(prefix, keys, missing, wrong)


def same_shape(expected: Shape, found: Shape) -> bool:
    """Returns whether two shapes are equal; a first convolution may have 1 input channel instead of 3."""
    if expected == found:
        return True
    is_first = len(expected) == 4 and expected[1] == 3
    return is_first and len(found) == 4 and found[1] == 1 and (expected[0], *expected[2:]) == (found[0], *found[2:])


def by_position(children: Iterable[str], keys: Collection[str]) -> dict[str, str]:
    """Returns {key in `nn.Sequential(*network.children())`: key of the network}; there `layer1` is `4`."""
    places = {name: str(number) for number, name in enumerate(children)}
    return {
        f"{places[first]}.{rest}": key
        for key in keys
        for first, dot, rest in [key.partition(".")]
        if first in places and dot
    }
