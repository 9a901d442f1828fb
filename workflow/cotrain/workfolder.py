"""The working folder of one step: in, what the step's result depends on; out, safe resuming.

It holds a lock, so that one process writes at a time; the step's identity, so that unfinished work
is only gone on with where nothing it depends on has changed; and progress that `cotrain status`
shows. It lies outside Snakemake's declared outputs, which Snakemake deletes when a job fails.
"""

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cotrain import slurm
from cotrain.errors import InputError
from cotrain.files import unique_prefix, write_json, write_text
from cotrain.provenance import cpu_seconds

HEARTBEAT_SECONDS = 60
"""Seconds between two signs of life in a lock."""
HEARTBEAT_LATE = 120
"""Seconds without a sign of life after which SLURM is asked about a lock of another machine."""
HEARTBEAT_LIFETIME = 600
"""Seconds without a sign of life after which a lock of another machine counts as left behind."""
SECONDS_BETWEEN_LIMITS = 600
"""Seconds after which a job asks again when it ends, because limits are changed."""
POLL_SECONDS = 15
"""Seconds between two looks at a lock that another job or machine holds."""
SETTLING_SECONDS = 1
"""Seconds in which two processes that start at once see each other's lock."""
SECONDS_TO_LEAVE = 20
"""Seconds before a time limit in which no epoch or case is begun."""
TRY_AGAIN_LATER = 75
"""Exit code of a step that is not finished and not broken (EX_TEMPFAIL of sysexits.h)."""


