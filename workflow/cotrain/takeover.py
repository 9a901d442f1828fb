"""One living command for an experiment in a folder: in, names; out, a notice with signs of life.

A command leaves `.snakemake/command-<name>.json` for each of its experiments: who runs it, what its
jobs are called in SLURM's queue, and what it set out to make. The notice is renewed while the
command lives, for those who type another one on another machine, and stays when it has ended.
"""

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cotrain import slurm, workfolder
from cotrain.errors import InputError
from cotrain.files import write_atomically
from cotrain.workfolder import content_of, may_live, owner_here

NOTICES = Path(".snakemake")
SECONDS_TO_DIE = 60
"""For the command of a requeued job's last allocation: twice SLURM's default KillWait."""


def take_over(
    makes: dict[str, list[str]], *, run: str, say: Callable[[str], None]
) -> "SignsOfLife":
    """Take experiments over from a dead command in this folder; return this one's signs of life.

    makes: each experiment's name → the folders in which this command will make files. run: what
    this command's jobs are called in SLURM's queue, or nothing where it submits none. say: called
    with a sentence before jobs are cancelled.

    Jobs that a dead command left in the queue are cancelled: one that starts late would remove what
    was finished without it. Raises InputError where another command for one of the experiments
    lives, and where SLURM does not say which jobs there are.
    """
    notices = {name: content_of(notice_of(name)) for name in makes}
    for name, notice in notices.items():
        if notice is not None and _lives_on(notice):
            raise InputError(_refusal(name, notice))
    submitted = [name for name, notice in notices.items() if notice and notice.get("run")]
    killed = [name for name in submitted if not notices[name].get("ended")]
    if shutil.which("squeue") is None:
        if killed:
            raise InputError(
                f"The command for {killed[0]} that was killed on {notices[killed[0]]['host']} may "
                "have left SLURM jobs, and squeue is not here to tell; type this where it is, or "
                f"remove {notice_of(killed[0])} once no job of this folder is in the queue."
            )
    elif run or submitted:
        try:
            _cancel_jobs_left_behind(notices, say)
        except InputError as error:
            # One that ended by itself has hardly left any: interrupted while SLURM was silent.
            if run or killed:
                raise
            say(str(error))
    return SignsOfLife(makes, run)


def notice_of(name: str) -> Path:
    """Return where the last command for an experiment left its notice."""
    return NOTICES / f"command-{name}.json"


class SignsOfLife:
    """Writes a command's notices, and renews them until the process ends.

    What another command has written since then is left alone.
    """

    def __init__(self, makes: dict[str, list[str]], run: str) -> None:
        self._owner = owner_here()
        self._began = time.time()
        # Absolute, because Snakemake changes back from the folder before the process ends.
        self._told = {
            notice_of(name).absolute(): {**self._owner, "run": run, "sets_out_to_make": folders}
            for name, folders in makes.items()
        }
        self._ended = threading.Event()
        for notice in self._told:
            self._write(notice)
        self._pulse = threading.Thread(target=self._beat, daemon=True)
        self._pulse.start()
        atexit.register(self.end)

    def end(self) -> None:
        """Say that the command has ended, so that nobody waits for its next sign of life."""
        self._ended.set()
        self._pulse.join()
        self._renew()
        atexit.unregister(self.end)

    def _beat(self) -> None:
        while not self._ended.wait(workfolder.HEARTBEAT_SECONDS):
            if not self._renew():
                # It has cancelled this one's jobs, which would be submitted beside its own.
                print("Another command has taken this one for dead; this one ends.", flush=True)
                # Begun in a script's background, a process hears no SIGINT.
                deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                os.kill(os.getpid(), signal.SIGTERM if deaf else signal.SIGINT)
                return

    def _renew(self) -> bool:
        """Write the notices anew; return False where another command has written one since."""
        all_ours = True
        # A network file system that is away for a while must not end the signs of life.
        with contextlib.suppress(OSError):
            for notice in self._told:
                found = content_of(notice)
                if found is None or self._owner.items() <= found.items():
                    self._write(notice)
                else:
                    all_ours = False
        return all_ours

    def _write(self, notice: Path) -> None:
        told = {**self._told[notice], "heartbeat": time.time(), "ended": self._ended.is_set()}
        with write_atomically(notice) as temporary:
            temporary.write_text(json.dumps(told, indent=2) + "\n")
            # `cotrain status` takes the time of change for the command's beginning.
            os.utime(temporary, (self._began, self._began))


def _lives_on(notice: dict) -> bool:
    """Return whether another command lives; wait for that of this job's last allocation to die.

    SLURM may start a requeued job where the process that it has just ended is not gone yet.
    """
    deadline = time.monotonic() + SECONDS_TO_DIE
    while _may_live(notice):
        is_this_job = notice["slurm_job"] != "" and notice["slurm_job"] == slurm.own_job()
        if not is_this_job or time.monotonic() > deadline:
            return True
        time.sleep(0.5)
    return False


def _may_live(notice: dict) -> bool:
    if notice.get("ended"):
        return False
    if notice["slurm_job"]:
        # SLURM knows at once that a job is over, and that this is the same one, requeued onto
        # another node: as if the sign of life were late.
        late = time.time() - workfolder.HEARTBEAT_LATE
        notice = {**notice, "heartbeat": min(notice.get("heartbeat", 0), late)}
    return may_live(notice)


def _refusal(name: str, notice: dict) -> str:
    where, gone = "", ""
    if notice["host"] != socket.gethostname():
        silent = max(0, time.time() - notice.get("heartbeat", 0))
        where = f", {silent:.0f} s after its last sign of life"
        seconds = workfolder.HEARTBEAT_LIFETIME
        gone = f" (if it is surely gone, wait until it was silent for {seconds} s)"
    return (
        f"Another command for {name} runs in this folder (process {notice['pid']} on "
        f"{notice['host']}{where}); wait for its end, or end it and type this again{gone}."
    )


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
