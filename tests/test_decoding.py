"""The decode pool: whose turn it is, who leaves, and when no thread is free."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from service.inference.decoding import DecodePool

pytestmark = pytest.mark.anyio


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end, so that no thread is left waiting."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
async def pool() -> AsyncIterator[DecodePool]:
    pool = DecodePool(2)
    yield pool
    pool.close()


async def test_it_returns_and_raises_what_the_work_does(pool: DecodePool) -> None:
    assert await pool.run("a", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await pool.run("a", lambda: 1 // 0)
    assert pool._clients == {}


@pytest.mark.abuse("A601")
async def test_a_client_that_waits_passes_the_backlog_of_another(pool: DecodePool, gate: threading.Event) -> None:
    done: list[str] = []
    flood: list[asyncio.Task[Any]] = [asyncio.create_task(pool.run("flood", gate.wait)) for _ in range(2)]
    flood += [asyncio.create_task(pool.run("flood", lambda: done.append("flood"))) for _ in range(50)]
    await asyncio.sleep(0)
    caller = asyncio.create_task(pool.run("caller", lambda: done.append("caller")))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*flood, caller)
    assert "caller" in done[:3]


@pytest.mark.abuse("A601")
async def test_models_of_one_client_take_turns(pool: DecodePool, gate: threading.Event) -> None:
    done: list[str] = []
    flood: list[asyncio.Task[Any]] = [asyncio.create_task(pool.run("one", gate.wait, "a")) for _ in range(2)]
    flood += [asyncio.create_task(pool.run("one", lambda: done.append("a"), "a")) for _ in range(50)]
    await asyncio.sleep(0)
    other = asyncio.create_task(pool.run("one", lambda: done.append("b"), "b"))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*flood, other)
    assert "b" in done[:3]


@pytest.mark.abuse("A601")
async def test_one_client_leaves_a_thread_to_those_that_wait(pool: DecodePool, gate: threading.Event) -> None:
    released = threading.Event()
    first = asyncio.create_task(pool.run("flood", gate.wait))
    second = asyncio.create_task(pool.run("flood", released.wait))
    third = asyncio.create_task(pool.run("flood", gate.wait))
    await asyncio.sleep(0)
    callers = [asyncio.create_task(pool.run("caller", lambda: None)) for _ in range(20)]
    await asyncio.sleep(0)
    released.set()  # one thread is free, and the flood holds the other
    await asyncio.wait_for(asyncio.gather(*callers), 5)
    gate.set()
    await asyncio.gather(first, second, third)


async def test_of_two_clients_the_one_with_expensive_work_gets_fewer_turns() -> None:
    pool, done = DecodePool(1), list[str]()
    begin = threading.Event()

    def work(name: str, seconds: float) -> None:
        threading.Event().wait(seconds)
        done.append(name)

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(pool.run("first", begin.wait))]
    tasks += [asyncio.create_task(pool.run("slow", lambda: work("slow", 0.05))) for _ in range(3)]
    tasks += [asyncio.create_task(pool.run("fast", lambda: work("fast", 0.001))) for _ in range(10)]
    await asyncio.sleep(0)
    begin.set()
    await asyncio.gather(*tasks)
    pool.close()
    assert done.index("slow", done.index("slow") + 1) > 9


async def test_a_caller_that_leaves_is_dropped(pool: DecodePool, gate: threading.Event) -> None:
    holders = [asyncio.create_task(pool.run("a", gate.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    left = asyncio.create_task(pool.run("b", lambda: pytest.fail("it ran")))
    await asyncio.sleep(0)
    left.cancel()
    gate.set()
    await asyncio.gather(*holders)
    await pool.run("c", lambda: None)
    assert left.cancelled()


@pytest.mark.abuse("A105")
async def test_it_is_stuck_while_every_thread_is_at_one_piece_of_work(pool: DecodePool, gate: threading.Event) -> None:
    first = asyncio.create_task(pool.run("a", gate.wait))
    await asyncio.sleep(0.05)
    assert pool.stuck_s() == 0
    second = asyncio.create_task(pool.run("b", gate.wait))
    await asyncio.sleep(0.1)
    assert 0.05 < pool.stuck_s() < 1
    gate.set()
    await asyncio.gather(first, second)
    assert pool.stuck_s() == 0
