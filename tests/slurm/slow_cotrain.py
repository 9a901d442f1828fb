"""The real `cotrain` command, whose epochs and cases last: in, its words; out, what it does.

Jobs of the test cluster get it instead of the installed command. After each epoch or case it waits
for as long as SECONDS_MORE says, so that a fault strikes in the middle of the work and a time limit
is met as often as a test wants, however fast the machine. What is computed is the same.
"""

import os
import sys
import time

from cotrain.__main__ import main
from cotrain.workfolder import WorkFolder

report = WorkFolder.report


def report_later(self: WorkFolder, *words: object, **more: object) -> float:
    """Wait, then report the finished epoch or case."""
    time.sleep(float(os.environ.get("SECONDS_MORE", "0")))
    return report(self, *words, **more)


if __name__ == "__main__":
    WorkFolder.report = report_later
    sys.exit(main())
