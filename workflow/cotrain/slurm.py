"""What SLURM says about jobs: in, a job's number; out, whether it is over, and when this one ends.

Asked through its own commands, which are on the path of every job. Outside SLURM, or where it does
not answer, there is no answer, and the caller does without.
"""

import os
import subprocess
import time

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
SECONDS_TO_ANSWER = 60
"""A busy controller may take as long."""


def own_job() -> str:
    """Return the number of the job that this process runs in, or nothing."""
    return os.environ.get("SLURM_JOB_ID", "")


def own_node() -> str:
    """Return the node's name in SLURM, which need not be the host's, or nothing."""
    return os.environ.get("SLURMD_NODENAME", "")


def is_over(job: str) -> bool | None:
    """Return whether no process of a job can be alive by SLURM's own account; None: no answer."""
    if job == own_job():
        # A job runs once at a time, so what else carries its number is from before a requeue.
        return True
    code, state = _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    if code is None:
        return None
    if code:
        # Forgotten some minutes after its end. Other errors are no answer.
        return True if "Invalid job id" in state else None
    return state not in MAY_STILL_WRITE


def own_end() -> float | None:
    """Return when this job's time limit comes, as Unix time; None without a limit or an answer."""
    if not own_job():
        return None
    code, left = _ask("squeue", "--noheader", f"--jobs={own_job()}", "--format=%L")
    return time.time() + seconds_of(left) if code == 0 and seconds_of(left) is not None else None


def requeue_own_job() -> str | None:
    """Put this job back into the queue, which ends it; return SLURM's words where it refuses."""
    code, words = _ask("scontrol", "requeue", own_job())
    return None if code == 0 else words or "scontrol did not answer"


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
            words, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None, ""
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).strip()
