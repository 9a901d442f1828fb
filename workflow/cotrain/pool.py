"""Cases done side by side: in, a function and its tasks; out, the results in their order."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from cotrain.errors import InputError


def side_by_side(
    function: Callable, tasks: Sequence, *, jobs: int, chunksize: int = 1
) -> Iterator[object]:
    """Yield `function(task)` of each task, computed by so many other processes.

    Raises InputError where a process was killed, for which the system's lack of memory is the usual
    reason, and what `function` raises.
    """
    try:
        with ProcessPoolExecutor(jobs) as pool:
            yield from pool.map(function, tasks, chunksize=chunksize)
    except BrokenProcessPool:
        raise InputError(
            f"One of {jobs} processes that each hold a case was killed, most likely because memory "
            "ran out; give more (mem_mb in set-resources), or fewer processes (--jobs, --threads, "
            "or set-threads in a profile)."
        ) from None
