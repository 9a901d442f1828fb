"""What happens to clusters: each row ends in the bits of a run without it, and loses an epoch."""

import json
import re
import shutil
import signal
import sys

import pytest
from cluster import wait_until
from project import EPOCHS, MASKS, TRAINED, Project


def ends_as_undisturbed(project, undisturbed, *, epochs_kept: list[int]) -> None:
    """Assert that weights and masks are the same, and that finished epochs were not done again.

    epochs_kept: what had been finished at each interruption.
    """
    assert project.fingerprint().items() <= undisturbed.fingerprint().items()
    assert not list(project.folder.glob("results/**/.writing-*"))
    first, *resumed = project.starts()
    assert first == 0
    assert len(resumed) == len(epochs_kept)
    assert all(done >= kept for done, kept in zip(resumed, epochs_kept, strict=True))
    epochs = [int(line.split()[1]) for line in project.log().splitlines() if line[:6] == "epoch "]
    assert epochs == list(range(EPOCHS))


def ends_of(project) -> list[dict[str, str]]:
    """Return this folder's jobs as SLURM remembers them."""
    return [job for job in project.cluster.history() if job["WorkDir"] == str(project.folder)]


# ------------------------------------------------------------------- what befalls the jobs


@pytest.mark.parametrize("number", ["KILL", "USR1"])
def test_a_job_that_fails_is_tried_again(project, undisturbed, number):
    controller = project.start(TRAINED)
    project.wait_for_epochs(3)
    # KILL: without a chance to tidy up. USR1: what clusters send ahead of a time limit.
    project.cluster.run("scancel", f"--signal={number}", f"{project.job()['id']}.0")
    assert controller.wait(600) == 0, project.said()[-3000:]
    assert len(ends_of(project)) == 2
    assert "Trying to restart job" in project.said()
    ends_as_undisturbed(project, undisturbed, epochs_kept=[3])


def test_a_cancelled_job_is_tried_again(project, undisturbed):
    controller = project.start(TRAINED)
    project.wait_for_epochs(3)
    project.cluster.run("scancel", project.job()["id"])
    assert controller.wait(600) == 0, project.said()[-3000:]
    assert [job["JobState"] for job in ends_of(project)] == ["CANCELLED", "COMPLETED"]
    ends_as_undisturbed(project, undisturbed, epochs_kept=[3])


def test_a_requeued_job_goes_on(project, undisturbed):
    controller = project.start(MASKS)
    project.wait_for_epochs(3)
    project.cluster.run("scontrol", "requeue", project.job()["id"])
    assert controller.wait(600) == 0, project.said()[-3000:]
    train, _ = ends_of(project)
    assert train["Restarts"] == "1"
    assert "Trying to restart job" not in project.said()
    ends_as_undisturbed(project, undisturbed, epochs_kept=[3])


def test_a_preempted_job_goes_on(project, undisturbed):
    controller = project.start(TRAINED)
    project.wait_for_epochs(3)
    urgent = project.cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=8", "--mem=1000"),
        *("--output=/dev/null", "--wrap", "sleep 15"),
    )
    wait_until(lambda: project.job()["state"] == "PENDING", seconds=180, what="a preempted job")
    assert controller.wait(600) == 0, project.said()[-3000:]
    (train,) = ends_of(project)
    assert train["Restarts"] == "1"
    assert project.cluster.job(urgent)["JobState"] == "COMPLETED"
    ends_as_undisturbed(project, undisturbed, epochs_kept=[3])


def test_a_job_goes_on_on_another_node_after_its_own_was_down(project, undisturbed):
    controller = project.start(TRAINED, options=("--set-resources", "train:slurm_partition=gpu"))
    project.wait_for_epochs(3)
    node = project.job()["node"]
    # A node that answers is not down for long; drained, it gets no new job.
    for state in ("down", "drain"):
        project.cluster.run("scontrol", "update", f"node={node}", f"state={state}", "reason=test")
    assert controller.wait(600) == 0, project.said()[-3000:]
    project.cluster.run("scontrol", "update", f"node={node}", "state=resume")
    (train,) = ends_of(project)
    assert train["Restarts"] == "1"
    assert train["NodeList"] in {"gpu1", "gpu2"} - {node}
    ends_as_undisturbed(project, undisturbed, epochs_kept=[3])


def test_a_job_that_takes_too_much_memory_gets_more(project, undisturbed):
    project.run(TRAINED, options=("--set-resources", "train:mem_mb=400*attempt**2"))
    states = [(job["JobState"], job["MinMemoryNode"]) for job in ends_of(project)]
    assert states[0] == ("FAILED", "400M")
    first = ends_of(project)[0]
    node_log = project.cluster.folder / f"slurmd-{first['NodeList']}.log"
    assert re.search(rf"StepId={first['JobId']}\.\d+ exceeded memory limit", node_log.read_text())
    assert states[-1][0] == "COMPLETED"
    assert states[-1][1] in ("1600M", "3600M")
    assert project.fingerprint().items() <= undisturbed.fingerprint().items()


