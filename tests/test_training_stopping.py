"""Sequences worked out by hand from the definitions of Prechelt 1998."""

import pytest

from models.training.job.request import EarlyStopping
from models.training.network.early_stopping import generalisation_loss, name_of, progress, reason_to_stop, trade

FLAT = [1.0] * 40  # a training loss that does not move


def rule(criterion: str, **changes: float) -> EarlyStopping:
    return EarlyStopping.model_validate({"criterion": criterion, **changes})


def stops(rule: EarlyStopping, losses: list[float], val_losses: list[float]) -> int | None:
    epochs = range(1, len(val_losses) + 1)
    return next((t for t in epochs if reason_to_stop(rule, losses[:t], val_losses[:t])), None)


def test_the_figures() -> None:
    assert generalisation_loss([2.0, 1.0, 1.1]) == pytest.approx(10.0)
    assert progress([1.2, 1.0, 1.1]) == pytest.approx(100.0)  # mean 1.1, lowest 1.0
    assert generalisation_loss([0.0, 0.0]) == 0.0
    assert generalisation_loss([0.0, 0.1]) == float("inf")


@pytest.mark.parametrize(
    ("rule", "losses", "val_losses", "epoch"),
    [
        pytest.param(rule("patience", patience=2), FLAT, [3, 2, 2.5, 1, 1, 1.5], 6, id="patience: equal is not lower"),
        pytest.param(rule("patience", patience=3), FLAT, [3, 2, 2.5, 2.5, 1], None, id="patience: just in time"),
        pytest.param(rule("gl", alpha=5), FLAT, [2, 1, 1.03, 1.06], 4, id="GL: more than 5 %"),
        pytest.param(rule("gl", alpha=6.25), FLAT, [2, 1, 1.0625, 1.0], None, id="GL: as much is not more"),
        # GL = 20; strip 1.3 1.2 1.1 -> P = 1000 * (1.2 / 1.1 - 1) = 90.9; quotient 0.22
        pytest.param(rule("pq", alpha=0.2, strip=3), [1.3, 1.2, 1.1], [1, 1.1, 1.2], 3, id="PQ: 0.22 is over 0.2"),
        pytest.param(rule("pq", alpha=0.25, strip=3), [1.3, 1.2, 1.1], [1, 1.1, 1.2], None, id="PQ: 0.22 is under 0.25"),
        pytest.param(rule("pq", alpha=5, strip=3), FLAT, [1, 1.1, 1.2], 3, id="PQ: training has stopped moving"),
        pytest.param(rule("pq", alpha=5, strip=3), FLAT, [1, 1, 1, 1.2, 1], None, id="PQ: only at the end of a strip"),
        pytest.param(rule("up", patience=1, strip=2), FLAT, [9, 5, 9, 6], 4, id="UP 1: one rise between strip ends"),
        pytest.param(rule("up", patience=2, strip=2), FLAT, [9, 5, 9, 6, 0, 6, 0, 7, 0, 8], 10, id="UP 2: in a row"),
        pytest.param(rule("up", patience=2, strip=2), FLAT, [9, 5, 9, 6, 9, 4, 9, 5], None, id="UP 2: not in a row"),
        pytest.param(rule("none"), FLAT, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], None, id="none"),
    ],
)  # fmt: skip
def test_the_epoch_after_which_it_ends(
    rule: EarlyStopping, losses: list[float], val_losses: list[float], epoch: int | None
) -> None:
    assert stops(rule, losses, val_losses) == epoch


def test_the_reason_has_the_figures() -> None:
    reason = reason_to_stop(rule("up", patience=1, strip=2), FLAT[:4], [9, 0.5, 9, 0.625])
    assert reason == "the validation loss rose 1 times in a row, each over 2 epochs: 0.5000, 0.6250"
    assert "6.0 % above its lowest, 1.0000" in str(reason_to_stop(rule("gl"), FLAT[:2], [1, 1.06]))


def test_the_trade_says_what_was_saved_and_what_others_would_have_done() -> None:
    text = trade(rule("patience", patience=2), FLAT[:5], [2, 1, 0.5, 0.6, 0.7], 20)
    assert "5 of 20 epochs ran; the lowest validation loss was 0.5000, of epoch 3." in text
    assert "Ended by patience 2, which saved up to 15 epochs: 2 epochs without a lower" in text
    assert "GL 5 would have ended after epoch 4, at best with 0.5000" in text
    assert "UP 2 would not have ended" in text


def test_the_trade_of_a_run_that_was_not_ended_saves_nothing() -> None:
    assert "saved" not in trade(rule("none"), FLAT[:3], [3, 2, 1], 3)
    assert name_of(rule("pq", alpha=2.5)) == "PQ 2.5"
