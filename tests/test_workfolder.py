"""The working folder of a step: one writer at a time, and unfinished work of its own only."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cotrain.errors import InputError
from cotrain.workfolder import HEARTBEAT_LIFETIME, WorkFolder, owner_here

HOLDER = """
import sys, time
from cotrain.workfolder import WorkFolder
with WorkFolder(sys.argv[1], {"seed": 1}):
    print("held", flush=True)
    time.sleep(60)
"""
BATCH_MAKERS_HOLDER = """
import sys, time, torch
from cotrain.workfolder import WorkFolder
with WorkFolder(sys.argv[1], {"seed": 1}):
    for batch in torch.utils.data.DataLoader(range(10**6), batch_size=None, num_workers=3):
        if batch == 0:
            print("held", flush=True)
        time.sleep(0.02)
"""


@pytest.fixture
def holder(tmp_path):
    """Return a living process that holds the lock of the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLURM_JOB_ID": "77"},
    )
    # Before that, it says that no SLURM knows when its job ends.
    assert "held\n" in (process.stdout.readline(), process.stdout.readline())
    yield process
    process.kill()
    process.communicate()


def test_a_second_living_process_is_refused_and_told_who_is_there(tmp_path, holder):
    sentence = rf"process {holder.pid} on {socket.gethostname()}, SLURM job 77; wait for it"
    with pytest.raises(InputError, match=sentence), WorkFolder(tmp_path, {"seed": 1}):
        pass
    assert (tmp_path / "step.lock").exists()


def test_the_same_process_cannot_hold_a_lock_twice(tmp_path):
    with WorkFolder(tmp_path, {}), pytest.raises(InputError, match="is being written by"):
        WorkFolder(tmp_path, {}).__enter__()
    assert not (tmp_path / "step.lock").exists()


