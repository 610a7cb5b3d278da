"""Fine-tuning jobs: durable, one at a time, each in a trainer process of its own.

    routes -> Jobs -> JobTable (a job's state, and which server runs it)    the jobs database
                   -> Worker -> TrainerProcess -> events, result            <data>/jobs/<id>/
                             -> activate (the hot swap)

The table is the only record of a job's state, and each change of it is one UPDATE that only one can win. A job that was running when the
server ended is claimed by the next start, and the trainer goes on from its checkpoint.
"""

from service.jobs.job import Job, Status
from service.jobs.service import Jobs

__all__ = ["Job", "Jobs", "Status"]
