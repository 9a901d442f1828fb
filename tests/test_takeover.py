"""A command beside another: refused where that one lives, and taking it over where it is dead."""

import json
import time
from pathlib import Path

import pytest

from cotrain.takeover import notice_of, take_over


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Change into an empty folder, with nothing but what a test puts there on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
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
    take_over({name: [] for name in names}, run=run, say=print)


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