def test_another_name_in_the_folder_is_another_lock(tmp_path, holder):
    with WorkFolder(tmp_path, {}, name="shard-1"):
        assert (tmp_path / "shard-1.lock").exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.kill()
    # Not even reaped, as an orphan in a container without an init.
    while "\nState:\tZ" not in Path(f"/proc/{holder.pid}/status").read_text():
        time.sleep(0.01)
    assert (tmp_path / "step.lock").exists()
    with WorkFolder(tmp_path, {"seed": 1}):
        assert json.loads((tmp_path / "step.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "step.lock").exists()


def test_a_process_number_that_was_given_again_does_not_hold_a_lock(tmp_path):
    lock = {"host": socket.gethostname(), "pid": os.getpid(), "born": "1", "slurm_job": ""}
    (tmp_path / "step.lock").write_text(json.dumps(lock | {"heartbeat": time.time()}))
    with WorkFolder(tmp_path, {}):
        pass


def test_a_lock_cut_short_by_a_kill_is_taken_over(tmp_path):
    (tmp_path / "step.lock").write_text("")
    with WorkFolder(tmp_path, {}):
        pass


def test_a_lock_of_another_machine_is_waited_for_until_it_falls_silent(tmp_path, monkeypatch):
    monkeypatch.setattr("cotrain.workfolder.POLL_SECONDS", 0.1)
    lock = {"host": "elsewhere", "pid": 1, "born": "1", "slurm_job": ""}
    almost_silent = time.time() - HEARTBEAT_LIFETIME + 1
    (tmp_path / "step.lock").write_text(json.dumps(lock | {"heartbeat": almost_silent}))
    with WorkFolder(tmp_path, {}):
        assert time.time() - almost_silent > HEARTBEAT_LIFETIME


def test_the_lock_is_renewed_while_a_long_epoch_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("cotrain.workfolder.HEARTBEAT_SECONDS", 0.01)
    with WorkFolder(tmp_path, {}):
        first = json.loads((tmp_path / "step.lock").read_text())["heartbeat"]
        time.sleep(0.3)
        assert json.loads((tmp_path / "step.lock").read_text())["heartbeat"] > first


def test_a_process_whose_lock_was_taken_over_stops_and_leaves_the_others_alone(tmp_path):
    lock = {"host": "elsewhere", "pid": 1, "born": "1", "slurm_job": "", "heartbeat": time.time()}
    sentence = "taken over by process 1 on elsewhere"
    with pytest.raises(InputError, match=sentence), WorkFolder(tmp_path, {}) as work:
        (tmp_path / "step.lock").write_text(json.dumps(lock))
        work.report(1, 2, "epochs")
    assert json.loads((tmp_path / "step.lock").read_text())["host"] == "elsewhere"
    assert not (tmp_path / "step.error.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_time_limit_ends_the_process_and_releases_the_lock(tmp_path, holder, number):
    holder.send_signal(number)
    assert holder.wait(20) == 128 + number
    assert not (tmp_path / "step.lock").exists()
    # A time limit is no error.
    assert not (tmp_path / "step.error.txt").exists()


def test_a_time_limit_that_ends_the_makers_of_batches_too_is_no_error(tmp_path):
    # As SLURM ends a job and a closed terminal a command: all processes at once.
    process = subprocess.Popen(
        [sys.executable, "-c", BATCH_MAKERS_HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "Error" not in said
    assert not (tmp_path / "step.lock").exists()


def test_work_of_another_identity_is_not_resumable(tmp_path):
    with WorkFolder(tmp_path, {"seed": 1}) as work:
        assert not work.resumable
        work.claim(done=0, total=9)
    with WorkFolder(tmp_path, {"seed": 1}) as work:
        assert work.resumable
    with WorkFolder(tmp_path, {"seed": 2}) as work:
        assert not work.resumable


def test_the_processor_time_of_interrupted_processes_is_counted(tmp_path):
    with WorkFolder(tmp_path, {"seed": 1}) as work:
        work.claim(done=0, total=9)
        assert work.cpu_seconds_before == 0
        time.sleep(0.1)
        work.report(1, 3, "epochs")
    before = json.loads((tmp_path / "step.progress.json").read_text())
    told = before["cpu_seconds"]
    with WorkFolder(tmp_path, {"seed": 1}) as work:
        work.claim(done=1, total=9)
        assert work.cpu_seconds_before == told > 0
        work.report(2, 3, "epochs")
    after = json.loads((tmp_path / "step.progress.json").read_text())
    assert after["cpu_seconds"] >= 2 * told
    assert after["seconds"] >= before["seconds"] > 0
    # Other work begins at nothing.
    with WorkFolder(tmp_path, {"seed": 2}) as work:
        work.claim(done=0, total=9)
        assert work.cpu_seconds_before == 0


def test_work_begun_on_another_device_is_refused_and_kept(tmp_path):
    begun = {"seed": 1, "device": "cuda", "precision": "fp16"}
    with WorkFolder(tmp_path, begun) as work:
        work.claim(done=0, total=9)
    sentence = "was done with cuda fp16, but this process would go on with cpu bf16"
    here = {**begun, "device": "cpu", "precision": "bf16"}
    with pytest.raises(InputError, match=sentence), WorkFolder(tmp_path, here) as work:
        work.claim(done=3, total=9)
    assert not (tmp_path / "step.lock").exists()
    with WorkFolder(tmp_path, begun) as work:
        assert work.resumable
        work.claim(done=3, total=9)
    # Snakemake may repeat what is finished, on any node: nothing is left to compute.
    with WorkFolder(tmp_path, here) as work:
        assert work.resumable
        work.claim(done=9, total=9)
    assert json.loads((tmp_path / "step.identity.json").read_text()) == begun
    # Killed before anything was saved, it begins anew with what is here.
    with WorkFolder(tmp_path, here) as work:
        work.claim(done=0, total=9)
    assert json.loads((tmp_path / "step.identity.json").read_text()) == here
    # With other settings it is other work, whatever the device.
    with WorkFolder(tmp_path, {**here, "seed": 2}) as work:
        assert not work.resumable


def test_every_process_that_worked_on_it_is_noted(tmp_path):
    for done in (0, 3):
        with WorkFolder(tmp_path, {"seed": 1}) as work:
            work.claim(done=done, total=9)
    header, *rows = (tmp_path / "step.starts.tsv").read_text().splitlines()
    assert header.split("\t")[-1] == "done"
    assert [row.split("\t")[-1] for row in rows] == ["0", "3"]
    with WorkFolder(tmp_path, {"seed": 2}) as work:
        work.claim(done=0, total=9)
    assert len((tmp_path / "step.starts.tsv").read_text().splitlines()) == 2


def test_of_two_that_find_a_dead_lock_the_second_does_not_clear_the_firsts(tmp_path, monkeypatch):
    lock = tmp_path / "step.lock"
    dead = {"host": socket.gethostname(), "pid": 1, "born": "0", "slurm_job": "", "cluster": ""}
    lock.write_text(json.dumps(dead | {"heartbeat": time.time()}))
    rename = os.rename

    def rename_after_the_other_was_faster(source, target):
        lock.write_text(json.dumps(owner_here() | {"heartbeat": time.time()}))
        rename(source, target)

    monkeypatch.setattr("cotrain.workfolder.os.rename", rename_after_the_other_was_faster)
    with pytest.raises(InputError, match="is being written by"), WorkFolder(tmp_path, {}):
        pass
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["step.lock"]


def test_an_error_is_kept_until_the_step_is_tried_again(tmp_path):
    with pytest.raises(ZeroDivisionError), WorkFolder(tmp_path, {}):
        _ = 1 / 0
    error = tmp_path / "step.error.txt"
    assert error.read_text() == "ZeroDivisionError: division by zero\n"
    with WorkFolder(tmp_path, {}):
        assert not error.exists()


def test_progress_says_how_much_is_done_and_left(tmp_path):
    with WorkFolder(tmp_path, {}) as work:
        work.claim(done=4, total=9)
        work._started -= 10
        # Resumed with 4 of 8 done: one epoch in 10 s, three are left.
        assert work.report(5, 8, "epochs") == pytest.approx(30, abs=1)
        work._started -= 10
        assert work.report(6, 8, "epochs") == pytest.approx(20, abs=1)
    content = json.loads((tmp_path / "step.progress.json").read_text())
    assert (content["epochs_done"], content["epochs"]) == (6, 8)
    assert content["seconds_left"] == pytest.approx(20, abs=1)


@pytest.fixture
def answers(monkeypatch):
    """Return a list of what SLURM answers about the end of this job, the last for ever."""
    given = []

    def ask(*words: str) -> tuple[int | None, str]:
        return given.pop(0) if len(given) > 1 else given[0]

    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr("cotrain.slurm._ask", ask)
    monkeypatch.setattr("cotrain.workfolder.HEARTBEAT_SECONDS", 0.01)
    return given


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until `true()` holds, for 20 s at most."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_whose_end_is_not_known_asks_again(tmp_path, answers, capsys):
    answers += [(None, ""), (1, "Socket timed out"), (0, "0:10|rule_train_wildcards_heart")]
    with WorkFolder(tmp_path, {}) as work:
        wait_for(work._time_is_up)
        wait_for(lambda: json.loads((tmp_path / "step.lock").read_text())["ends"] is not None)
    unknown, known = capsys.readouterr().out.splitlines()
    assert unknown.startswith("SLURM did not say when job 77 ends; it is asked again")
    assert known.startswith("SLURM job 77 ends at ")


def test_a_limit_that_is_set_or_lifted_later_is_heard(tmp_path, answers, monkeypatch):
    monkeypatch.setattr("cotrain.workfolder.SECONDS_BETWEEN_LIMITS", 0.01)
    unlimited, limited = (0, "UNLIMITED|cotrain"), (0, "0:10|cotrain")
    answers.append(unlimited)
    with WorkFolder(tmp_path, {}) as work:
        for answer, is_up in ((limited, True), (unlimited, False)):
            assert work._time_is_up() != is_up
            answers[:] = [answer]
            wait_for(lambda is_up=is_up: work._time_is_up() == is_up)


def test_what_is_not_saved_yet_is_saved_before_the_time_limit(tmp_path, answers, monkeypatch):
    monkeypatch.setattr("cotrain.workfolder.HEARTBEAT_SECONDS", 60)
    told = []
    monkeypatch.setattr("cotrain.slurm.requeue_own_job", lambda: told.append("requeued"))

    def work_on(minutes: int) -> None:
        answers[:] = [(0, f"{minutes}:00|cotrain")]
        with WorkFolder(tmp_path, {}) as work:
            work.report(1, 2, "epochs", before_leaving=lambda: told.append("saved"))

    work_on(60)
    assert told == []
    with pytest.raises(SystemExit):
        work_on(0)
    assert told == ["saved", "requeued"]


def test_an_interactive_session_has_no_end_that_matters(tmp_path, answers, capsys):
    answers.append((0, "0:10|(null)"))
    with WorkFolder(tmp_path, {}) as work:
        assert not work._time_is_up()
    assert capsys.readouterr().out == ""
