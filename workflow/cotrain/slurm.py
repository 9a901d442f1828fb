"""What SLURM says about jobs: in, a job's number; out, its state, and when this one ends.

Asked through its own commands, which are on the path of every job. Outside SLURM, or where it does
not answer, there is no answer, and the caller does without, unless the function says otherwise.
"""

import math
import os
import subprocess
import time
from collections.abc import Collection

from cotrain.errors import InputError

MAY_STILL_WRITE = {
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
}
"""States of a job whose processes may be alive; a pending one was requeued after it had ended."""
ASLEEP = {"STOPPED", "SUSPENDED"}
"""States in which a living process gives no sign of life."""
SECONDS_TO_ANSWER = 60
"""A busy controller may take as long."""
SECONDS_BETWEEN_TRIES = 10
"""Pause before a question is asked again whose answer cannot be done without."""
OURS = ("rule_", "group_", "cotrain")
"""What the comment of a job begins with that may be requeued: Snakemake's, or one that says so."""


def own_job() -> str:
    """Return the number of the job that this process runs in, or nothing.

    A task of an array is `array_task`: its SLURM_JOB_ID may be that of the whole array.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}") for part in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def own_cluster() -> str:
    """Return the name of the cluster that this process runs on, or nothing."""
    return os.environ.get("SLURM_CLUSTER_NAME", "")


def own_node() -> str:
    """Return the node's name in SLURM, which need not be the host's, or nothing."""
    return os.environ.get("SLURMD_NODENAME", "")


def state_of(job: str) -> str | None:
    """Return a job's state by SLURM's account, FORGOTTEN minutes after its end; None: no answer."""
    code, words = _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    if code == 0:
        return words or None
    return "FORGOTTEN" if code is not None and "Invalid job id" in words else None


def own_end() -> float | None:
    """Return when this job's time limit comes, as Unix time; math.inf: never; None: no answer.

    Never also outside a job, and where it was not made for this workflow: an interactive session,
    say, that must not be put back into the queue.
    """
    if not own_job():
        return math.inf
    code, words = _ask("squeue", "--noheader", f"--jobs={own_job()}", "--format=%L|%k")
    if code != 0 or not words:
        return None
    left, _, comment = words.partition("|")
    if not comment.startswith(OURS) or seconds_of(left) is None:
        return math.inf
    return time.time() + seconds_of(left)


def requeue_own_job() -> str | None:
    """Put this job back into the queue, which ends it; return SLURM's words where it refuses."""
    code, words = _ask("scontrol", "requeue", own_job())
    return None if code == 0 else words or "scontrol did not answer"


def answers() -> bool:
    """Return whether SLURM says which jobs this user has, as it does not while it starts anew."""
    return _ask("squeue", "--me", "--noheader")[0] == 0


def jobs_left_behind(
    folder: str, experiments: list[str], *, runs_of_others: Collection[str] = ()
) -> list[str]:
    """Return the user's jobs in the queue that a command in this folder submitted for experiments.

    Known by what the executor plugin writes into the comment: the rule and its wildcards, of which
    the experiment is the first. As one experiment's name may begin with another's, jobs are left
    out that are called as those of commands for others. Raises InputError without an answer.
    """
    for pause in (SECONDS_BETWEEN_TRIES, 0):
        code, words = _ask("squeue", "--me", "--noheader", "--format=%i|%j|%k|%Z")
        if code == 0:
            break
        time.sleep(pause)
    else:
        raise InputError(
            "squeue did not say which jobs an earlier command left in this folder "
            f"({words or f'no answer in {SECONDS_TO_ANSWER} s'}), and one that starts late would "
            "remove what was finished without it; type this again when `squeue --me` answers."
        )
    jobs = []
    for line in words.splitlines():
        job, run, comment, where = line.split("|", 3)
        wildcards = comment.partition("_wildcards_")[2] + "_"
        is_ours = any(wildcards.startswith(f"{name}_") for name in experiments)
        if where == folder and is_ours and run not in runs_of_others:
            jobs.append(job)
    return jobs


def cancel(jobs: list[str]) -> str | None:
    """Cancel jobs and wait until they are gone; return what is wrong where they stay."""
    code, words = _ask("scancel", *jobs)
    deadline = time.monotonic() + 3 * SECONDS_TO_ANSWER
    while code == 0 and time.monotonic() < deadline:
        if not any(state_of(job) in {*MAY_STILL_WRITE, "PENDING"} for job in jobs):
            return None
        time.sleep(1)
    return words or "they do not end"


def cancel_run(run: str) -> str | None:
    """Cancel all jobs of a command, by what they are called; return what is wrong with that."""
    code, words = _ask("scancel", f"--name={run}")
    return None if code == 0 else words or "scancel did not answer"


def seconds_of(duration: str) -> int | None:
    """Return the seconds of SLURM's `days-hours:minutes:seconds`; None where it is no duration."""
    days, dash, clock = duration.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or (dash and not days.isdigit()):
        return None
    hours, minutes, seconds = [0, 0, 0, *map(int, parts)][-3:]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _ask(*words: str) -> tuple[int | None, str]:
    """Return the exit code and the words of a SLURM command; None: it is not there or hangs."""
    try:
        done = subprocess.run(
            words,
            # Defaults of the user's own, such as SQUEUE_PARTITION, would hide jobs; with
            # SLURM_CLUSTERS the answer would begin with a line on the cluster.
            env={
                name: value
                for name, value in os.environ.items()
                if name[:7] != "SQUEUE_" and name != "SLURM_CLUSTERS"
            },
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_ANSWER,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None, ""
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).strip()
