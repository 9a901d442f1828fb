"""Cases side by side: results in order, and a sentence where a process was killed."""

import os
import signal

import pytest

from cotrain.errors import InputError
from cotrain.pool import side_by_side


def square(number: int) -> int:
    return number**2


def killed_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_the_order_of_the_tasks(jobs):
    assert list(side_by_side(square, [3, 1, 2], jobs=jobs)) == [9, 1, 4]


def test_a_process_that_the_system_killed_is_told_of_with_a_remedy():
    with pytest.raises(InputError, match=r"One of 2 .* was killed, .*mem_mb in set-resources"):
        list(side_by_side(killed_at_two, range(4), jobs=2))
