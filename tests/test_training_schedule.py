import pytest

from models.training.network.schedule import SHAPES, constant, cosine, one_cycle, plateau, share, thirds


def test_one_cycle_rises_for_a_fifth_and_falls_to_nothing() -> None:
    shares = [one_cycle(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares.index(max(shares)) == 20
    assert max(shares) == 1.0
    assert 0 < shares[-1] < 0.02


def test_cosine_warms_up_and_is_half_way_down_in_the_middle() -> None:
    shares = [cosine(step, 200) for step in range(200)]
    assert shares[0] == pytest.approx(0.1)
    assert shares.index(max(shares)) == 10
    assert cosine(105, 200) == pytest.approx(0.5)
    assert 0 < shares[-1] < 1e-3


def test_thirds_fall_by_ten() -> None:
    assert [thirds(step, 90) for step in (0, 29, 30, 59, 60, 89)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert constant(89, 90) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_of_one_step_moves(shape: str) -> None:
    assert SHAPES[shape](0, 1) > 0


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        pytest.param([], 1.0, id="no epoch yet"),
        pytest.param([1.0, 0.9, 0.9, 0.95], 1.0, id="two that bring nothing"),
        pytest.param([1.0, 0.9, 0.9, 0.95, 0.9], 0.1, id="the third"),
        pytest.param([1.0] * 7, 0.01, id="twice"),
    ],
)
def test_plateau_follows_the_validation_loss(losses: list[float], expected: float) -> None:
    assert plateau(losses) == pytest.approx(expected)
    assert share("plateau", 0, 10, losses) == pytest.approx(expected)


def test_the_others_do_not_look_at_it() -> None:
    assert share("step", 50, 90, [1.0] * 7) == pytest.approx(0.1)
