"""The checks in their order. The most important come first, because the last ones are skipped if time is short."""

from collections.abc import Sequence

from service.diagnostics.gpu_check.runner import GpuCheck

PACKAGE = "service.diagnostics.gpu_check"


def _check(name: str, target: str, expected: str, limit_s: float, least_s: float = 10.0) -> GpuCheck:
    return GpuCheck(name, f"{PACKAGE}.{target}", expected, limit_s, least_s)


CHECKS = (
    _check("facts", "facts:facts", "a GPU that computes, with 4 GB of its memory free", 130),
    _check(
        "transfers",
        "measures.transfers:transfers",
        "pinned and registered memory reach the GPU as fast as ordinary",
        40,
    ),
    _check(
        "head_job",
        "measures.jobs:head_job",
        "a job of mode head succeeds, and its version is deployed and right",
        120,
        30,
    ),
    _check(
        "errors", "errors:errors", "each error counts as what it is: memory, a lost GPU, or the image's own", 90, 20
    ),
    _check(
        "serving",
        "measures.serving:serve",
        "every request of 1, 32 and 256 callers is answered; the rest are figures",
        100,
        30,
    ),
    _check(
        "agreement",
        "measures.agreement:agreement",
        "of six networks float32 and the precision that is chosen agree with float32 on the CPU",
        130,
        40,
    ),
    _check(
        "network_job",
        "measures.jobs:network_job",
        "fine-tuning a whole network twice gives the same weights, with at most 4 waits for the GPU in a step",
        130,
        40,
    ),
    _check(
        "heads",
        "measures.batches:heads",
        "a batch with 100 heads waits for the GPU no more often than one with a single head",
        50,
    ),
    _check(
        "cold_shapes",
        "measures.shapes:cold_shapes",
        "of 45 sizes of a batch at most 16 are slow the first time, and the host's memory grows by 500 MB at most",
        70,
        20,
    ),
    _check(
        "out_of_memory_loading",
        "measures.memory:out_of_memory_loading",
        "a load for which memory is missing says so, leaves nothing behind, and succeeds when there is memory",
        70,
        15,
    ),
    _check(
        "out_of_memory_serving",
        "measures.batches:out_of_memory_serving",
        "every image is answered although the largest batch does not fit",
        60,
        15,
    ),
    _check(
        "swap",
        "measures.serving:swap",
        "swaps under load: every request is answered, memory returns to what it was, measured rates stay the same",
        100,
        30,
    ),
    _check(
        "missing_kernel",
        "errors:missing_kernel",
        "where a kernel of the preferred precision is missing, another precision is chosen",
        40,
        15,
    ),
    _check(
        "batch_invariance",
        "measures.agreement:batch_invariance",
        "an answer does not depend on the size of its batch",
        40,
    ),
    _check(
        "graphs",
        "measures.graphs:graphs",
        "a graph of each batch size is captured while another thread serves, and computes the same",
        60,
        15,
    ),
    _check("beside_python", "measures.graphs:beside_python", "figures only", 50, 15),
    _check("own_tests", "measures.own_tests:own_tests", "the project's tests that need a GPU pass", 120, 30),
)


def selected(names: Sequence[str]) -> list[GpuCheck]:
    """Returns the checks of these names, or all; `facts` is always the first. Raises ValueError for an unknown name."""
    known = [check.name for check in CHECKS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown check {unknown[0]!r}; it is one of {', '.join(known)}")
    return [check for check in CHECKS if not names or check.name in ("facts", *names)]
