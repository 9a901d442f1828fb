"""A working folder whose owner is a SLURM job on another machine: SLURM says whether it lives."""

import json
import subprocess
import sys
import time
from datetime import datetime

import pytest
from cluster import wait_until

from cotrain.slurm import seconds_of

HOLDER = """
import sys
from cotrain import workfolder
workfolder.POLL_SECONDS = 0.2
with workfolder.WorkFolder(sys.argv[1], {}) as work:
    print("entered", flush=True)
"""


@pytest.fixture
def sleeper(cluster):
    """Return the number of a running job that sleeps."""
    job = cluster.run(
        "sbatch", "--parsable", "--output=/dev/null", "--mem=100", "--wrap", "sleep 300"
    )
    wait_until(lambda: cluster.job(job)["JobState"] == "RUNNING", seconds=30, what="a job")
    yield job
    cluster.run("scancel", job)


def locked_by(job: str, folder, *, silent_seconds: float = 200) -> None:
    """Leave a lock whose last sign of life is so old; SLURM is asked after 120 s."""
    lock = {"host": "elsewhere", "pid": 1, "born": "1", "slurm_job": job, "cluster": ""}
    lock |= {"node": "elsewhere", "ends": None, "heartbeat": time.time() - silent_seconds}
    (folder / "step.lock").write_text(json.dumps(lock))


def start(cluster, folder, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**cluster.environment, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_lock_is_waited_for_until_its_job_is_over(cluster, sleeper, tmp_path):
    locked_by(sleeper, tmp_path)
    process = start(cluster, tmp_path)
    assert process.stdout.readline().startswith(
        f"Waiting for process 1 on elsewhere, SLURM job {sleeper} to release"
    )
    time.sleep(2)
    assert process.poll() is None
    cluster.run("scancel", sleeper)
    # At once, not after the ten minutes in which a lock of an unknown machine is believed.
    assert process.wait(30) == 0
    assert process.stdout.read() == "entered\n"
    assert not (tmp_path / "step.lock").exists()


def test_a_job_that_slurm_has_forgotten_holds_no_lock(cluster, tmp_path):
    locked_by("999999", tmp_path)
    assert start(cluster, tmp_path).communicate(timeout=30)[0] == "entered\n"


def test_a_fresh_heartbeat_counts_more_than_slurms_account(cluster, tmp_path):
    locked_by("999999", tmp_path, silent_seconds=5)
    process = start(cluster, tmp_path)
    assert process.stdout.readline().startswith("Waiting for process 1 on elsewhere")
    process.kill()
    process.communicate()


def test_a_suspended_job_keeps_its_lock_however_silent(cluster, sleeper, tmp_path):
    cluster.run("scontrol", "suspend", sleeper)
    locked_by(sleeper, tmp_path, silent_seconds=7000)
    process = start(cluster, tmp_path)
    assert process.stdout.readline().startswith("Waiting for process 1 on elsewhere")
    process.kill()
    process.communicate()
    cluster.run("scontrol", "resume", sleeper)


def test_a_requeued_job_does_not_wait_for_itself(cluster, sleeper, tmp_path):
    locked_by(sleeper, tmp_path)
    output, _ = start(cluster, tmp_path, SLURM_JOB_ID=sleeper).communicate(timeout=30)
    assert output == "entered\n"


def test_a_running_job_that_was_silent_for_long_lost_its_process(cluster, sleeper, tmp_path):
    locked_by(sleeper, tmp_path, silent_seconds=700)
    assert start(cluster, tmp_path).communicate(timeout=30)[0] == "entered\n"


def test_a_job_knows_its_end(cluster, tmp_path):
    job = cluster.run(
        *("sbatch", "--parsable", "--time=7", "--mem=500", f"--output={tmp_path}/out"),
        "--comment=cotrain",
        *(
            "--wrap",
            f"srun {sys.executable} -c 'from cotrain import slurm; print(slurm.own_end())'",
        ),
    )
    wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", seconds=180, what="a job")
    end = float((tmp_path / "out").read_text())
    started = datetime.fromisoformat(cluster.job(job)["StartTime"]).timestamp()
    assert end == pytest.approx(started + 7 * 60, abs=5)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:05", 5),
        ("12:30", 750),
        ("1:02:03", 3723),
        ("2-00:00:01", 172801),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_durations_by_hand(text, seconds):
    assert seconds_of(text) == seconds