def test_inference_goes_on_with_the_next_case(project, undisturbed):
    for name in ("train_2d", "../../../../logs"):
        path = project.folder / MASKS.parents[1] / name
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(undisturbed.folder / MASKS.parents[1] / name, path)
    controller = project.start(MASKS)
    finished = project.folder / MASKS.parent / "work/shard-0.finished.jsonl"
    # It is there from the start, still empty.
    wait_until(
        lambda: finished.is_file() and "\n" in finished.read_text(), seconds=300, what="a case"
    )
    project.cluster.run("scancel", project.job("infer_pseudo_masks")["id"])
    seen = len(finished.read_text().splitlines())
    assert controller.wait(600) == 0, project.said()[-3000:]
    _, *starts = (finished.with_name("shard-0.starts.tsv")).read_text().splitlines()
    first, second = (int(line.split("\t")[-1]) for line in starts)
    assert first == 0
    assert second >= seen > 0
    assert [job["JobState"] for job in ends_of(project)] == ["CANCELLED", "COMPLETED"]
    assert project.fingerprint() == undisturbed.fingerprint()
    assert len(project.fingerprint()) == 1 + 4


def test_jobs_start_while_a_table_is_being_edited(project, undisturbed):
    controller = project.start(MASKS, options=("--retries", "0"))
    project.wait_for_epochs(1)
    with open(project.folder / "cases.tsv", "a") as table:
        table.write("half a row")
    assert controller.wait(600) == 0, project.said()[-3000:]
    ends_as_undisturbed(project, undisturbed, epochs_kept=[])


# ------------------------------------------------------------- what befalls the controller


def test_sigint_cancels_the_jobs_and_the_same_command_goes_on(project, undisturbed):
    controller = project.start(TRAINED)
    project.wait_for_epochs(3)
    project.kill(controller, signal.SIGINT)
    wait_until(lambda: not project.jobs(), seconds=180, what="cancelled jobs")
    project.run(TRAINED)
    ends_as_undisturbed(project, undisturbed, epochs_kept=[3])


def test_sigterm_waits_for_the_jobs(project, undisturbed):
    controller = project.start(MASKS)
    project.wait_for_epochs(3)
    project.kill(controller, signal.SIGTERM, seconds=300)
    assert (project.folder / TRAINED).is_file()
    assert not (project.folder / MASKS).exists()
    project.run(MASKS)
    ends_as_undisturbed(project, undisturbed, epochs_kept=[])


def test_the_command_typed_again_after_sigkill_takes_the_old_job_over(project, undisturbed):
    controller = project.start(MASKS)
    project.wait_for_epochs(2)
    old = project.job()["id"]
    project.kill(controller, signal.SIGKILL)
    project.run(MASKS)
    assert f"Cancelling SLURM jobs {old}," in project.said()
    states = [job["JobState"] for job in ends_of(project)]
    assert states == ["CANCELLED", "COMPLETED", "COMPLETED"]
    ends_as_undisturbed(project, undisturbed, epochs_kept=[2])


def test_a_job_that_waits_in_the_queue_of_a_dead_command_never_starts(project, undisturbed):
    project.cluster.run("scontrol", "update", "partitionname=cpu", "state=down")
    controller = project.start(TRAINED)
    wait_until(project.jobs, seconds=180, what="a pending job")
    project.kill(controller, signal.SIGKILL)
    project.cluster.run("scontrol", "update", "partitionname=cpu", "state=up")
    project.run(TRAINED)
    assert [job["JobState"] for job in ends_of(project)] == ["CANCELLED", "COMPLETED"]
    ends_as_undisturbed(project, undisturbed, epochs_kept=[])


def test_a_second_command_beside_a_living_one_is_refused(project, undisturbed):
    controller = project.start(TRAINED)
    project.wait_for_epochs(1)
    notice = json.loads((project.folder / ".snakemake/command-tiny.json").read_text())
    assert notice["run"] == project.cluster.job(project.job()["id"])["JobName"]
    assert project.start(TRAINED).wait(180) == 1
    assert f"Another command for tiny runs in this folder (process {controller.pid} on" in (
        project.said()
    )
    assert controller.wait(600) == 0, project.said()[-3000:]
    assert len(ends_of(project)) == 1
    ends_as_undisturbed(project, undisturbed, epochs_kept=[])


def test_a_controller_of_slurm_that_is_started_anew_is_waited_for(project, undisturbed):
    controller = project.start(MASKS)
    project.wait_for_epochs(2)
    with project.cluster.without_controller():
        # By itself the plugin asks sacct five times, in a second, and forgets its jobs.
        wait_until(
            lambda: project.said().count("SLURM does not say how the jobs are") > 1,
            seconds=180,
            what="a command that asks",
        )
    assert controller.wait(600) == 0, project.said()[-3000:]
    assert "Trying to restart job" not in project.said()
    ends_as_undisturbed(project, undisturbed, epochs_kept=[])


