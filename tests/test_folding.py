"""Folding batch norm into convolutions: the same function, found without disturbing other threads."""

import threading

import pytest
import torch
from torch import Tensor, nn

from models.architectures.efficientnet_lite import SameConv
from models.classifier import Tap
from models.runtime.folding import fold_batch_norm


class Block(nn.Module):
    """conv -> norm -> relu, with the convolution's output used a second time where `leaks`."""

    def __init__(self, leaks: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.leaks = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), leaks
        self.norm.running_mean = torch.linspace(-1, 1, 8)
        self.norm.running_var = torch.linspace(0.5, 2, 8)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        out: Tensor = self.norm(raw).relu()
        return out + raw if self.leaks else out


@pytest.mark.parametrize(
    ("leaks", "folds"), [pytest.param(False, 1, id="plain"), pytest.param(True, 0, id="used twice")]
)
def test_folding_keeps_the_function(leaks: bool, folds: int) -> None:
    block, x = Block(leaks).eval(), torch.randn(2, 3, 8, 8)
    folded, count = fold_batch_norm(block, x[:1])
    assert count == folds
    assert torch.allclose(folded(x), block(x), atol=1e-5)
    assert isinstance(folded.norm, nn.Identity) == (folds == 1)
    assert isinstance(block.norm, nn.BatchNorm2d)


def test_a_convolution_with_same_padding_keeps_the_folded_bias() -> None:
    """EfficientNet-Lite's convolution of stride 2, which calls the function itself."""
    block, x = Block().eval(), torch.randn(2, 3, 9, 9)
    block.conv = SameConv(3, 8, 3, stride=2, bias=False)
    folded, count = fold_batch_norm(block, x[:1])
    assert count == 1
    torch.testing.assert_close(folded(x), block(x), atol=1e-5, rtol=1e-5)


def test_a_norm_before_its_convolution_stays() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)).eval()
    assert fold_batch_norm(network, torch.randn(1, 3, 8, 8))[1] == 0


def test_a_shared_norm_stays() -> None:
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm).eval()
    assert fold_batch_norm(network, torch.randn(1, 3, 8, 8))[1] == 0


def test_other_threads_go_on_while_a_network_is_folded() -> None:
    network, x, stop, failures = Block().eval(), torch.randn(1, 3, 8, 8), threading.Event(), []

    def forward() -> None:
        while not stop.is_set():
            try:
                network(x)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=forward)
    thread.start()
    for _ in range(50):
        fold_batch_norm(Block(), x)
    stop.set()
    thread.join()
    assert not failures


@pytest.mark.parametrize("name", ["0", "1"])
def test_a_tapped_module_keeps_its_output(name: str) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    tap, images = Tap(network, name), torch.randn(2, 3, 8, 8)
    folded, count = fold_batch_norm(tap, images[:1])
    assert count == 1
    torch.testing.assert_close(folded(images), tap(images))
