"""The working folder of one step: in, what the step's result depends on; out, safe resuming.

It holds a lock, so that one process writes at a time; the step's identity, so that unfinished work
is only gone on with where nothing it depends on has changed; and progress that `cotrain status`
shows. It lies outside Snakemake's declared outputs, which Snakemake deletes when a job fails.
"""

import json
import os
import socket
import time
from pathlib import Path

from cotrain.errors import InputError
from cotrain.files import write_json, write_text

HEARTBEAT_LIFETIME = 600
"""Seconds without a sign of life after which a lock of another machine counts as left behind."""


class WorkFolder:
    """A locked folder for a step's unfinished work; use it as a context manager.

    folder: created where missing. name: one step's name inside it (a shard's number, say).
    identity: everything the result depends on, as JSON; `resumable` is False where the folder
    holds work of another identity, which the caller then throws away.

    Raises InputError on entry where another living process holds the lock.
    """

    def __init__(self, folder: str | Path, identity: dict, *, name: str = "step") -> None:
        self.folder = Path(folder)
        self.identity = identity
        self.name = name
        self.resumable = False
        self._lock = self.folder / f"{name}.lock"
        self._identity_file = self.folder / f"{name}.identity.json"
        self._error_file = self.folder / f"{name}.error.txt"
        self._started = time.time()

    def __enter__(self) -> "WorkFolder":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire()
        self._error_file.unlink(missing_ok=True)
        self.resumable = (
            self._identity_file.is_file()
            and json.loads(self._identity_file.read_text()) == self.identity
        )
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            write_text(f"{type(error).__name__}: {error}\n", self._error_file)
        self._lock.unlink(missing_ok=True)

    def claim(self) -> None:
        """Say that the work in the folder now belongs to this identity."""
        write_json(self.identity, self._identity_file)

    def report(self, done: int, total: int, unit: str, **more: object) -> float:
        """Write progress for `cotrain status` and renew the lock; return seconds left.

        done, total: `unit`s (epochs or cases) finished in this step; the pace is this process's.
        """
        if not hasattr(self, "_first"):
            self._first = done - 1
        pace = (time.time() - self._started) / max(1, done - self._first)
        left = pace * (total - done)
        write_json(
            {
                f"{unit}_done": done,
                unit: total,
                "seconds_left": round(left),
                **more,
                "updated": time.time(),
                "host": socket.gethostname(),
                "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
            },
            self.folder / f"{self.name}.progress.json",
        )
        self._write_lock()
        return left

    def _acquire(self) -> None:
        try:
            # O_EXCL is atomic on local disks and on NFS from version 3 on.
            os.close(os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            owner = self._living_owner()
            if owner:
                raise InputError(
                    f"{self.folder} is being written by {owner}; wait for it to end or cancel it "
                    f"(if it is surely gone, remove {self._lock})."
                ) from None
        self._write_lock()

    def _write_lock(self) -> None:
        write_json(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
                "heartbeat": time.time(),
            },
            self._lock,
        )

    def _living_owner(self) -> str | None:
        """Return who holds the lock, or None where that process is dead or long silent."""
        try:
            owner = json.loads(self._lock.read_text())
        except (json.JSONDecodeError, FileNotFoundError):
            # Killed between creating and filling the lock, or just released.
            return None
        if owner["host"] == socket.gethostname():
            if not Path(f"/proc/{owner['pid']}").exists():
                return None
        elif time.time() - owner["heartbeat"] > HEARTBEAT_LIFETIME:
            return None
        job = f", SLURM job {owner['slurm_job']}" if owner["slurm_job"] else ""
        return f"process {owner['pid']} on {owner['host']}{job}"
