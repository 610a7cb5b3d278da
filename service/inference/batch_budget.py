"""How long a batch may take while somebody else waits for the same backbone.

A client that sends few images at a time and shares a backbone with a flood waits for the batch under way and then for its
own. So while there is such a client, the batches of the flood are cut to the time of about one forward pass, and none of its
images joins the batch of the other. All other traffic has full batches: one client alone, many that send a little each,
and several that each send more than a short batch.
"""

from service.inference.items import Flow

SHORT_S = 0.005  # a batch this short is never cut
SINGLES = 1.5  # times that a single image takes: the longest short batch where that is more
QUIET_S = 2.0  # so long after its last image a quiet client is still expected
MEMORY = 0.8  # weight of the past in the measured times


class BatchBudget:
    """Of one backbone. Under the batcher's lock, but for `computed`, which a device's thread calls."""

    def __init__(self) -> None:
        self._single_s = 0.0  # of a pass with one image; 0: not measured
        self._rate = 0.0  # images a second of compute
        self._room = 1  # for images of a flood, in the batch that is cut
        self._quiet: Flow | None = None
        self._quiet_until = 0.0
        self._earlier: Flow | None = None  # the quiet flow before, so that one flow alone never counts as two
        self._earlier_until = 0.0

    def computed(self, images: int, seconds: float) -> None:
        """Notes what a forward pass took."""
        seconds = max(seconds, 1e-6)
        self._rate = _mixed(self._rate, images / seconds)
        if images == 1:
            self._single_s = min(seconds, _mixed(self._single_s, seconds))

    @property
    def short(self) -> int:
        """Returns how many images make a short batch."""
        return max(1, int(self._rate * max(SHORT_S, SINGLES * self._single_s)))

    def admits(self, flow: Flow, most: int, images: int, now: float) -> bool:
        """Returns whether the next image joins a batch of `images`. `most`: the most images of its flow that have waited together."""
        quiet = most <= 1 or most <= self.short
        if images == 0:
            self._room = int(self._rate * SHORT_S) if quiet else self.short
        if quiet:
            self._note(flow, now)
        return quiet or images == 0 or images < self._room or not self._expects_other(flow, now)

    def _note(self, flow: Flow, now: float) -> None:
        if flow != self._quiet:
            self._earlier, self._earlier_until = self._quiet, self._quiet_until
            self._quiet = flow
        self._quiet_until = now + QUIET_S

    def _expects_other(self, flow: Flow, now: float) -> bool:
        """Returns whether a quiet flow other than `flow` was served lately."""
        if flow != self._quiet:
            return now < self._quiet_until
        return now < self._earlier_until


def _mixed(past: float, new: float) -> float:
    return MEMORY * past + (1 - MEMORY) * new if past else new