class WorkFolder:
    """A locked folder for a step's unfinished work; use it as a context manager.

    folder: created where missing. name: one step's name inside it (a shard's number, say).
    identity: everything the result depends on, as JSON; `resumable` is False where the folder
    holds work of another identity, which the caller then throws away. `cpu_seconds_before`, known
    once the work is claimed, is the processor time of the processes that it goes on from.

    In a SLURM job that will meet its time limit within the next epoch or case, `report` puts the
    job back into the queue: it goes on in its next allocation, and none of the retries that are
    meant for failures is spent.

    SIGTERM and SIGUSR1, which a cluster may send at a time limit, end the process inside the block
    at once, and release the lock, so that the step can go on in another place without waiting.

    Waits on entry while another SLURM job or a process on another machine holds the lock; raises
    InputError where another living process of this machine does.
    """

    def __init__(self, folder: str | Path, identity: dict, *, name: str = "step") -> None:
        self.folder = Path(folder)
        self.identity = identity
        self.name = name
        self.resumable = False
        self._begun_elsewhere: dict | None = None
        self.cpu_seconds_before = 0.0
        self._seconds_before = 0.0
        self._lock = self.folder / f"{name}.lock"
        self._identity_file = self.folder / f"{name}.identity.json"
        self._error_file = self.folder / f"{name}.error.txt"
        self._progress_file = self.folder / f"{name}.progress.json"
        self._owner = owner_here()
        self._starts_file = self.folder / f"{name}.starts.tsv"
        self._ends = slurm.own_end()
        self._started = time.time()
        self._done_before = 0
        self._last_report = self._started
        self._longest = 0.0
        self._leaving = False
        self._judged: dict | None = None
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "WorkFolder":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handlers = {
            number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            self._acquire()
        except BaseException:
            self._restore_signals()
            raise
        # An epoch or a case may take longer than a lock of another machine is believed.
        self._pulse.start()
        self._error_file.unlink(missing_ok=True)
        self.resumable = self._is_of_this_identity()
        self._say_when_the_job_ends()
        return self

    def _say_when_the_job_ends(self) -> None:
        job = self._owner["slurm_job"]
        if self._ends is None:
            print(
                f"SLURM did not say when job {job} ends; it is asked again, and until it answers "
                "the step may run into the time limit.",
                flush=True,
            )
        elif self._ends < math.inf:
            ends = datetime.fromtimestamp(self._ends)
            print(f"SLURM job {job} ends at {ends:%Y-%m-%d %H:%M:%S}.", flush=True)

    def _is_of_this_identity(self) -> bool:
        if not self._identity_file.is_file():
            return False
        found = json.loads(self._identity_file.read_text())
        if found == self.identity:
            return True
        changed = {key for key in self.identity if found.get(key) != self.identity[key]}
        if found.keys() == self.identity.keys() and changed <= {"device", "precision"}:
            self._begun_elsewhere = found
            return True
        return False

    def __exit__(self, kind, error, trace) -> None:
        self._ended.set()
        self._pulse.join()
        self._restore_signals()
        if self._is_ours():
            if isinstance(error, Exception):
                # Not where a full quota is the error: the lock must go all the same.
                with contextlib.suppress(OSError):
                    write_text(f"{type(error).__name__}: {error}\n", self._error_file)
            self._lock.unlink()
        if self._leaving:
            # Last, because SLURM ends this process at once, and a lock would be left behind.
            _requeue()

    def claim(self, *, done: int, total: int) -> None:
        """Say that the work in the folder belongs to this identity, and that so much is done.

        done: finished epochs or cases, of `total`, that this process goes on from. Each process
        adds a line to `<name>.starts.tsv`: as many lines, as many allocations worked on the step.

        Raises InputError where unfinished work was begun on another device or in another number
        format, which this process would go on with to other bits.
        """
        if self._begun_elsewhere and 0 < done < total:
            begun, here = (
                " ".join(identity.get(key, "") for key in ("device", "precision")).strip()
                for identity in (self._begun_elsewhere, self.identity)
            )
            raise InputError(
                f"The unfinished work in {self.folder} was done with {begun}, but this process "
                f"would go on with {here}; ask for the same kind of node (a constraint, or "
                "compute.device and compute.precision), or remove that folder to begin again."
            )
        if not self.resumable:
            for left_over in (self._starts_file, self._progress_file):
                left_over.unlink(missing_ok=True)
        before = content_of(self._progress_file) or {}
        self.cpu_seconds_before = before.get("cpu_seconds", 0.0)
        self._seconds_before = before.get("seconds", 0.0)
        # Where all is finished, a repeat computes nothing, and it stays what it is.
        stays = self._begun_elsewhere if done == total else None
        write_json(stays or self.identity, self._identity_file)
        is_new = not self._starts_file.exists()
        with open(self._starts_file, "a") as table:
            if is_new:
                table.write("began\thost\tpid\tslurm_job\tdone\n")
            owner = self._owner
            began = datetime.fromtimestamp(self._started).isoformat(timespec="seconds")
            table.write(f"{began}\t{owner['host']}\t{owner['pid']}\t{owner['slurm_job']}\t{done}\n")
        self._done_before = done

    def insist(self) -> None:
        """Raise InputError where another process has taken the folder over.

        It may after this one was suspended for long; to be called before anything is written.
        """
        if not self._is_ours():
            raise InputError(
                f"{self.folder} was taken over by {self._living_owner() or 'another process'}, so "
                "this one stops; wait for the other to end."
            )

    def report(
        self,
        done: int,
        total: int,
        unit: str,
        *,
        before_leaving: Callable[[], object] = lambda: None,
    ) -> float:
        """Write progress for `cotrain status` and return seconds left.

        done, total: `unit`s (epochs or cases) finished in this step; the pace is this process's.
        before_leaving: saves what is not saved yet.
        Raises InputError as `insist` does, and SystemExit where the next epoch or case would not
        be finished before the job's time limit.
        """
        self.insist()
        now = time.time()
        # The first one also started the process; the second one is a better measure.
        self._longest = max(self._longest, now - self._last_report)
        self._last_report = now
        pace = (now - self._started) / max(1, done - self._done_before)
        left = pace * (total - done)
        write_json(
            {
                f"{unit}_done": done,
                unit: total,
                "seconds_left": round(left),
                "updated": now,
                "seconds": round(self._seconds_before + now - self._started, 1),
                "cpu_seconds": round(self.cpu_seconds_before + cpu_seconds(), 1),
            },
            self._progress_file,
        )
        if done < total and self._time_is_up():
            before_leaving()
            self._leaving = True
            print(
                f"\nThe time limit of SLURM job {self._owner['slurm_job']} is near: {done} of "
                f"{total} {unit} are done, the next allocation goes on from there.",
                flush=True,
            )
            raise SystemExit(TRY_AGAIN_LATER)
        return left

    def _time_is_up(self) -> bool:
        """Return whether the next epoch or case might run into the job's time limit."""
        needed = 1.5 * self._longest + SECONDS_TO_LEAVE
        return self._ends is not None and time.time() + needed > self._ends

    def _restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _acquire(self) -> None:
        while True:
            try:
                # O_EXCL is atomic on local disks and on NFS from version 3 on.
                descriptor = os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._wait_or_clear()
            else:
                with open(descriptor, "w") as lock:
                    lock.write(json.dumps(self._lock_content()))
                return

    def _wait_or_clear(self) -> None:
        """Return when there is no lock any more; raise InputError where it is a living process's.

        A lock left behind is moved away in one step, so that of several processes that find it one
        clears it; one that is not the lock that was judged is put back.
        """
        owner = self._wait_for_others()
        if owner is not None:
            raise InputError(
                f"{self.folder} is being written by {owner}; wait for it to end or cancel it "
                f"(if it is surely gone, remove {self._lock})."
            )
        judged = self._judged
        grave = self._lock.with_name(unique_prefix() + self._lock.name)
        try:
            os.rename(self._lock, grave)
        except FileNotFoundError:
            return
        if _owner_in(content_of(grave)) != _owner_in(judged):
            with contextlib.suppress(FileExistsError):
                os.link(grave, self._lock)
        grave.unlink()

    def _wait_for_others(self) -> str | None:
        """Return the living owner that is not worth waiting for; wait for any other.

        Two processes of one machine are a mistake that somebody sees at once. A SLURM job may find
        that of a dead controller still at work; and a job that was started again on another node
        than the one it died on cannot ask whether its forerunner still lives.
        """
        owner, told = self._living_owner(), False
        while owner is not None and self._is_elsewhere():
            if not told:
                print(
                    f"Waiting for {owner} to release {self._lock} or to be silent for "
                    f"{HEARTBEAT_LIFETIME} s.",
                    flush=True,
                )
                told = True
            if self._time_is_up():
                print("The time limit is near, so that this job goes on waiting in the next one.")
                _requeue()
                raise SystemExit(TRY_AGAIN_LATER)
            time.sleep(POLL_SECONDS)
            owner = self._living_owner()
        return owner

    def _is_elsewhere(self) -> bool:
        """Return whether the lock is held by another machine or another SLURM job."""
        lock, ours = self._read_lock() or self._owner, self._owner
        return lock["host"] != ours["host"] or "" != ours["slurm_job"] != lock["slurm_job"] != ""

    def _write_lock(self) -> None:
        write_json(self._lock_content(), self._lock)

    def _lock_content(self) -> dict:
        return {
            **self._owner,
            "node": slurm.own_node() or self._owner["host"],
            "ends": None if self._ends == math.inf else self._ends,
            "heartbeat": time.time(),
        }

    def _beat(self) -> None:
        asked = time.monotonic()
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # A network file system that is away for a while must not end the signs of life.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    self._write_lock()
            if self._ends is None or (
                self._owner["slurm_job"] and time.monotonic() - asked > SECONDS_BETWEEN_LIMITS
            ):
                asked = time.monotonic()
                self._ask_again_when_the_job_ends()

    def _ask_again_when_the_job_ends(self) -> None:
        before, ends = self._ends, slurm.own_end()
        if ends is not None:
            self._ends = ends
            if before is None:
                self._say_when_the_job_ends()

    def _read_lock(self) -> dict | None:
        return content_of(self._lock)

    def _is_ours(self) -> bool:
        lock = self._read_lock()
        return lock is not None and self._owner.items() <= lock.items()

    def _living_owner(self) -> str | None:
        """Return who holds the lock, or None where that process is dead or long silent."""
        owner = self._read_lock()
        if owner is None:
            # Between making the lock and filling it; or killed there, or just released.
            time.sleep(SETTLING_SECONDS)
            owner = self._read_lock()
        self._judged = owner
        if owner is None or not may_live(owner):
            return None
        job = f", SLURM job {owner['slurm_job']}" if owner["slurm_job"] else ""
        return f"process {owner['pid']} on {owner['host']}{job}"


def owner_here() -> dict:
    """Return what tells this process from every other, on any machine and at any time."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "slurm_job": slurm.own_job(),
        "cluster": slurm.own_cluster(),
    }


def may_live(owner: dict) -> bool:
    """Return whether the process may be alive that wrote a lock with this content.

    Certain on its own machine. Elsewhere it is alive while its heartbeat is fresh; once that is
    late, it is dead where SLURM says so of its job, alive where SLURM says that the job is
    suspended, and else dead when it was silent for HEARTBEAT_LIFETIME.
    """
    if owner["host"] == socket.gethostname():
        # Process numbers are used again, above all in containers, their birth is not.
        return owner["born"] is not None and owner["born"] == _born(owner["pid"])
    silent_seconds = time.time() - owner.get("heartbeat", 0)
    if silent_seconds < HEARTBEAT_LATE:
        return True
    if owner["slurm_job"] and owner["cluster"] == slurm.own_cluster():
        if owner["slurm_job"] == slurm.own_job():
            # A job runs once at a time: this is from before it was requeued.
            return False
        state = slurm.state_of(owner["slurm_job"])
        if state in slurm.ASLEEP:
            return True
        if state is not None and state not in slurm.MAY_STILL_WRITE:
            return False
    return silent_seconds < HEARTBEAT_LIFETIME


def _owner_in(content: dict | None) -> tuple:
    """Return what does not change while a lock is held."""
    return tuple((content or {}).get(key) for key in ("host", "pid", "born", "slurm_job"))


def content_of(lock: Path) -> dict | None:
    """Return what a lock or a notice holds; None where it is not there or not whole."""
    try:
        return json.loads(lock.read_text())
    except (json.JSONDecodeError, FileNotFoundError):
        return None


def _born(pid: int) -> str | None:
    """Return when a living process of this machine started, in ticks since boot; None if dead."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else numbers[18]


def _stop(number: int, frame: object) -> None:
    # The processes that make batches get the signal, too, and torch raises an error for the first
    # that ends, wherever this one is then: in the middle of releasing its lock.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _requeue() -> None:
    refusal = slurm.requeue_own_job()
    if refusal:
        print(
            f"SLURM did not requeue the job ({refusal}), so that going on costs one of Snakemake's "
            "retries; set `slurm-requeue: true` in the profile or ask for more `runtime`.",
            flush=True,
        )
