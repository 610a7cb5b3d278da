"""What is beyond a flow's window waits with its body unread, and is refused."""

import asyncio
from pathlib import Path

import pytest
from starlette.types import Message
from support.service_fakes import Service, client_of
from test_middleware import Call, chunk

from service.errors import QueueFull
from service.http import large_requests as windows
from service.http.large_requests import Windows
from service.http.middleware import LARGE_BODY

pytestmark = pytest.mark.anyio
FLOW = ("10.0.0.1", "a")


@pytest.fixture
async def narrow() -> Windows:
    """Windows in which the queue has refused one of two requests: one is under way, and no more may be."""
    windows = Windows()
    assert await windows.enter(FLOW)
    assert await windows.enter(FLOW)
    windows.leave(FLOW, refused=True)
    return windows


async def test_nothing_is_bounded_before_the_queue_refuses() -> None:
    windows = Windows()
    assert all([await windows.enter(FLOW) for _ in range(100)])


async def test_beyond_the_window_a_request_waits_for_its_turn(narrow: Windows) -> None:
    turns = [asyncio.create_task(narrow.enter(FLOW)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(turn.done() for turn in turns)
    narrow.leave(FLOW, refused=False)
    assert await turns[0]
    assert not turns[1].done()
    narrow.leave(FLOW, refused=False)
    assert await turns[1]


async def test_a_request_that_finds_no_room_in_time_is_refused(
    narrow: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WAIT_S", 0.01)
    assert not await narrow.enter(FLOW)
    narrow.leave(FLOW, refused=False)
    assert len(narrow) == 0


async def test_other_flows_have_windows_of_their_own(narrow: Windows) -> None:
    assert await narrow.enter(("10.0.0.1", "b"))
    assert await narrow.enter(("10.0.0.2", "a"))


async def test_a_waiting_request_that_is_cancelled_leaves_its_place(narrow: Windows) -> None:
    first, second = (asyncio.create_task(narrow.enter(FLOW)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    narrow.leave(FLOW, refused=False)
    assert await second
    narrow.leave(FLOW, refused=False)
    assert len(narrow) == 0


async def test_a_turn_that_came_in_the_moment_of_the_cancellation_is_passed_on(narrow: Windows) -> None:
    first, second = (asyncio.create_task(narrow.enter(FLOW)) for _ in range(2))
    await asyncio.sleep(0)
    narrow.leave(FLOW, refused=False)
    first.cancel()
    assert await second


async def test_a_window_grows_with_what_is_answered(narrow: Windows) -> None:
    waiting = [asyncio.create_task(narrow.enter(FLOW)) for _ in range(9)]
    await asyncio.sleep(0)
    for _ in range(4):
        narrow.leave(FLOW, refused=False)
    await asyncio.sleep(0)
    assert sum(turn.done() for turn in waiting) == 5  # one for each that ended, and one more
    for turn in waiting:
        turn.cancel()


@pytest.mark.abuse("A614")
async def test_a_flood_is_refused_unread_and_small_requests_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WAIT_S", 0.01)
    service = Service(tmp_path)
    service.engine.gate = asyncio.Event()
    async with client_of(service):
        first = asyncio.create_task(post(service, LARGE_BODY + 1))
        await service.engine.waiting.wait()
        service.engine.error = QueueFull("full")
        assert (await post(service, LARGE_BODY + 1)).status == 429  # by the queue
        service.engine.error = None
        unread = await post(service, LARGE_BODY + 1)
        service.engine.gate.set()
        assert [(await post(service, size)).status for size in (LARGE_BODY, LARGE_BODY + 1)] == [200, 200]
    assert (unread.status, unread.header["retry-after"]) == (429, "1")
    assert "requests for this model" in unread.error["message"]
    assert (await first).status == 200


async def post(service: Service, size: int) -> Call:
    messages: list[Message] = [chunk(bytes(size))]
    return await Call(messages, headers={"content-length": str(size)}).run(service)
