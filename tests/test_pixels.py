"""The bound on pixels in memory, and what each kind of image counts for."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.image_files import SMALL, photo, save

from models.errors import InvalidImage
from models.images.decoding import NoRoom, decode
from service.inference.decoding import LARGE, PixelBudget

MP = 10**6


def test_beyond_it_there_is_no_room_until_something_is_given_back() -> None:
    budget = PixelBudget(2 * MP)
    with budget.hold(MP), budget.hold(MP):
        with pytest.raises(NoRoom) as full, budget.hold(1):
            pass
        assert full.value.pixels == 1
    with budget.hold(2 * MP):
        assert budget.left == 0


def test_an_image_larger_than_all_of_it_goes_alone() -> None:
    budget = PixelBudget(MP)
    with budget.hold(3 * MP), pytest.raises(NoRoom), budget.hold(1):
        pass
    assert budget.left == MP


@pytest.mark.abuse("A602")
def test_large_images_never_take_the_last_thread() -> None:
    budget = PixelBudget(500 * MP, most_large=1)
    with budget.hold(49 * MP):
        with pytest.raises(NoRoom), budget.hold(LARGE):
            pass
        with budget.hold(LARGE - 1):
            pass
    with budget.hold(LARGE):
        assert budget.large_left == 0
    assert (budget.large_left, budget.left) == (1, 500 * MP)


def test_what_fails_gives_back() -> None:
    budget = PixelBudget(MP)
    with pytest.raises(InvalidImage):
        decode(save(photo(100, 100))[:-200], SMALL, hold=budget.hold)
    assert budget.left == MP


@pytest.mark.anyio
async def test_small_ones_pass_those_that_wait() -> None:
    budget = PixelBudget(3 * MP)
    with budget.hold(2 * MP):
        large = asyncio.create_task(budget.room(2 * MP))
        await asyncio.sleep(0)
        with budget.hold(MP):
            pass
        assert not large.done()
    await asyncio.wait_for(large, 5)


@pytest.mark.anyio
async def test_room_given_back_by_a_thread_wakes_all_that_fit() -> None:
    budget = PixelBudget(2 * MP)
    with budget.hold(2 * MP):
        waiting = [asyncio.create_task(budget.room(MP)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        await asyncio.to_thread(budget._give_back, MP)
        await asyncio.wait_for(asyncio.gather(*waiting[1:]), 5)
        budget.left -= MP
    assert budget._waiting == {}


@pytest.mark.anyio
@pytest.mark.abuse("A602")
async def test_one_large_image_is_woken_at_a_time_and_none_is_forgotten() -> None:
    budget = PixelBudget(500 * MP, most_large=1)
    with budget.hold(LARGE):
        waiting = [asyncio.create_task(budget.room(LARGE)) for _ in range(3)]
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert [task.done() for task in waiting] == [True, False, False]
    for _ in range(2):
        with budget.hold(LARGE):
            pass
        await asyncio.sleep(0.05)
    assert all(task.done() for task in waiting)


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        pytest.param(save(photo(400, 300)), 120_000, id="png"),
        pytest.param(save(photo(400, 300), "JPEG"), 30_000, id="jpeg at half its size"),
        pytest.param(save(photo(400, 300), "JPEG", progressive=True), 120_000, id="progressive"),
        pytest.param(save(photo(400, 300), "WEBP"), 360_000, id="webp"),
        pytest.param(save(photo(400, 300), "GIF"), 120_000, id="gif"),
        pytest.param(save(photo(400, 300), "BMP"), 120_000, id="bmp"),
    ],
)
def test_what_an_image_counts_for(data: bytes, pixels: int) -> None:
    held: list[int] = []

    @contextmanager
    def hold(pixels: int) -> Iterator[None]:
        held.append(pixels)
        yield

    decode(data, SMALL, hold=hold)
    assert held == [pixels]


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "WEBP", "JPEG"])
def test_without_room_nothing_is_loaded(file_format: str) -> None:
    budget = PixelBudget(MP)
    with budget.hold(MP), pytest.raises(NoRoom):
        decode(save(photo(40, 30), file_format), SMALL, hold=budget.hold)
