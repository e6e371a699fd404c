"""How long a GPU takes for a call, where one can be asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median

import torch

#: Calls before those that are timed: the first compiles and loads.
WARM_UPS = 3
REPEATS = 10
#: Clocks for which the device is kept busy while calls queue up behind: without them, the time of a
#: short call would be that of its launch, which a captured graph does not have.
HEAD_START = 10_000_000

#: From a call to the milliseconds that it takes.
Timer = Callable[[Callable[[], object]], float]


def timer_of(device: torch.device) -> Timer | None:
    """What times calls on a device; None where it is no GPU or a graph is being captured."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return partial(milliseconds, device)


def milliseconds(device: torch.device, call: Callable[[], object]) -> float:
    """The median of :data:`REPEATS` calls on a GPU, one right after another."""
    with torch.cuda.device(device):
        for _ in range(WARM_UPS):
            call()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
        torch.cuda._sleep(HEAD_START)
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
    return median(begin.elapsed_time(end) for begin, end in pairwise(events))
