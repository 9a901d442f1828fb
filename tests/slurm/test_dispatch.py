"""Jobs of a real SLURM: what they ask for, and that they make what a local run makes."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from cluster import Cluster, missing_programs, wait_until
from project import EPOCHS, MASKS, RESULTS, TRAINED, Project


def test_a_run_without_faults(undisturbed):
    assert undisturbed.starts() == [0]
    assert undisturbed.epochs_done() == EPOCHS
    assert len(undisturbed.fingerprint()) == 1 + 4


@pytest.mark.parametrize(
    ("site", "devices"),
    [("train:gpu=1", "0"), ("train:gres=gpu:fake:1", "0"), ("train:gpu=2", "0,1")],
    ids=["--gpus", "--gres", "two"],
)
def test_training_gets_gpus_of_one_node_and_preprocessing_none(project, site, devices):
    (project.folder / RESULTS / "preprocessed/labelled/manifest-0.tsv").unlink()
    # On a CPU of a node with fake GPUs: `device: auto` rightly refuses a GPU that torch cannot see.
    partition = ("--set-resources", "train:slurm_partition=gpu", site)
    if site.endswith("gpu=2"):
        # Instead of a name, limits: docs/slurm.md.
        limits = {"cpu": {"max_runtime": "7d"}, "gpu": {"max_runtime": "2d", "max_gpu": 4}}
        (project.folder / "partitions.yaml").write_text(yaml.safe_dump({"partitions": limits}))
        partition = ("--slurm-partition-config", "partitions.yaml", "--set-resources", site)
    controller = project.start(TRAINED, options=partition)
    project.wait_for_epochs(1)
    job = project.job()["id"]
    lock = json.loads((project.folder / TRAINED.parent / "work/step.lock").read_text())
    environment = Path(f"/proc/{lock['pid']}/environ").read_text().split("\0")
    assert controller.wait(600) == 0, project.said()[-3000:]
    train = project.cluster.job(job)
    assert train["Partition"] == "gpu"
    assert lock["node"] == train["NodeList"] in ("gpu1", "gpu2")
    assert lock["slurm_job"] == job
    # The step sees the devices that the job was given, and no other.
    assert f"CUDA_VISIBLE_DEVICES={devices}" in environment
    assert train["NumNodes"] == "1"
    (preprocess,) = [
        each
        for each in project.cluster.history()
        if each["WorkDir"] == str(project.folder) and each["JobId"] != job
    ]
    assert not any(key.startswith("TresPer") for key in preprocess)
    assert preprocess["NodeList"] == "cpu1"


def test_a_gpu_that_torch_does_not_see_stops_the_job_with_a_sentence(project):
    project.change(compute={"device": "auto"})
    options = ("--retries", "0", "--set-resources", "train:slurm_partition=gpu")
    assert project.start(TRAINED, options=options).wait(200) == 1
    assert "SLURM gave this job the GPU 0 of " in project.log()


def test_the_literal_command_runs_everything(planned_project, cluster, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(planned_project, folder, ignore=shutil.ignore_patterns("results", "logs"))
    project = Project(folder, cluster)
    project.change(
        rounds=1,
        training_2d={"iterations_per_epoch": 2, "warmup_epochs": 2, "epochs_per_round": 1},
        training_3d={"iterations_per_epoch": 2, "warmup_epochs": 2, "epochs_per_round": 1},
        cotraining={"last_epochs": 1},
        shards=2,
    )
    project.run()
    assert list((folder / RESULTS / "model").glob("**/checkpoint_final.pth"))
    jobs = [job for job in cluster.history() if job["WorkDir"] == str(folder)]
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    assert sum("rule_infer_pseudo_masks" in job["Comment"] for job in jobs) == 3 * 2
    # What SLURM said is kept for failed jobs only.
    assert not list(folder.glob(".snakemake/slurm_logs/**/*.log"))
    # What a job wrote down of itself is what the next command asks for.
    assert "Nothing to be done" not in project.said()
    project.run()
    assert "Nothing to be done" in project.said()


def test_the_command_may_be_a_job_itself(project, undisturbed):
    # Where login nodes end long processes: docs/slurm.md.
    cluster, cores = project.cluster, ("--cores", "64")
    command = shlex.join(project.command(TRAINED, options=cores))
    job = cluster.run(
        *("sbatch", "--parsable", "--no-requeue", "--time=60", "--cpus-per-task=1", "--mem=1000"),
        *(f"--chdir={project.folder}", "--output=job.txt", "--wrap", command),
    )
    wait_until(
        lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), seconds=600, what="the job"
    )
    said = (project.folder / "job.txt").read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", said[-3000:]
    jobs = [each for each in cluster.history() if each["WorkDir"] == str(project.folder)]
    assert sum("rule_train" in each.get("Comment", "") for each in jobs) == 1
    assert project.fingerprint().items() <= undisturbed.fingerprint().items()


def test_shards_run_as_tasks_of_a_job_array(project, undisturbed):
    project.change(shards=2)
    masks = [MASKS, MASKS.with_name("manifest-1.tsv")]
    project.run(*masks, options=("--slurm-array-jobs", "all"))
    tasks = [job for job in project.cluster.history() if job["WorkDir"] == str(project.folder)]
    shards = [job for job in tasks if "rule_infer_pseudo_masks" in job["Comment"]]
    assert len(shards) == 2
    assert {job["ArrayTaskId"] for job in shards} == {"1", "2"}
    found = [pd.read_csv(project.folder / each, sep="\t", dtype=str) for each in masks]
    hashes = undisturbed.fingerprint()
    for row in pd.concat(found).to_dict("records"):
        assert row["mask_sha256"] + row["soft_sha256"] == hashes.pop(row["case"])
    assert hashes.keys() == {"weights"}


def test_a_cluster_with_accounting(planned_project, undisturbed, tmp_path):
    missing = missing_programs(accounting=True)
    if missing:
        pytest.skip(f"no {', '.join(missing)}; on Debian: apt-get install slurmdbd mariadb-server")
    project_folder = tmp_path / "project"
    shutil.copytree(planned_project, project_folder)
    folder = Path(tempfile.mkdtemp(prefix="cotrain-slurm-"))
    try:
        with Cluster(folder, accounting=True) as accounting:
            project = Project(project_folder, accounting)
            controller = project.start(TRAINED)
            project.wait_for_epochs(3)
            accounting.run("scancel", project.job()["id"])
            assert controller.wait(600) == 0, project.said()[-3000:]
            states = accounting.run("sacct", "--allusers", "-X", "-n", "-P", "--format=State")
            assert [state.split()[0] for state in states.splitlines()] == ["CANCELLED", "COMPLETED"]
            assert project.fingerprint().items() <= undisturbed.fingerprint().items()
    finally:
        shutil.rmtree(folder)