def test_jobs_that_are_not_taken_for_a_while_are_submitted_again_later(project, undisturbed):
    tries = project.folder / "tries"
    programs = project.folder / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(
        f"#!/bin/sh\ndate +%s.%N >> {tries}\n"
        f"if [ $(wc -l < {tries}) -lt 3 ]; then\n"
        "    echo 'sbatch: error: Unable to contact slurm controller' >&2\n    exit 1\nfi\n"
        f'exec {project.cluster.folder}/bin/sbatch "$@"\n'
    )
    (programs / "sbatch").chmod(0o755)
    project.environment["PATH"] = f"{programs}:{project.environment['PATH']}"
    project.run(TRAINED)
    first, second, third = map(float, tries.read_text().split())
    # As long as lies between two looks at the jobs, then twice that.
    assert second - first > 1
    assert third - second > 2
    ends_as_undisturbed(project, undisturbed, epochs_kept=[])


# --------------------------------------------------------------------------- time limits


LONG = {"iterations_per_epoch": 6, "warmup_epochs": 30}
"""A training of so many epochs that, at 4 s more each, at most 7 end before a limit of a minute."""


@pytest.fixture
def long_project(project) -> Project:
    """Return a project that trains through several time limits of a minute."""
    project.change(training_2d=LONG)
    project.environment["SECONDS_MORE"] = "4"
    return project


@pytest.fixture(scope="module")
def long_undisturbed(planned_project, cluster, tmp_path_factory) -> Project:
    """Return a project after the same training in one allocation."""
    folder = tmp_path_factory.mktemp("long") / "project"
    shutil.copytree(planned_project, folder)
    made = Project(folder, cluster)
    made.change(training_2d=LONG)
    made.run(TRAINED)
    assert made.starts() == [0]
    return made


def test_a_training_of_five_allocations_costs_no_retry(long_project, long_undisturbed):
    long_project.run(TRAINED, options=("--set-resources", "train:runtime=1"))
    (train,) = ends_of(long_project)
    assert int(train["Restarts"]) >= 4
    assert "Trying to restart job" not in long_project.said()
    first, *resumed = long_project.starts()
    assert (first, len(resumed)) == (0, int(train["Restarts"]))
    # Every allocation trained, and none trained an epoch that another had finished.
    assert sorted(set(resumed)) == resumed
    assert long_project.fingerprint() == long_undisturbed.fingerprint()


def test_a_whole_run_in_one_job_puts_itself_back_into_the_queue(long_project, long_undisturbed):
    cluster = long_project.cluster
    command = f"{sys.executable} -m snakemake {TRAINED} --configfile settings.yaml --cores 2"
    job = cluster.run(
        *("env", f"SECONDS_MORE={long_project.environment['SECONDS_MORE']}"),
        *("sbatch", "--parsable", "--requeue", "--time=1", "--cpus-per-task=2", "--mem=6000"),
        *(f"--chdir={long_project.folder}", "--output=job.txt", "--open-mode=append"),
        "--comment=cotrain",
        *("--wrap", f"{command} --set-threads train=1"),
    )
    wait_until(
        lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT"),
        seconds=900,
        what="the job",
    )
    ended = cluster.job(job)
    assert ended["JobState"] == "COMPLETED", (long_project.folder / "job.txt").read_text()[-3000:]
    assert int(ended["Restarts"]) >= 2
    assert len(long_project.starts()) == int(ended["Restarts"]) + 1
    assert long_project.fingerprint() == long_undisturbed.fingerprint()


def test_a_time_limit_that_nobody_foresaw_is_survived_twice(long_project, long_undisturbed):
    # At 8 s more an epoch, 30 of them outlast two limits, which SLURM looks at twice a minute.
    long_project.environment["SECONDS_MORE"] = "8"
    controller = long_project.start(TRAINED)
    kept = []
    for _ in range(2):
        done = kept[-1] if kept else 0
        long_project.wait_for_epochs(done + 1)
        job = long_project.job()["id"]
        # The step asked for its end when it began, and was told another.
        long_project.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=1")
        wait_until(
            lambda job=job: long_project.cluster.job(job)["JobState"] == "TIMEOUT",
            seconds=180,
            what="a time limit",
        )
        kept.append(long_project.epochs_done())
    assert controller.wait(900) == 0, long_project.said()[-3000:]
    assert [job["JobState"] for job in ends_of(long_project)] == ["TIMEOUT", "TIMEOUT", "COMPLETED"]
    first, *resumed = long_project.starts()
    assert first == 0
    assert all(done >= seen for done, seen in zip(resumed, kept, strict=True))
    assert long_project.fingerprint() == long_undisturbed.fingerprint()
