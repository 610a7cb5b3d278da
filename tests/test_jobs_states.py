"""A job's states: whatever is asked in whatever order, the table does what the simple model here says."""

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from models.errors import NameConflict
from service.errors import IdempotencyMismatch, JobActive, JobFinished, JobNotFound, JobNotStarted
from service.jobs.job import ACTIVE, TERMINAL
from service.jobs.table import JobTable, Submission


@dataclass
class Known:
    """What a job must look like."""

    name: str
    body: str
    status: str = "queued"
    deploying: bool = False
    attempt: int = 0
    crashes: int = 0
    progress: float = 0.0
    stop: bool = False
    claimed: bool = False


class States(RuleBasedStateMachine):
    ids = Bundle("ids")

    @initialize()
    def open(self) -> None:
        self.table, self.jobs = JobTable("sqlite://"), dict[str, Known]()
        self.keys: dict[str, str] = {}
        self.count = 0

    def teardown(self) -> None:
        self.table.close()

    @rule(
        target=ids,
        name=st.sampled_from("pqr"),
        key=st.sampled_from([None, "k", "l"]),
        body=st.sampled_from("01"),
    )
    def create(self, name: str, key: str | None, body: str) -> Any:
        self.count += 1
        new = Submission(f"job {self.count}", {"name": name, "dataset": "d", "mode": "head"}, key, body)
        before = self.keys.get(key or "")
        try:
            job, replayed = self.table.add(new, 100)
        except IdempotencyMismatch:
            assert before is not None
            assert self.jobs[before].body != body
            return multiple()
        except NameConflict:
            assert any(known.name == name and known.status in ACTIVE for known in self.jobs.values())
            return multiple()
        assert (replayed, job.id) == ((True, before) if before else (False, new.id))
        if not replayed:
            self.jobs[job.id] = Known(name, body)
            self.keys |= {key: job.id} if key else {}
        return job.id

    @rule()
    def claim(self) -> None:
        active = [id for id, known in self.jobs.items() if known.status in ACTIVE]
        assert self.table.claim(lambda job: True) == (active[0] if active else None)
        if active:
            self.jobs[active[0]].claimed = True

    @rule(id=ids)
    def begin(self, id: str) -> None:
        begun = self._claimed(id) and self.jobs[id].status in ("queued", "running")
        assert self.table.begin(id) == begun
        if begun:
            self.jobs[id].status, self.jobs[id].attempt = "running", self.jobs[id].attempt + 1

    @rule(id=ids, progress=st.floats(0, 1))
    def progress(self, id: str, progress: float) -> None:
        self.table.progress(id, "deploy" if self._deploying(id) else "train", progress, 1.0)
        if self._running(id):
            self.jobs[id].progress = progress

    @rule(id=ids)
    def crash(self, id: str) -> None:
        if id not in self.jobs:
            with pytest.raises(JobNotFound):
                self.table.crashed(id, (1, 0))
            return
        known = self.jobs[id]
        assert self.table.crashed(id, (1, 0)) == known.crashes + 1
        known.crashes += known.status == "running"

    @rule(id=ids)
    def cancel(self, id: str) -> None:
        known = self.jobs.get(id)
        if known is None or known.status in ("succeeded", "failed") or known.deploying:
            with pytest.raises(JobNotFound if known is None else JobFinished):
                self.table.cancel(id)
            return
        known.status = {"queued": "cancelled", "running": "cancelling"}.get(known.status, known.status)
        assert self.table.cancel(id).status == known.status

    @rule(id=ids)
    def stop(self, id: str) -> None:
        if self._running(id):
            self.jobs[id].stop = True
            assert self.table.stop(id).status == "running"
            return
        known = self.jobs.get(id)
        refusal = JobNotFound if known is None else JobNotStarted if known.status == "queued" else JobFinished
        with pytest.raises(refusal):
            self.table.stop(id)

    @rule(id=ids)
    def deploy(self, id: str) -> None:
        running = self._running(id)
        assert self.table.deploying(id, {"model": "m", "version": 1}) == running
        if running:
            self.jobs[id].deploying = True

    @rule(id=ids, status=st.sampled_from(TERMINAL))
    def finish(self, id: str, status: Any) -> None:
        known = self.jobs.get(id)
        ends = known is not None and known.status == ("cancelling" if status == "cancelled" else "running")
        assert self.table.finish(id, status) == ends
        if known is not None and ends:
            known.status, known.deploying = status, False

    @rule(id=consumes(ids))
    def delete(self, id: str) -> Any:
        known = self.jobs.get(id)
        if known is not None and known.status in TERMINAL:
            self.table.delete(id)
            del self.jobs[id]
            self.keys = {key: job for key, job in self.keys.items() if job != id}
            return
        with pytest.raises(JobNotFound if known is None else JobActive):
            self.table.delete(id)

    def _running(self, id: str) -> bool:
        return id in self.jobs and self.jobs[id].status == "running"

    def _claimed(self, id: str) -> bool:
        return id in self.jobs and self.jobs[id].claimed

    def _deploying(self, id: str) -> bool:
        return id in self.jobs and self.jobs[id].deploying

    @invariant()
    def the_table_is_as_known(self) -> None:
        found = {job.id: job for job in self.table.page(None, 1000)[0]}
        assert found.keys() == self.jobs.keys()
        for id, known in self.jobs.items():
            job = found[id]
            assert (job.status, job.attempt, job.progress) == (known.status, known.attempt, known.progress)
            assert job.terminal == (job.finished_at is not None) == (job.status in TERMINAL)
            if known.claimed:
                assert self.table.control(id).stop == known.stop

    @invariant()
    def the_queue_is_in_order(self) -> None:
        active = [id for id, known in self.jobs.items() if known.status in ACTIVE]
        places = [self.table.get(id).queue_position for id in active if self.jobs[id].status == "queued"]
        assert places == list(range(1, len(places) + 1))
        assert len({self.jobs[id].name for id in active}) == len(active)


@pytest.mark.system
@pytest.mark.abuse("J6")
def test_any_order_of_events_leaves_what_it_should() -> None:
    run_state_machine_as_test(States, settings=settings(max_examples=30, stateful_step_count=30, deadline=None))
