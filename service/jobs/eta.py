"""Progress of a whole job and its estimated time to the end, from the progress of its phases."""

import time

_PHASES = ("audit", "features", "select", "train", "calibrate", "evaluate", "publish")
# The share of each phase in a job's time, as a first guess, which measured times correct.
_HEAD = dict(zip(_PHASES, (0.25, 0.5, 0.0, 0.1, 0.03, 0.07, 0.05), strict=True))
_NETWORK = dict(zip(_PHASES, (0.05, 0.02, 0.0, 0.85, 0.02, 0.04, 0.02), strict=True))
_SELECTION = dict(zip(_PHASES, (0.05, 0.0, 0.5, 0.37, 0.02, 0.04, 0.02), strict=True))

Reached = tuple[int, int]  # a trainer's furthest point: the number of the phase, and the last epoch that ended in it


class Eta:
    """The progress of one attempt. It never falls: a resumed attempt shows the last value until it is further."""

    def __init__(self, mode: str, progress: float = 0.0) -> None:
        self._shares = _HEAD if mode in ("head", "auto") else _NETWORK  # auto: a head, until an epoch says otherwise
        self.progress = progress
        self.reached: Reached = (0, 0)
        self.eta_seconds: float | None = None
        self._phase: str | None = None
        self._began = self._entered = time.monotonic()
        self._first = 0.0  # the phase's progress when it was first seen: a resumed run does not begin at 0

    def update(self, phase: str, fraction: float, epoch: int | None = None) -> None:
        """`fraction` of this phase is done, and `epoch` has just ended."""
        now = time.monotonic()
        if phase == "select":
            self._shares = _SELECTION
        elif epoch is not None and self._shares is _HEAD:  # heads have none
            self._shares = _NETWORK
        self.reached = max(self.reached, (self._number(phase), epoch or 0))
        if phase != self._phase:
            self._phase, self._entered, self._first = phase, now, fraction
        before, share, after = self._around(phase)
        done = before + share * fraction
        self.progress = max(self.progress, min(done, 1.0))
        self.eta_seconds = self._rest_of_phase(now, fraction, share, done) + after * self._seconds_per_share(now, done)

    def _around(self, phase: str) -> tuple[float, float, float]:
        """The shares of all phases before this one, of this one, and of those after it."""
        here, shares = self._number(phase), list(self._shares.values())
        return sum(shares[:here]), sum(shares[here : here + 1]), sum(shares[here + 1 :])

    def _number(self, phase: str) -> int:
        names = list(self._shares)
        return names.index(phase) if phase in names else len(names)

    def _rest_of_phase(self, now: float, fraction: float, share: float, done: float) -> float:
        """At the phase's own speed, once a little of it was seen; at the job's until then."""
        if fraction - self._first < 0.02:
            return share * (1 - fraction) * self._seconds_per_share(now, done)
        return (now - self._entered) * (1 - fraction) / (fraction - self._first)

    def _seconds_per_share(self, now: float, done: float) -> float:
        return (now - self._began) / max(done, 0.01)
