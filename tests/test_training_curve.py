import pytest
import torch

from models.training.evaluation.learning_curve import CurvePoint, advice, learning_curve
from models.training.job.request import FinetuneRequest, effective

SETTINGS = effective(FinetuneRequest(dataset="images", name="test"), "head", 200)


def points(*accuracies: float) -> list[CurvePoint]:
    return [CurvePoint(images=100 * i, accuracy=a, interval=(0.0, 1.0)) for i, a in enumerate(accuracies, start=1)]


def test_more_images_of_overlapping_clouds_are_better() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    features = torch.randn(3, 30, generator=generator)[labels] / 2 + torch.randn(600, 30, generator=generator)
    found = learning_curve(features[:200], labels[:200], 3, features[200:], labels[200:], 0.1, SETTINGS)
    assert [point.images for point in found.points] == [51, 101, 152, 200]  # of 67, 67 and 66 images a class
    assert found.points[-1].accuracy > found.points[0].accuracy > 0.5
    assert "Twice as many images" in found.advice


@pytest.mark.parametrize(
    ("accuracies", "images", "said"),
    [
        pytest.param((0.7, 0.8, 0.84, 0.87), 2000, "from 87.0% to about 91", id="a clear gain"),
        pytest.param((0.80, 0.85, 0.86, 0.88), 60, "too few to be sure", id="a gain within the noise"),
        pytest.param((0.9, 0.9, 0.9, 0.9), 2000, "would probably bring little", id="flat"),
        pytest.param((0.92, 0.91, 0.9, 0.89), 2000, "would probably bring little", id="falling"),
        pytest.param((1.0, 1.0, 1.0, 1.0), 500, "would probably bring little", id="all right"),
        pytest.param((0.5, 0.7, 0.8, 0.9), 20, "20 validation images are too few", id="few validation images"),
    ],
)
def test_advice(accuracies: tuple[float, ...], images: int, said: str) -> None:
    assert said in advice(points(*accuracies), images)
