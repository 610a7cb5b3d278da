"""Fine-tuning jobs: durable, one at a time, each in a trainer process of its own.

    routes -> Jobs -> JobTable (what the API says of a job)            the jobs database
                   -> Queue (DBOS: whose turn it is; recovery)         the same database
                        -> Worker -> TrainerProcess -> events, result  <data>/jobs/<id>/
                                  -> activate (the hot swap)

The table alone says how a job stands, and each change of status is one UPDATE that only one can win. A job that was running when
the server ended is run again by the next start, and the trainer goes on from its checkpoint.
"""

from service.jobs.job import Job, Status
from service.jobs.jobs import Jobs

__all__ = ["Job", "Jobs", "Status"]
