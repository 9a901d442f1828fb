"""A cluster for all tests here, and folders like a user's clone with a begun experiment."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from cluster import Cluster, missing_programs
from project import EPOCHS, MASKS, RESULTS, Project

CLONE = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Return a running cluster of three nodes, or skip."""
    missing = missing_programs()
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} here; on Debian: apt-get install slurmctld slurmd "
            "slurm-client munge"
        )
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("SLURM's nodes need root, and namespaces for names of their own")
    # A socket's path may have 107 letters, and pytest's folders are long.
    folder = Path(tempfile.mkdtemp(prefix="cotrain-slurm-"))
    try:
        with Cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def planned_project(tiny, tmp_path_factory) -> Path:
    """Return a folder in which all but the training was done, without a cluster."""
    folder = tmp_path_factory.mktemp("planned")
    for name in ("Snakefile", "workflow", "profiles", "slurm", "envs"):
        copy = shutil.copytree if (CLONE / name).is_dir() else shutil.copy
        copy(CLONE / name, folder / name)
    splits = ("labelled", "unlabelled")
    rows = [{**row, "split": split} for split in splits for row in tiny.rows(split)]
    pd.DataFrame(rows).to_csv(folder / "cases.tsv", sep="\t", index=False)
    settings = {
        "experiment": "tiny",
        "cases": "cases.tsv",
        "labels": tiny.settings.labels,
        "network_2d": {"weights": "random", "patch_size": [32, 32], "batch_size": 4},
        "network_3d": {"features_per_stage": [4, 8]},
        "training_2d": {"iterations_per_epoch": 6, "warmup_epochs": EPOCHS},
        "compute": {"device": "cpu"},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "--configfile", "settings.yaml", "--cores", "2"),
            *(f"{RESULTS}/preprocessed/{split}/manifest-0.tsv" for split in splits),
            *(f"{RESULTS}/settings/{name}.yaml" for name in ("train_2d", "infer")),
        ],
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def project(planned_project, cluster, tmp_path) -> Iterator[Project]:
    """Return a project of this test alone, to disturb; its jobs are cancelled in the end."""
    folder = tmp_path / "project"
    shutil.copytree(planned_project, folder)
    made = Project(folder, cluster, seconds_more=1)
    yield made
    for job in made.jobs():
        cluster.run("scancel", "--signal=KILL", "--full", job["id"])
        cluster.run("scancel", job["id"])


@pytest.fixture(scope="session")
def undisturbed(planned_project, cluster, tmp_path_factory) -> Project:
    """Return a project after a run on the cluster without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed") / "project"
    shutil.copytree(planned_project, folder)
    made = Project(folder, cluster)
    made.run(MASKS)
    return made
