from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.training_data import settings
from torch import Tensor, nn

from models.errors import OutOfMemory
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.network.auxiliary import Auxiliary
from models.training.network.step import Stepper

IMAGES = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


def stepper(
    module: nn.Module,
    chosen: ResolvedHyperparameters | None = None,
    aux: Auxiliary | None = None,
    classes: Tensor | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> Stepper:
    groups = [{"params": list(module.parameters()), "peak": 0.1}]
    return Stepper(module, aux, groups, chosen or settings(), classes, tell)


def fits(most: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A forward hook of a device that has memory for `most` images."""

    def refuse(module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return refuse


def flat(module: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in module.parameters()]).detach()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_pieces_add_up_to_the_step(batch_size: int) -> None:
    whole, pieces = network(), network()
    loss, right = stepper(whole, settings(batch_size=8)).step(IMAGES, LABELS, 1.0)
    cut = stepper(pieces)
    cut.micro = batch_size
    taken = cut.step(IMAGES, LABELS, 1.0)
    assert taken.loss.item() == pytest.approx(loss.item())
    assert taken.right.item() == right.item()
    assert torch.allclose(flat(whole), flat(pieces), atol=1e-6)


def test_out_of_memory_halves_the_batch_and_repeats_the_step() -> None:
    plain, small, told = network(), network(), list[str]()
    stepper(plain).step(IMAGES, LABELS, 1.0)
    small.register_forward_pre_hook(fits(3))
    stepper(small, tell=told.append).step(IMAGES, LABELS, 1.0)
    assert torch.allclose(flat(plain), flat(small), atol=1e-6)
    assert told == [f"out of memory: {n} images at once from here on, in steps of 8" for n in (4, 2)]


@pytest.mark.parametrize(("norm", "least"), [(False, 1), (True, 2)])
def test_where_nothing_fits_it_says_what_to_do(norm: bool, least: int) -> None:
    module = network(norm)
    module.register_forward_pre_hook(fits(0))
    with pytest.raises(OutOfMemory, match=f"train on {least} images of 4 px at once: set gradient_checkpointing"):
        stepper(module).step(IMAGES, LABELS, 1.0)


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        stepper(network()).step(IMAGES[:, :2], LABELS, 1.0)


def test_a_batch_norm_never_sees_one_image() -> None:
    module, sizes = network(norm=True), []
    module.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    cut = stepper(module)
    cut.micro = 2
    cut.step(IMAGES[:7], LABELS[:7], 1.0)
    assert sizes == [3, 2, 2]


@pytest.mark.parametrize("labels", [LABELS, F.one_hot(LABELS, 3).float()], ids=["labels", "shares"])
def test_what_the_network_had_right_is_counted(labels: Tensor) -> None:
    module = network()
    expected = int((module(IMAGES).argmax(dim=1) == LABELS).sum())
    small = stepper(module)
    module.register_forward_pre_hook(fits(3))  # what ran before the memory was out does not count twice
    assert (expected, small.step(IMAGES, labels, 1.0).right.item()) == (expected, expected)


def test_classes_count_as_they_are_told() -> None:
    module, classes = network(), torch.tensor([0.5, 1.0, 3.0])
    each = F.cross_entropy(module(IMAGES), LABELS, reduction="none")
    loss = stepper(module, classes=classes).step(IMAGES, LABELS, 1.0).loss
    assert loss.item() == pytest.approx((each * classes[LABELS]).mean().item(), rel=1e-5)


def test_auxiliary_classifiers_learn_beside_it() -> None:
    module, head = network(), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    aux = Auxiliary({"0": head}, weight=0.4)
    main = F.cross_entropy(module(IMAGES), LABELS).item()
    beside = F.cross_entropy(head(module[0](IMAGES)), LABELS).item()
    with aux.listening(module):
        loss = stepper(module, aux=aux).step(IMAGES, LABELS, 1.0).loss
    assert loss.item() == pytest.approx(main + 0.4 * beside)
    assert head[1].weight.grad is not None


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_rate_is_a_share_of_the_peak(optimizer: str) -> None:
    module = network()
    before = flat(module)
    stepper(module, settings(optimizer=optimizer, weight_decay=0.0)).step(IMAGES, LABELS, 0.0)
    assert torch.equal(flat(module), before)
    stepper(module, settings(optimizer=optimizer)).step(IMAGES, LABELS, 1.0)
    assert not torch.equal(flat(module), before)


def two_groups(optimizer: str, tell: Callable[[str], None] = print) -> Stepper:
    module = network()
    groups = [{"params": list(part.parameters()), "peak": 0.1} for part in (module[0], module[2])]
    return Stepper(module, None, groups, settings(optimizer=optimizer), None, tell)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("at", [1, 2], ids=["first group", "second group"])
def test_out_of_memory_in_the_optimisers_step_repeats_it_for_that_group_alone(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, at: int
) -> None:
    plain, told = two_groups(optimizer), list[str]()
    plain.step(IMAGES, LABELS, 1.0)
    other = two_groups(optimizer, told.append)
    step, calls = other.optimizer.step, list[int]()

    def once() -> None:
        calls.append(len(other.optimizer.param_groups))
        if len(calls) == at:  # the group's state is half made when memory runs out
            other.optimizer.state[other.optimizer.param_groups[0]["params"][0]]["step"] = torch.tensor(7.0)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        step()

    monkeypatch.setattr(other.optimizer, "step", once)
    other.step(IMAGES, LABELS, 1.0)
    assert calls == [1, 1, 1]
    assert len(other.optimizer.param_groups) == 2
    assert torch.equal(flat(other.whole), flat(plain.whole))
    assert "out of memory in the optimiser's step" in told[0]


def test_an_optimiser_whose_state_never_fits_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    stepper = two_groups("adamw")
    monkeypatch.setattr(stepper.optimizer, "step", refuse)
    with pytest.raises(OutOfMemory, match="the optimiser adamw: take sgd"):
        stepper.step(IMAGES, LABELS, 1.0)
