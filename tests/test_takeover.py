"""A command beside another: refused where that one lives, and taking it over where it is dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cotrain import slurm, workfolder
from cotrain.errors import InputError
from cotrain.takeover import notice_of, take_over
from cotrain.workfolder import HEARTBEAT_LIFETIME

COMMAND = """
import sys, time
from cotrain.takeover import take_over
take_over({"heart": ["results/heart/model"]}, run=sys.argv[1], say=print)
print("working", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Change into an empty folder, with nothing but what a test puts there on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(slurm, "SECONDS_BETWEEN_TRIES", 0)
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def queue(folder):
    """Return a function that puts jobs into a queue: rule and wildcards of each, and its run.

    state: what it says of any job that it is asked about. `scancel` notes what it is to cancel.
    """

    def program(name: str, script: str) -> None:
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)

    def fill(*jobs: tuple[str, str], state: str = "CANCELLED") -> None:
        lines = [
            f"{number}|{run}|rule_{comment}|{folder}"
            for number, (comment, run) in enumerate(jobs, start=1)
        ]
        (folder / "queue").write_text("\n".join([*lines, ""]))
        program(
            "squeue",
            f'case "$*" in *--jobs=*) echo {state}; exit;; esac\n'
            f'while read -r line; do echo "$line"; done < {folder}/queue',
        )
        program("scancel", f'echo "$*" >> {folder}/cancelled')

    return fill


def cancelled(folder: Path) -> list[str]:
    """Return the numbers of the jobs that were cancelled."""
    path = folder / "cancelled"
    return path.read_text().split() if path.is_file() else []


def leave_notice(name: str, **changes: object) -> None:
    """Leave the notice of a command that was killed on another machine long ago."""
    owner = {"host": "login1", "pid": 7, "born": "1", "slurm_job": "", "cluster": ""}
    notice = owner | {"run": "", "heartbeat": time.time() - 9999, "ended": False} | changes
    notice_of(name).parent.mkdir(exist_ok=True)
    notice_of(name).write_text(json.dumps(notice))


def start(*names: str, run: str = "") -> None:
    """Take the experiments over and end at once."""
    take_over({name: [] for name in names}, run=run, say=print).end()


def test_jobs_of_a_living_command_for_a_name_that_goes_on_are_left_alone(folder, queue):
    leave_notice("heart_2", run="theirs", heartbeat=time.time())
    queue(
        ("train_wildcards_heart_2_cotrain_00_2d", "theirs"),
        ("train_wildcards_heart_cotrain_00_2d", "of a dead command"),
        ("plan_wildcards_heart", "of a dead command"),
        ("train_wildcards_liver_cotrain_00_2d", "of another"),
    )
    start("heart", run="ours")
    assert cancelled(folder) == ["2", "3"]
    assert json.loads(notice_of("heart").read_text())["run"] == "ours"


def test_jobs_are_known_without_the_notice_of_who_submitted_them(folder, queue):
    queue(("train_wildcards_heart_cotrain_00_2d", "of a dead command"))
    start("heart", run="ours")
    assert cancelled(folder) == ["1"]


def test_one_of_several_experiments_is_taken_over_by_itself(folder, queue):
    for name in ("heart", "heart_2"):
        leave_notice(name, run="of both")
    queue(("plan_wildcards_heart", "of both"))
    start("heart", run="ours")
    assert cancelled(folder) == ["1"]


def test_a_living_command_on_another_machine_is_not_taken_over(folder, queue):
    leave_notice("heart", run="theirs", heartbeat=time.time() - 30)
    queue(("plan_wildcards_heart", "theirs"))
    sentence = (
        r"Another command for heart runs in this folder \(process 7 on login1, 3\d s after its "
        rf"last .*if it is surely gone, wait until it was silent for {HEARTBEAT_LIFETIME} s"
    )
    with pytest.raises(InputError, match=sentence):
        start("heart", run="ours")
    assert cancelled(folder) == []
    assert json.loads(notice_of("heart").read_text())["run"] == "theirs"


@pytest.mark.parametrize(("job", "waits"), [("7", True), ("8", False), ("", False)])
def test_the_dying_command_of_a_requeued_jobs_last_allocation_is_waited_for(
    job, waits, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "state_of", lambda job: None)
    # The fixture's path holds no `sleep`.
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"]) as dying:
        born = workfolder._born(dying.pid)
        owner = {"host": socket.gethostname(), "pid": dying.pid, "born": born}
        leave_notice("heart", **owner, slurm_job=job)
        if waits:
            start("heart")
            assert workfolder._born(dying.pid) is None
        else:
            with pytest.raises(InputError, match="Another command for heart runs"):
                start("heart")


