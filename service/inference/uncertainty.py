"""How far an answer may be trusted: its decision, its conformal set, and the training images that are nearest."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from models.decision_rules import Decision
from models.errors import ModelError
from models.uncertainty import Reference, kth
from service.errors import NotProvided
from service.inference.registry.loader import Served
from service.inference.results import ModelResults, Nearest, Prediction, Probabilities, Wanted, WithinTraining


def check(served: Served, wanted: Wanted) -> None:
    """Raises NotProvided where this version keeps nothing to answer by."""
    if wanted.alpha is None and not wanted.neighbours:
        return
    label, reference = f"{served.config.name}@{served.config.version}", served.reference
    if wanted.neighbours and len(served.backbones) > 1:
        raise NotProvided(f"{label} stands on several backbones, and has no one distance", param="neighbours")
    if reference is None:
        raise NotProvided(
            f"{label} keeps nothing of held-out and training images; models trained here do, and "
            f"`imago models calibrate {label} DATASET` gives it to others",
            param="neighbours" if wanted.alpha is None else "alpha",
        )


def judged(answer: ModelResults, served: Served, scores: Probabilities, wanted: Wanted) -> ModelResults:
    """The answer with what the version's reference says of each image; as it was where it has none."""
    if served.reference is None:
        return answer
    results = [
        _judged(result, served, row, near, wanted)
        if isinstance(result, Prediction) and not isinstance(row, ModelError)
        else result
        for result, row, near in zip(answer.results, scores.results, scores.near, strict=True)
    ]
    return replace(answer, results=results)


def _judged(
    prediction: Prediction, served: Served, probabilities: Tensor, near: Tensor | None, wanted: Wanted
) -> Prediction:
    """`near`: distances to the nearest training images, then their places, (2 * M,)."""
    reference = served.reference
    if reference is None:
        raise RuntimeError("the caller asks only where there is one")
    prediction = replace(prediction, decision=_decision(reference, probabilities, near))
    if wanted.alpha is not None:
        [found] = reference.conformal.sets(probabilities, wanted.alpha)
        prediction = replace(prediction, conformal=[served.config.classes[i] for i in found])
    if near is None or reference.neighbourhood is None:
        return prediction
    distances, places = near.chunk(2)
    names: Sequence[str] = reference.neighbourhood.names
    shown = list(zip(places.int().tolist(), distances.tolist(), strict=True))[: wanted.neighbours]
    return replace(
        prediction,
        in_distribution=WithinTraining(float(kth(distances[None])), reference.neighbourhood.threshold),
        nearest=[Nearest(names[place], distance) for place, distance in shown] if wanted.neighbours else None,
    )


def _decision(reference: Reference, probabilities: Tensor, near: Tensor | None) -> Decision | None:
    """By probability and distance; an ensemble has no distance, and rejects nothing."""
    if reference.decisions is None:
        return None
    confidence = float(probabilities.max())
    if near is None or (kept := reference.neighbourhood) is None:
        return reference.decisions.decide(confidence)
    distance = float(kth(near.chunk(2)[0][None]))
    far = kept.far is not None and distance > kept.far
    return reference.decisions.decide(confidence, distance <= kept.threshold, far)
