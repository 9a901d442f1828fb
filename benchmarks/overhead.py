"""What the workflow adds to the steps' own time: in, a finished run; out, a printed sentence.

    snakemake --configfile config/demo.yaml --cores 2   # or with --profile slurm
    python benchmarks/overhead.py demo

A step's own time is from the start of its command to its end, as Snakemake's benchmark tables have
it; their files are written at that end. Steps run side by side, so that what counts is the time in
which at least one was at work; the rest of the run's wall time is overhead: Snakemake's own, and on
a cluster the queue, two starts of Snakemake in each job, and the wait until its end is noticed.
"""

import argparse
import re
import statistics
import sys
from datetime import datetime
from pathlib import Path

from cotrain.files import read_table


def covered_seconds(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(intervals):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def main() -> None:
    """Print wall time, own time and overhead of the last run in this folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", help="all that were run by one command")
    parser.add_argument("--folder", type=Path, default=Path(), help="where it was run")
    arguments = parser.parse_args()
    log = max(arguments.folder.glob(".snakemake/log/*.snakemake.log"), key=lambda path: path.name)
    began = datetime.strptime(log.name[:24], "%Y-%m-%dT%H%M%S.%f").timestamp()
    hours, minutes, seconds = map(
        float, re.search(r"Elapsed time: (\d+):(\d+):([\d.]+)", log.read_text()).groups()
    )
    wall = 3600 * hours + 60 * minutes + seconds
    own = []
    tables = [
        table
        for experiment in arguments.experiments
        for table in (arguments.folder / "benchmarks" / experiment).glob("**/*.tsv")
    ]
    for table in tables:
        end = table.stat().st_mtime
        if end >= began:
            own.append((end - float(read_table(table)["s"][0]), end))
    if not own:
        sys.exit(f"{log} is of a run without finished steps of these experiments.")
    covered = covered_seconds(own)
    lasted = [high - low for low, high in own]
    print(
        f"{len(own)} steps, median {statistics.median(lasted):.1f} s, longest {max(lasted):.0f} s. "
        f"Wall time {wall:.0f} s, at least one step at work {covered:.0f} s: overhead "
        f"{wall - covered:.0f} s, {100 * (wall - covered) / wall:.1f} %, "
        f"{(wall - covered) / len(own):.1f} s a step."
    )


if __name__ == "__main__":
    main()
