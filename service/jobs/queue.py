"""Whose turn it is: a DBOS queue in the jobs database, from which each server takes one job at a time.

A job that a server was working on when it ended is put back by that server's next start, before those that wait. DBOS is a
singleton of its process, and importing it takes a second and 40 MB: this module is imported when the first job is asked about.
"""

import logging
from collections.abc import Callable

from dbos import DBOS, DBOSConfig, SetWorkflowID

QUEUE = "imago-finetune"
POLL_S = 0.5  # a job waits so long at most before it begins
WORKFLOW_VERSION = "1"  # DBOS recovers only jobs of its own version: another one is due when the steps below change
RUNNING = ("ENQUEUED", "DELAYED", "PENDING")  # of a workflow, as DBOS says it


class Interrupted(BaseException):
    """The server is leaving. No Exception, because DBOS would record one as the job's end: this way the next start runs it again."""


class Queue:
    """Calls `train` and then `deploy` for each job, in a thread of its own, at least once: both must bear being repeated."""

    def __init__(self, url: str, server: str, train: Callable[[str], None], deploy: Callable[[str], None]) -> None:
        """`server` is this server's name among those that share the database: what it left behind is known by it."""
        log = logging.getLogger("dbos")
        if not log.handlers:
            log.addHandler(logging.NullHandler())  # or DBOS adds one of its own, beside ours
        DBOS(
            config=DBOSConfig(
                name="imago",
                system_database_url=url,
                application_version=WORKFLOW_VERSION,
                executor_id=server,
                log_level="WARNING",
                sys_db_pool_size=5,
                enable_otlp=False,
            )
        )

        @DBOS.workflow(name="finetune", max_recovery_attempts=None)
        def finetune(job: str) -> None:
            DBOS.run_step({"name": "train"}, train, job)
            DBOS.run_step({"name": "deploy"}, deploy, job)

        self._workflow = finetune
        try:
            DBOS.launch()
            DBOS.register_queue(QUEUE, worker_concurrency=1, polling_interval_sec=POLL_S, on_conflict="always_update")
        except BaseException:
            self.close()
            raise

    def put(self, job: str) -> None:
        """Enqueues a job, unless it is already."""
        with SetWorkflowID(job):
            DBOS.enqueue_workflow(QUEUE, self._workflow, job)

    def revive(self, job: str) -> None:
        """Enqueues a job that is not at its end, even where DBOS thinks that it is."""
        self.forget(job)
        self.put(job)

    def forget(self, job: str) -> None:
        """Deletes what DBOS knows of a job, unless it is still at it: then it finds nothing to do, and a small record stays."""
        known = DBOS.get_workflow_status(job)
        if known is not None and known.status not in RUNNING:
            DBOS.delete_workflow(job)

    def held_by(self, server: str) -> list[str]:
        """The jobs that a server has taken from the queue and not ended."""
        held = DBOS.list_workflows(
            status="PENDING", executor_id=server, queue_name=QUEUE, load_input=False, load_output=False
        )
        return [workflow.workflow_id for workflow in held]

    def put_back(self, job: str) -> None:
        """Enqueues a job that a server has taken which is lost; nobody else may do so at the same time."""
        DBOS.resume_workflow(job, queue_name=QUEUE)

    def close(self) -> None:
        DBOS.destroy(destroy_registry=True)
