"""Processes that train one network together: in, their number; out, torch's process group.

As in nnU-Net's own DDP the planned batch is divided among them, each on a GPU of the same node, and
torch averages their gradients. On a CPU they share its cores, which is how this is tested. The
first of them is the step itself, which alone writes files; it starts the others and ends them, and
none outlives another.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import distributed

from cotrain.device import make_current
from cotrain.errors import InputError

SECONDS_TO_END = 60
"""For the others to end by themselves when all have trained the last epoch."""
SECONDS_FOR_THE_SAME = 30
"""For the first process to meet the error that another one met, and to say it."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this is: `rank` of `size`, on its `device`; 0 is the step itself.

    device: None where whoever trains may choose.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def share_of(self, batch_size: int) -> range:
        """Return the samples of a batch that this process computes, as many as each other one.

        Raises ValueError where the batch cannot be divided, which the settings rule out.
        """
        own, rest = divmod(batch_size, self.size)
        if rest:
            raise ValueError(f"a batch of {batch_size} cannot be divided among {self.size}")
        return range(self.rank * own, (self.rank + 1) * own)


@contextmanager
def team(devices: list[torch.device], help_: Callable, *arguments: object) -> Iterator[Place]:
    """Form a group of a process for each device, of which this one is the first; none for one.

    help_: called as `help_(place, *arguments)` in each other process, it must take part in the same
    collective operations as this one. The others are ended on leaving; should one die before, this
    process dies at once, because it would wait for it for long.
    """
    places = [Place(rank, len(devices), device) for rank, device in enumerate(devices)]
    if len(places) == 1:
        yield places[0]
        return
    # Not forked: a process that has used CUDA cannot be.
    context = multiprocessing.get_context("spawn")
    leaving = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        url = f"file://{Path(folder, 'store')}"
        others = [
            context.Process(target=_join, args=(place, url, help_, arguments))
            for place in places[1:]
        ]
        try:
            for other in others:
                other.start()
            threading.Thread(target=_die_with, args=(others, leaving), daemon=True).start()
            _meet(places[0], url)
            yield places[0]
            leaving.set()
            # All at once, and only while all live: NCCL's end is a collective operation, too.
            distributed.destroy_process_group()
            for other in others:
                other.join(SECONDS_TO_END)
        finally:
            leaving.set()
            for other in others:
                if other.pid is not None:
                    other.kill()
                    other.join()


def _die_with(others: list[multiprocessing.Process], leaving: threading.Event) -> None:
    """End this process when another one has failed; it may wait in C++, deaf to any signal."""
    living = {other.sentinel: other for other in others}
    while living:
        for sentinel in wait(list(living)):
            ended = living.pop(sentinel)
            ended.join()
            if ended.exitcode and not leaving.is_set():
                print(
                    f"A process that trains along ended with {ended.exitcode}, and so does this "
                    "one; what it said is above. The last epoch's checkpoint is whole.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def _meet(place: Place, url: str) -> None:
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        make_current(place.device)
    backend = "nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, init_method=url, rank=place.rank, world_size=place.size)


def _join(place: Place, url: str, help_: Callable, arguments: tuple) -> None:
    # Ctrl-C reaches every process of a terminal, and scancel every process of a job. The first one
    # releases its lock and kills the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _wait_for_the_first)
    threading.Thread(target=_die_with_the_first, daemon=True).start()
    try:
        _meet(place, url)
        help_(place, *arguments)
    except InputError as error:
        # The first process, too, meets what is wrong for all, says it and ends this one.
        time.sleep(SECONDS_FOR_THE_SAME)
        sys.exit(f"process {place.rank} of {place.size}: {error}")
    distributed.destroy_process_group()


def _wait_for_the_first(number: int, frame: object) -> None:
    # torch would raise an error for the processes that make batches, which the signal has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _die_with_the_first() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
