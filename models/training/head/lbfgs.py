"""L-BFGS for smooth convex functions. torch's own imports its compiler at the first use of an optimiser, which takes longer than fitting
most heads (8 s against 0.1 s on two slow cores)."""

from collections import deque
from collections.abc import Callable, Iterable

from torch import Tensor

from models.errors import TrainingError

Objective = Callable[[Tensor], tuple[float, Tensor]]  # weights -> value, gradient of the same shape

MEMORY = 10  # earlier steps that are used
MAX_HALVINGS = 30  # of a step, by the line search
SUFFICIENT = 1e-4  # share of the descent that the slope predicts


def minimise(
    objective: Objective, start: Tensor, max_steps: int, tolerance: float, tick: Callable[[float], None]
) -> Tensor:
    """Return the weights at the minimum of a convex function whose curvature is about 1 in all directions.

    Ends when the value is about `tolerance` above the minimum, or after `max_steps`. Raises TrainingError if it is not finite.
    """
    weights = start
    value, gradient = objective(weights)
    history: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)
    for number in range(max_steps):
        tick(number / max_steps)
        if not gradient.isfinite().all():
            raise TrainingError("the head's loss is not finite: the base's features are damaged; use another base")
        if dot(gradient, gradient) / 2 <= tolerance:  # at curvature 1, the distance to the minimum
            break
        found = _search(objective, weights, _direction(gradient, history), value, gradient)
        if found is None:  # rounding allows no lower value
            break
        step, value, new_gradient = found
        history.append((step, new_gradient - gradient))
        weights, gradient = weights + step, new_gradient
    return weights


def _direction(gradient: Tensor, history: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the step direction, by the curvature estimated from the last (step, change of gradient): the two loops of Nocedal 1980."""
    pairs = [(step, change, dot(step, change)) for step, change in history]
    direction, factors = -gradient, []
    for step, change, product in reversed(pairs):
        factors.append(dot(step, direction) / product)
        direction = direction - factors[-1] * change
    if pairs:
        _, change, product = pairs[-1]
        direction = direction * (product / dot(change, change))
    for (step, change, product), factor in zip(pairs, reversed(factors), strict=True):
        direction = direction + (factor - dot(change, direction) / product) * step
    return direction


def _search(
    objective: Objective, weights: Tensor, direction: Tensor, value: float, gradient: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """Return the first of 1, 1/2, 1/4 ... times `direction` that descends enough for its slope, with the value and gradient there.

    The gradient of a convex function then changes with the right sign; this is checked because of rounding.
    """
    slope = dot(gradient, direction)
    for halvings in range(MAX_HALVINGS):
        step = direction * 0.5**halvings
        lower, new_gradient = objective(weights + step)
        if lower <= value + SUFFICIENT * 0.5**halvings * slope and dot(step, new_gradient - gradient) > 0:
            return step, lower, new_gradient
    return None


def dot(a: Tensor, b: Tensor) -> float:
    return float(a.ravel().dot(b.ravel()))
