"""The keys that a training script gave the tensors -> the keys of the network, by names and shapes.

    "model_ema.module.backbone.layer1.0.conv1.weight" = prefix + "layer1.0.conv1.weight"

Whatever all of a network's keys have before them is a prefix: the dictionaries around a state dict, DataParallel, torch.compile, the
attribute of a module that holds the network. `rank` chooses where a file holds the network several times.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]

# An average of the weights is what training scripts evaluate; a teacher or a momentum encoder is not what they train.
AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)|model_ema|ema_model|params_ema", re.IGNORECASE)
OTHER = re.compile(r"teacher|momentum|encoder_k|target_|(^|[._])(gan|discriminator)", re.IGNORECASE)
# Beside a network, and no part of it.
FOREIGN = re.compile(
    r"(^|[._])(loss|criterion|metrics?|accuracy|auroc|f1|confmat|teacher|momentum|ema|swa|proj|projector|projection(_head)?|predictor|"
    r"queue|queue_ptr|center|aux\w*|AuxLogits|total_ops|total_params|n_averaged|num_batches_tracked|pos_weight|class_weights?|"
    r"discriminator|decoder|prototypes?|temperature|logit_scale)([._]|$)|(train|val|valid|test)_\w*(acc|f1|loss|metric)"
)
MAX_PLACES = 100
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class BodyMatch:
    """Where a network without its last layer lies in a file: `keys` are {key of the network: key of the file}."""

    prefix: str
    keys: dict[str, str]
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.missing and not self.wrong


def rank(name: str) -> int:
    """Higher for what is taken first."""
    if AVERAGE.search(name):
        return 2
    return 0 if OTHER.search(name) else 1


def is_foreign(key: str) -> bool:
    return bool(FOREIGN.search(key))


def bodies(expected: Mapping[str, Shape], found: Mapping[str, Shape], aliases: Mapping[str, str]) -> list[BodyMatch]:
    """Every place where the network might lie, the best first. `aliases` are other names of its keys: {alias: key}."""
    names = {**{key: key for key in expected}, **{alias: key for alias, key in aliases.items() if key in expected}}
    places: dict[tuple[str, bool], dict[str, str]] = defaultdict(dict)
    for full in found:
        for start in _starts(full):
            inner = full[start:]
            if inner in names:
                is_alias = names[inner] != inner
                for kind in (True, False) if not is_alias else (True,):
                    places[full[:start], kind].setdefault(names[inner], full)
    if len(places) > MAX_PLACES:
        largest = set(sorted(places, key=lambda place: len(places[place]), reverse=True)[:MAX_PLACES])
        places = defaultdict(dict, {place: keys for place, keys in places.items() if place in largest})
    made = [_body(prefix, keys, expected, found) for (prefix, _), keys in places.items()]
    return sorted(made, key=lambda body: (not body.fits, -rank(body.prefix) if body.fits else 0, -_agreeing(body)))


def _starts(key: str) -> list[int]:
    return [0, *(place.end() for place in re.finditer(r"\.", key))]


def _body(prefix: str, keys: dict[str, str], expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> BodyMatch:
    missing = [key for key in expected if key not in keys and not key.endswith(COUNTER)]
    wrong = [key for key, full in keys.items() if not same_shape(expected[key], found[full])]
    return BodyMatch(prefix, keys, missing, wrong)


def _agreeing(body: BodyMatch) -> int:
    return len(body.keys) - len(body.wrong)


def same_shape(expected: Shape, found: Shape) -> bool:
    """True also for a first convolution of one channel in the place of three."""
    if expected == found:
        return True
    is_first = len(expected) == 4 and expected[1] == 3
    return is_first and len(found) == 4 and found[1] == 1 and (expected[0], *expected[2:]) == (found[0], *found[2:])


def by_position(children: Iterable[str], keys: Collection[str]) -> dict[str, str]:
    """Names of the keys in `nn.Sequential(*network.children())`, where `layer1` is `4`."""
    places = {name: str(number) for number, name in enumerate(children)}
    return {
        f"{places[first]}.{rest}": key
        for key in keys
        for first, dot, rest in [key.partition(".")]
        if first in places and dot
    }
