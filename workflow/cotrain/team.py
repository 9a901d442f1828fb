"""Processes that train one network together: in, their number; out, torch's process group.

As in nnU-Net's own DDP the planned batch is divided among them, each on a GPU of the same node, and
torch averages their gradients. On a CPU they share its cores, which is how this is tested. The
first of them is the step itself, which alone writes files; it starts the others and ends them.
"""

import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from cotrain.errors import InputError

SECONDS_TO_END = 60
"""For the others to end by themselves when the first one has trained its last epoch."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this is: `rank` of `size`; 0 is the step itself."""

    rank: int = 0
    size: int = 1

    def share_of(self, batch_size: int) -> range:
        """Return the samples of a batch that this process computes, as many as each other one."""
        own = batch_size // self.size
        return range(self.rank * own, (self.rank + 1) * own)


@contextmanager
def team(size: int, device: str, help_: Callable, *arguments: object) -> Iterator[Place]:
    """Form a group of `size` processes, of which this one is the first; none for a size of 1.

    device: `cuda` or `cpu`. help_: called as `help_(place, *arguments)` in each other process, it
    must take part in the same collective operations as this one. The others are ended on leaving.
    """
    if size == 1:
        yield Place()
        return
    # Not forked: a process that has used CUDA cannot be.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = (device, f"file://{Path(folder, 'store')}")
        others = [
            context.Process(target=_join, args=(Place(rank, size), meeting, help_, arguments))
            for rank in range(1, size)
        ]
        for other in others:
            other.start()
        try:
            _meet(Place(0, size), *meeting)
            yield Place(0, size)
            for other in others:
                other.join(SECONDS_TO_END)
        finally:
            for other in others:
                other.terminate()
                other.join()
            if distributed.is_initialized():
                distributed.destroy_process_group()


def _meet(place: Place, device: str, url: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(place.rank)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=url, rank=place.rank, world_size=place.size)


def _join(place: Place, meeting: tuple[str, str], help_: Callable, arguments: tuple) -> None:
    # Ctrl-C reaches every process of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _meet(place, *meeting)
    try:
        help_(place, *arguments)
    except InputError:
        # The first process meets the same and says it.
        sys.exit(2)
    distributed.destroy_process_group()
