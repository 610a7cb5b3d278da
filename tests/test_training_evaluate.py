import pytest
import torch
from torch import Tensor, nn

from models.preprocessing import Preprocessing, normalise
from models.training.evaluation.evaluate import ConfusedPair, Evaluation, evaluate, label_errors, outputs, wilson

CLASSES = ("a", "b", "c")


def answers(predicted: list[int], confidence: list[float] | None = None, classes: int = 3) -> Tensor:
    """Probabilities (n, C) whose best class is as predicted; the rest is shared out evenly."""
    best = torch.tensor(confidence or [0.8] * len(predicted))
    probabilities = ((1 - best) / (classes - 1))[:, None].repeat(1, classes)
    return probabilities.scatter(1, torch.tensor(predicted)[:, None], best[:, None])


def evaluated(predicted: list[int], true: list[int], confidence: list[float] | None = None) -> Evaluation:
    paths = [f"{CLASSES[label]}/{i}.jpg" for i, label in enumerate(true)]
    return evaluate(answers(predicted, confidence), torch.tensor(true), CLASSES, paths)


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


def test_figures_by_class() -> None:
    found = evaluated([0, 0, 1, 1, 0], [0, 1, 1, 1, 0])
    assert (found.images, found.accuracy) == (5, 0.8)
    b = found.per_class["b"]
    assert (b.images, b.recall, b.precision, b.f1) == (3, 0.666667, 1.0, 0.8)
    assert found.per_class["a"].precision == 0.666667
    assert found.macro_f1 == 0.8  # of a and b alone


def test_nothing_is_said_of_a_class_without_images() -> None:
    c = evaluated([0, 1], [0, 1]).per_class["c"]
    assert (c.images, c.recall, c.precision, c.f1) == (0, None, None, None)


def test_confusion_is_by_true_and_predicted_class() -> None:
    found = evaluated([1, 1, 0, 2], [0, 0, 0, 2])
    assert found.confusion == ((1, 2, 0), (0, 0, 0), (0, 0, 1))
    assert found.confused == (ConfusedPair(true="a", predicted="b", count=2),)


def test_mistakes_come_most_confident_first() -> None:
    found = evaluated([1, 2, 0], [0, 0, 0], [0.6, 0.9, 0.99])
    assert [(m.path, m.true, m.predicted, m.probability) for m in found.mistakes] == [
        ("a/1.jpg", "a", "c", 0.9),
        ("a/0.jpg", "a", "b", 0.6),
    ]


def test_of_many_classes_the_matrix_is_left_out_and_the_lists_are_short() -> None:
    classes = [str(i) for i in range(300)]
    labels = torch.arange(300)
    found = evaluate(answers(labels.roll(1).tolist(), classes=300), labels, classes, classes)
    assert found.confusion is None
    assert (len(found.confused), len(found.mistakes)) == (20, 50)


def test_a_certain_mistake_has_a_finite_loss() -> None:
    found = evaluated([1, 0], [0, 0], [1.0, 1.0])
    assert found.nll == pytest.approx(27.63 / 2, abs=0.01)
    assert found.ece == 0.5


def test_an_evaluation_is_json_and_back() -> None:
    found = evaluated([0, 1], [0, 0])
    assert Evaluation.model_validate_json(found.model_dump_json()) == found


def test_label_errors_are_the_images_that_were_mislabelled() -> None:
    labels = torch.arange(90) % 3
    given = labels.clone()
    given[[4, 40]] = torch.tensor([0, 0])  # both are of class 1
    probabilities = answers(labels.tolist(), [0.97 if i == 40 else 0.95 if i == 4 else 0.9 for i in range(90)])
    found = label_errors(probabilities, given, [str(i) for i in range(90)], CLASSES)
    assert [(e.path, e.given, e.suggested) for e in found] == [("40", "a", "b"), ("4", "a", "b")]


def test_a_class_that_is_always_unsure_is_not_doubted() -> None:
    """Images of b have 0.6 for a and 0.4 for b, those of a 0.9 for a: 0.6 is far from what images of a have."""
    probabilities = torch.tensor([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    labels = torch.tensor([0] * 10 + [1] * 10)
    assert label_errors(probabilities, labels, [str(i) for i in range(20)], ("a", "b")) == ()


def test_label_errors_of_a_class_without_images() -> None:
    found = label_errors(answers([2, 0]), torch.tensor([0, 0]), ["x", "y"], CLASSES)
    assert found == ()


def test_outputs_are_those_of_eval_mode_in_the_rows_order() -> None:
    preprocessing = Preprocessing(resize=8, crop=8)
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5))
    pixels = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    rows = torch.tensor([7, 1, 4, 4, 9])
    found = outputs(module, pixels, rows, preprocessing, batch_size=2)
    assert torch.allclose(found, module.eval()(normalise(pixels[rows], preprocessing)), atol=1e-5)
