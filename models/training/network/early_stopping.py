"""Early stopping: patience, and the criteria of Prechelt 1998, "Early Stopping - but when?".

    GL(t) = 100 * (val(t) / lowest val - 1)                                generalisation loss, in percent
    P(t)  = 1000 * (mean train loss of the last strip / its lowest - 1)    progress: how much the training loss still changes
    gl    GL(t) > alpha
    pq    GL(t) / P(t) > alpha, at the end of a strip
    up    val rose from strip end to strip end, `patience` times in a row

Everything is computed from the losses of all epochs, so a resumed run stops where an undisturbed one does.
"""

from collections.abc import Sequence
from itertools import pairwise

from models.training.job.request import EarlyStopping

CRITERIA = ("patience", "gl", "pq", "up")

Losses = Sequence[float]


def reason_to_stop(rule: EarlyStopping, losses: Losses, val_losses: Losses) -> str | None:
    """Return why the run ends after these epochs, with the figures; None: it goes on. The losses are those of each epoch."""
    if rule.criterion == "none" or not val_losses:
        return None
    if rule.criterion == "patience":
        return _patience(rule, val_losses)
    if rule.criterion == "gl":
        return _generalisation(rule, val_losses)
    if len(val_losses) % strip_of(rule):
        return None  # the other two criteria apply at the ends of strips only
    return _quotient(rule, losses, val_losses) if rule.criterion == "pq" else _rises(rule, val_losses)


def strip_of(rule: EarlyStopping) -> int:
    """Return the epochs of a strip; by default Prechelt's own 5."""
    return rule.strip or 5


def generalisation_loss(val_losses: Losses) -> float:
    """Return GL: by how many percent the last loss exceeds the lowest."""
    return 100 * _excess(val_losses[-1], min(val_losses))


def progress(strip: Losses) -> float:
    """Return P: by how many thousandths the mean training loss of a strip exceeds its lowest."""
    return 1000 * _excess(sum(strip) / len(strip), min(strip))


def _excess(value: float, lowest: float) -> float:
    """Return value / lowest - 1; the lowest may be 0."""
    if value == lowest:
        return 0.0
    return value / lowest - 1 if lowest > 0 else float("inf")


def _patience(rule: EarlyStopping, val_losses: Losses) -> str | None:
    best = val_losses.index(min(val_losses)) + 1
    waited = len(val_losses) - best
    if waited < rule.limit:
        return None
    return f"{waited} epochs without a lower validation loss than the {val_losses[best - 1]:.4f} of epoch {best}"


def _generalisation(rule: EarlyStopping, val_losses: Losses) -> str | None:
    loss = generalisation_loss(val_losses)
    if loss <= rule.alpha:
        return None
    return f"the validation loss is {loss:.1f} % above its lowest, {min(val_losses):.4f}; the limit is {rule.alpha:g} %"


def _quotient(rule: EarlyStopping, losses: Losses, val_losses: Losses) -> str | None:
    loss, moved = generalisation_loss(val_losses), progress(losses[-strip_of(rule) :])
    if loss <= rule.alpha * moved:
        return None
    return (
        f"the validation loss is {loss:.1f} % above its lowest while the training loss moved by {moved:.2f} thousandths "
        f"in {strip_of(rule)} epochs; the limit of their quotient is {rule.alpha:g}"
    )


def _rises(rule: EarlyStopping, val_losses: Losses) -> str | None:
    strip = strip_of(rule)
    ends = val_losses[strip - 1 :: strip][-rule.limit - 1 :]
    if len(ends) <= rule.limit or any(after <= before for before, after in pairwise(ends)):
        return None
    return f"the validation loss rose {rule.limit} times in a row, each over {strip} epochs: " + ", ".join(
        f"{loss:.4f}" for loss in ends
    )


# The trade


def trade(rule: EarlyStopping, losses: Losses, val_losses: Losses, planned: int) -> str:
    """Return a paragraph for the report: what the criterion saved and may have cost, and when the others would have ended this run."""
    done, best = len(val_losses), val_losses.index(min(val_losses)) + 1
    lines = [
        f"{done} of {planned} epochs ran; the lowest validation loss was {val_losses[best - 1]:.4f}, of epoch {best}."
    ]
    if reason := reason_to_stop(rule, losses, val_losses):
        lines.append(f"Ended by {name_of(rule)}, which saved up to {planned - done} epochs: {reason}.")
    others = [rule.model_copy(update={"criterion": c}) for c in CRITERIA if c != rule.criterion]
    lines.append("On the same losses " + "; ".join(_would_have(other, losses, val_losses) for other in others) + ".")
    lines.append(
        "In Prechelt's comparison slower criteria found networks about 4 % better, for about 4 times the epochs."
    )
    return " ".join(lines)


def name_of(rule: EarlyStopping) -> str:
    """Return a name such as patience 3, GL 5, PQ 5 or UP 3."""
    if rule.criterion in ("gl", "pq"):
        return f"{rule.criterion.upper()} {rule.alpha:g}"
    return f"{'UP' if rule.criterion == 'up' else rule.criterion} {rule.limit}"


def _would_have(rule: EarlyStopping, losses: Losses, val_losses: Losses) -> str:
    for epoch in range(1, len(val_losses) + 1):
        if reason_to_stop(rule, losses[:epoch], val_losses[:epoch]):
            return f"{name_of(rule)} would have ended after epoch {epoch}, at best with {min(val_losses[:epoch]):.4f}"
    return f"{name_of(rule)} would not have ended"
