import pytest
import torch
from torch import nn
from training_data import PREPROCESSING

from models.classifier import normalise
from models.training.evaluate import evaluate, outputs, wilson


@pytest.mark.parametrize(
    ("correct", "total", "interval"),
    [
        pytest.param(146, 153, (0.9086, 0.9777), id="hymenoptera"),
        pytest.param(0, 10, (0.0, 0.2775), id="none right"),
        pytest.param(10, 10, (0.7225, 1.0), id="all right"),
    ],
)
def test_wilson(correct: int, total: int, interval: tuple[float, float]) -> None:
    assert wilson(correct, total) == pytest.approx(interval, abs=1e-3)


def test_accuracy_overall_and_per_class() -> None:
    found = evaluate(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), ("a", "b", "c"))
    assert (found.images, found.accuracy) == (4, 0.75)
    assert found.per_class == {"a": 1.0, "b": 0.666667}  # nothing is said of c, of which there is no image


def test_outputs_are_those_of_eval_mode_in_the_rows_order() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5))
    pixels = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    rows = torch.tensor([7, 1, 4, 4, 9])
    found = outputs(module, pixels, rows, PREPROCESSING, batch_size=2)
    assert torch.allclose(found, module.eval()(normalise(pixels[rows], PREPROCESSING)), atol=1e-5)
