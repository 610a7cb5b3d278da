"""The open-files limit of this process: raised at start, and divided between connections and everything else."""

import logging
import resource

log = logging.getLogger(__name__)

RESERVE = 256  # files for models, jobs, uploads, pipes and the database, which connections never take
BACKLOG = 2048  # connections that the kernel holds until they are accepted; all may be accepted at once


def raise_limit() -> int:
    """Raises the soft limit to the hard one. Returns the number of files that this process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # macOS has a further limit below the hard one
            log.warning("the open-files limit stays at %d: %s", soft, error)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**31 if limit == resource.RLIM_INFINITY else limit


def connections_within(limit: int, wanted: int) -> tuple[int, int]:
    """Returns the connections and the backlog that an open-files limit allows, at most `wanted` and BACKLOG."""
    reserve = min(RESERVE, limit // 2)
    connections = max(1, min(wanted, limit - reserve))
    if connections < wanted:
        log.warning(
            "at most %d connections instead of %d: the open-files limit is %d; raise it with `ulimit -n`, "
            "`LimitNOFILE=` or `--ulimit nofile=`",
            connections,
            wanted,
            limit,
        )
    return connections, max(1, min(BACKLOG, (limit - connections) // 2))
