"""What the workflow adds to the work of rounds of ten minutes, by benchmarks/overhead.py.

Slow: `pytest -m slow -n 2 -rA tests/slurm/test_overhead.py` takes half an hour and prints the
sentences that docs/slurm.md tells. Epochs and cases last as long as real ones, and mostly wait.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import wait_until
from project import Project

OVERHEAD = Path(__file__).parents[2] / "benchmarks" / "overhead.py"
TRAINING = {"iterations_per_epoch": 2, "warmup_epochs": 12, "epochs_per_round": 12}


def overhead_of(project: Project) -> float:
    """Print what the benchmark says of the run in the project's folder, and return its share."""
    sentence = subprocess.run(
        [sys.executable, OVERHEAD, "tiny", "--folder", project.folder],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    print(sentence)
    return float(re.search(r"([\d.]+) %", sentence)[1]) / 100


@pytest.fixture
def long_rounds(planned_project, cluster, tmp_path) -> Project:
    """Return a project of two rounds: 3 minutes a training, 1 a set of masks, 10 a round."""
    folder = tmp_path / "project"
    shutil.copytree(planned_project, folder, ignore=shutil.ignore_patterns("results", "logs"))
    project = Project(folder, cluster, seconds_more=15, looks=())
    project.change(
        rounds=2,
        training_2d=TRAINING,
        training_3d={**TRAINING, "epochs_per_round": 16},
        cotraining={"first_teacher": "2d", "schedule_rounds": 2, "last_epochs": 0},
    )
    return project


@pytest.mark.slow
def test_each_step_as_a_job_of_its_own(long_rounds):
    controller = long_rounds.start()
    assert controller.wait(3600) == 0, long_rounds.said()[-3000:]
    # 23 steps, each noticed 30 s late at most; starts of Snakemake take what the machine takes.
    assert overhead_of(long_rounds) < 0.5


@pytest.mark.slow
def test_the_whole_run_in_one_job(long_rounds):
    cluster, folder = long_rounds.cluster, long_rounds.folder
    job = cluster.run(
        *("env", f"SECONDS_MORE={long_rounds.environment['SECONDS_MORE']}"),
        *("sbatch", "--parsable", "--requeue", "--time=240", "--cpus-per-task=8", "--mem=16000"),
        *(f"--chdir={folder}", "--output=job.txt", "--comment=cotrain", "--wrap"),
        f"{sys.executable} -m snakemake --configfile settings.yaml --cores 8 --set-threads train=1 "
        "infer_pseudo_masks=1 infer_test_masks=1",
    )
    ended = ("COMPLETED", "FAILED", "TIMEOUT")
    wait_until(lambda: cluster.job(job)["JobState"] in ended, seconds=3600, what="the job")
    assert cluster.job(job)["JobState"] == "COMPLETED", (folder / "job.txt").read_text()[-3000:]
    assert overhead_of(long_rounds) < 0.05