@pytest.mark.parametrize("notice", [{}, {"heartbeat": time.time(), "ended": True}])
def test_a_silent_or_ended_command_on_another_machine_is_taken_over(notice):
    leave_notice("heart", **notice)
    start("heart")
    assert json.loads(notice_of("heart").read_text())["host"] == socket.gethostname()


def test_a_job_goes_on_with_its_own_command_and_that_of_a_job_that_is_over(monkeypatch, queue):
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    for job, state, is_over in (("5", "RUNNING", False), ("5", "TIMEOUT", True), ("6", "", True)):
        queue(state=state)
        leave_notice("heart", slurm_job=job, heartbeat=time.time())
        if is_over:
            start("heart")
        else:
            with pytest.raises(InputError, match="Another command for heart"):
                start("heart")


def command(run: str = "", seconds: float = 0) -> subprocess.Popen:
    """Start a command in a process of its own, and wait until it is at work."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, run, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "working\n"
    return process


def test_a_second_command_is_refused_until_the_first_is_dead():
    first = command(seconds=60)
    sentence = rf"\(process {first.pid} on {socket.gethostname()}\); wait for its end"
    with pytest.raises(InputError, match=sentence):
        start("heart")
    first.kill()
    first.communicate()
    assert not json.loads(notice_of("heart").read_text())["ended"]
    start("heart")


def test_a_command_that_ends_by_itself_says_so():
    command().communicate()
    assert json.loads(notice_of("heart").read_text())["ended"]


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (signal.default_int_handler, signal.SIGINT),
        # A process begun in the background hears no SIGINT.
        (signal.SIG_IGN, signal.SIGTERM),
    ],
)
def test_signs_of_life_leave_alone_when_the_command_began_and_end_it_for_who_came_after(
    monkeypatch, capsys, handler, expected
):
    monkeypatch.setattr("cotrain.workfolder.HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr("cotrain.takeover.signal.getsignal", lambda number: handler)
    sent = []
    monkeypatch.setattr("cotrain.takeover.os.kill", lambda *signal: sent.append(signal))
    signs = take_over({"heart": ["results/heart/model"]}, run="", say=print)
    began = notice_of("heart").stat().st_mtime
    first = json.loads(notice_of("heart").read_text())
    time.sleep(0.3)
    later = json.loads(notice_of("heart").read_text())
    assert later.pop("heartbeat") > first.pop("heartbeat")
    assert later == first
    assert notice_of("heart").stat().st_mtime == began
    assert sent == []
    deadline = time.monotonic() + 30
    while not sent and time.monotonic() < deadline:
        # Again, should it have looked just before and written just after.
        leave_notice("heart")
        time.sleep(0.02)
    assert sent == [(os.getpid(), expected)]
    assert "taken this one for dead; this one ends" in capsys.readouterr().out
    signs.end()
    assert json.loads(notice_of("heart").read_text())["host"] == "login1"


def test_a_queue_that_does_not_answer_is_asked_twice_and_stops_the_command(folder, queue):
    queue()
    (folder / "bin/squeue").write_text(
        f"#!/bin/sh\necho >> {folder}/asked\necho 'Unable to contact controller' >&2\nexit 1\n"
    )
    sentence = r"left in this folder \(Unable to contact controller\).* type this again when"
    with pytest.raises(InputError, match=sentence):
        start("heart", run="ours")
    assert (folder / "asked").read_text() == "\n\n"
    # Nothing was taken over.
    assert not notice_of("heart").exists()


def test_a_local_command_after_one_that_ended_does_without_the_queue(folder, queue, capsys):
    queue()
    (folder / "bin/squeue").write_text("#!/bin/sh\nexit 1\n")
    leave_notice("heart", run="theirs", ended=True)
    start("heart")
    assert "squeue did not say which jobs" in capsys.readouterr().out
    leave_notice("heart", run="theirs")
    with pytest.raises(InputError, match="squeue did not say which jobs"):
        start("heart")


@pytest.mark.parametrize("ended", [False, True])
def test_a_local_command_cancels_jobs_that_another_left(folder, queue, ended):
    queue(("plan_wildcards_heart", "theirs"))
    leave_notice("heart", ended=ended)
    start("heart")
    assert cancelled(folder) == []
    leave_notice("heart", run="theirs", ended=ended)
    start("heart")
    assert cancelled(folder) == ["1"]


def test_where_squeue_is_not_jobs_that_were_perhaps_left_stop_the_command():
    leave_notice("heart", run="theirs")
    sentence = "command for heart that was killed on login1 may have left SLURM jobs, and squeue"
    with pytest.raises(InputError, match=sentence):
        start("heart")
    leave_notice("heart", run="theirs", ended=True)
    start("heart")
