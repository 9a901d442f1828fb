"""One living command for an experiment in a folder: in, names; out, a notice of who runs it.

A command leaves `.snakemake/command-<name>.json` for each of its experiments: who runs it, what its
jobs are called in SLURM's queue, and what it set out to make.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from cotrain import slurm
from cotrain.errors import InputError
from cotrain.files import write_json
from cotrain.workfolder import content_of, may_live, owner_here

NOTICES = Path(".snakemake")


def take_over(makes: dict[str, list[str]], *, run: str, say: Callable[[str], None]) -> None:
    """Take experiments over from a dead command in this folder.

    makes: each experiment's name → the folders in which this command will make files. run: what
    this command's jobs are called in SLURM's queue, or nothing where it submits none. say: called
    with a sentence before jobs are cancelled.

    Jobs that a dead command left in the queue are cancelled: one that starts late would remove what
    was finished without it. Raises InputError where another command for one of the experiments
    lives on this machine.
    """
    notices = {name: content_of(notice_of(name)) for name in makes}
    for name, notice in notices.items():
        if notice is not None and notice["host"] == socket.gethostname() and may_live(notice):
            raise InputError(
                f"Another command for {name} runs in this folder (process {notice['pid']} on "
                f"{notice['host']}); wait for its end, or end it and type this again."
            )
    if run:
        _cancel_jobs_left_behind(notices, say)
    for name, folders in makes.items():
        write_json({**owner_here(), "run": run, "sets_out_to_make": folders}, notice_of(name))


def notice_of(name: str) -> Path:
    """Return where the last command for an experiment left its notice."""
    return NOTICES / f"command-{name}.json"


def _cancel_jobs_left_behind(notices: dict[str, dict | None], say: Callable[[str], None]) -> None:
    jobs = slurm.jobs_left_behind(
        os.getcwd(), list(notices), runs_of_others=_runs_of_others(notices)
    )
    if not jobs:
        return
    say(
        f"Cancelling SLURM jobs {', '.join(jobs)}, which an earlier command in this folder left "
        "behind; unfinished work goes on from its last epoch or case."
    )
    trouble = slurm.cancel(jobs)
    if trouble:
        raise InputError(
            f"The SLURM jobs {' '.join(jobs)} of an earlier command could not be cancelled "
            f"({trouble}); cancel them, then type this again."
        )


def _runs_of_others(notices: dict[str, dict | None]) -> set[str]:
    """Return what the jobs of commands for other experiments in this folder are called."""
    found = {path: content_of(path) for path in NOTICES.glob("command-*.json")}
    ours = {notice_of(name) for name in notices}
    return {
        notice["run"]
        for path, notice in found.items()
        if path not in ours and notice is not None and notice.get("run")
    } - {notice.get("run") for notice in notices.values() if notice is not None}
