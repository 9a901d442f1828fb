"""The DAG: in, settings and a case table; out, which jobs run, who teaches whom, what runs again.

Jobs are read from `snakemake -n`. Finished runs are made with a stand-in for the `cotrain` command
that writes the declared outputs: what is tested here is the workflow, not the commands.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import yaml

CLONE = Path(__file__).parents[2]
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--snakefile", str(CLONE / "Snakefile")]


class Plan(NamedTuple):
    """What `snakemake -n` says: the number of jobs of each rule, and their commands."""

    jobs: Counter
    commands: list[dict[str, str]]
    text: str

    def of(self, command: str) -> list[dict[str, str]]:
        return [each for each in self.commands if each["command"] == command]

    def trained(self) -> set[str]:
        """Return e.g. `cotrain/round-00/train_2d` for every training."""
        return {each["--out-dir"].removeprefix("results/tiny/") for each in self.of("train")}

    def teachers(self) -> dict[str, str]:
        """Return what teaches each training: e.g. `round-01/teacher_3d`, or `` for labels alone."""
        masks = {each["--out"]: each["--masks"] for each in self.of("audit")}
        return {
            each["--out-dir"].removeprefix("results/tiny/"): (
                masks[each["--audit"]].removeprefix("results/tiny/cotrain/")
                if "--audit" in each
                else ""
            )
            for each in self.of("train")
        }

    def sources(self) -> dict[str, list[str]]:
        """Return the pseudo-masks that each merged set is the mean of, all in the arm cotrain."""
        return {
            each["--out-dir"].removeprefix("results/tiny/cotrain/"): [
                folder.removeprefix("results/tiny/cotrain/") for folder in each["--masks"].split()
            ]
            for each in self.of("merge")
            if "teacher" in each["--out-dir"]
        }


def with_command(project: Path, name: str, script: str = "") -> Path:
    """Return the project with a command on the path of its tests, which does nothing or so much."""
    command = project / "bin" / name
    command.parent.mkdir(exist_ok=True)
    command.write_text(f"#!/bin/sh\n{script}")
    command.chmod(0o755)
    return project


def snakemake(folder: Path, *options: str, **more_environment: str) -> subprocess.CompletedProcess:
    """Run Snakemake in `folder` with the stand-in for `cotrain` on the path."""
    stand_in = f'exec {sys.executable} -S {CLONE}/tests/workflow/stand_in.py "$@"\n'
    with_command(folder, "cotrain", stand_in)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*SNAKEMAKE, *options],
        cwd=folder,
        env={**os.environ, "PATH": path, **more_environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def settings_file(folder: Path, **changes: object) -> Path:
    """Write the test's settings with `changes` (`a__b=1` sets `b` in section `a`).

    Where nothing else is said 2D teaches first, and no training follows the rounds: `cotraining={}`
    has the defaults.
    """
    content = {
        "experiment": "tiny",
        "cases": "cases.tsv",
        "labels": {"a": 1, "b": 2},
        "rounds": 2,
        "cotraining": {"first_teacher": "2d", "last_epochs": 0},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = content
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_cases(folder: Path, *, labelled: int = 2, unlabelled: int = 4, test: int = 2) -> None:
    """Write a case table and its files, which are empty: the DAG only asks whether they exist."""
    splits = ["labelled"] * labelled + ["unlabelled"] * unlabelled + ["test"] * test
    rows = ["case\timage\tlabel\tsplit"]
    (folder / "data").mkdir()
    for number, split in enumerate(splits):
        image, label = f"data/image_{number}.nii.gz", f"data/label_{number}.nii.gz"
        (folder / image).touch()
        (folder / label).touch()
        # Absolute, so that a copy of the project reads the same files.
        rows.append(f"case_{number}\t{folder / image}\t{folder / label}\t{split}")
    (folder / "cases.tsv").write_text("\n".join(rows) + "\n")


def planned(folder: Path, *options: str, **changes: object) -> Plan:
    """Return what a dry run with these settings would do."""
    config = settings_file(folder, **changes)
    ran = snakemake(folder, "-n", "--configfile", str(config), *options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    text = ran.stdout
    jobs = Counter()
    if "Job stats:" in text:
        table = text.rsplit("Job stats:", 1)[1].split("total", 1)[0]
        jobs = Counter(
            {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.M)}
        )
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("cotrain "):
            commands.append(options_in(line.split(" >logs/")[0]))
    return Plan(jobs, commands, text)


def options_in(line: str) -> dict[str, str]:
    """Return {option: its values, joined by a blank} of a command line, and its `command`."""
    _, command, *words = shlex.split(line)
    found = {"command": command}
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word
            found[option] = ""
        else:
            found[option] = f"{found[option]} {word}".strip()
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_cases(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose two rounds are done."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    folder.mkdir()
    write_cases(folder)
    ran = snakemake(folder, "--configfile", str(settings_file(folder)))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


@pytest.fixture
def finished_by_default(project: Path) -> Path:
    """A project whose two rounds and last training are done, by the default recipe."""
    ran = snakemake(project, "--configfile", str(settings_file(project, cotraining={})))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return project


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of that project, to change; times of change are kept."""
    copy = tmp_path / "project"
    shutil.copytree(finished_once, copy)
    return copy


# ------------------------------------------------------------------------------- job counts


def test_two_rounds_have_the_jobs_counted_by_hand(project: Path):
    assert planned(project).jobs == {
        "write_settings": 4,
        # a list for each split
        "check_data": 3,
        "describe_data": 1,
        "plan": 1,
        "preprocess": 3,
        "fetch_weights": 1,
        # 2 arms x 2 networks x 2 rounds, without the control's 2D round 00: nobody taught it
        "train": 7,
        "infer_pseudo_masks": 4,
        # the means that teach 2D and 3D in round 01
        "merge_pseudo_masks": 2,
        # 3D in round 00, 2D and 3D in round 01
        "write_verdicts": 3,
        "audit": 3,
        "draw_audit_page": 3,
        "infer_test_masks": 7,
        # the mean of both networks after the last round, in both arms
        "merge_test_masks": 2,
        "evaluate": 10,
        "summarise": 1,
        "draw_montage": 1,
        "export": 1,
        "all": 1,
    }  # fmt: skip


def test_by_default_there_are_the_jobs_counted_by_hand(project: Path):
    jobs = planned(project, cotraining={}).jobs
    # 2 arms x (2 networks x 2 rounds + the last of 3D), without the control's round 00
    assert jobs["train"] == 2 * 5 - 2
    # of every co-trained network, also the last, for the page that shows all rounds
    assert jobs["infer_pseudo_masks"] == 5
    # the means that teach 2D and 3D in round 01, and 3D at the end
    assert jobs["merge_pseudo_masks"] == jobs["audit"] == 3
    # what was trained on labels alone is the same in both arms, and infers its test masks once
    assert jobs["infer_test_masks"] == 8
    # 2 arms x (2 networks x 3 + the mean of both at the end)
    assert jobs["evaluate"] == 14


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rounds": 1, "cotraining": {}}, False),
        ({"rounds": 1}, True),
        ({"rounds": 2, "cotraining": {}}, True),
        ({"rounds": 3, "cotraining": {}}, False),
    ],
)
def test_a_rate_that_anneals_over_more_rounds_than_are_run_is_told(
    project: Path, changes: dict, told: bool
):
    config = settings_file(project, **changes)
    ran = snakemake(project, "-n", "--configfile", str(config))
    assert ran.returncode == 0, ran.stderr
    assert ("the rate anneals to 0 over 3 rounds" in ran.stdout + ran.stderr) == told
    assert ("The rate anneals to 0 over 3 rounds" in ran.stdout) == told


def test_jobs_do_not_grow_with_the_number_of_cases(tmp_path: Path):
    plans = []
    for name, unlabelled in (("few", 4), ("many", 400)):
        (tmp_path / name).mkdir()
        write_cases(tmp_path / name, unlabelled=unlabelled)
        plans.append(planned(tmp_path / name, shards=3))
    few, many = plans
    assert few.jobs == many.jobs
    assert few.jobs["infer_pseudo_masks"] == 2 * 2 * 3
    longest = max(len(line) for line in many.text.splitlines() if line.startswith("    input:"))
    assert longest < 4000


def test_there_are_never_more_shards_than_cases(project: Path):
    plan = planned(project, shards=50)
    assert plan.jobs["infer_pseudo_masks"] == 2 * 2 * 4
    assert {each["--shards"] for each in plan.of("preprocess")} == {"2", "4"}


def test_without_test_cases_nothing_is_evaluated_and_no_control_is_trained(tmp_path: Path):
    write_cases(tmp_path, test=0)
    plan = planned(tmp_path)
    assert not plan.jobs.keys() & {"infer_test_masks", "merge_test_masks", "evaluate"}
    assert {each["--arm"] for each in plan.of("train")} == {"cotrain"}
    assert "--evaluation" not in plan.of("summarise")[0]


def test_random_weights_are_not_fetched(project: Path):
    plan = planned(project, network_2d__weights="random")
    assert "fetch_weights" not in plan.jobs
    assert not any("--encoder-weights" in each for each in plan.of("train"))


def test_only_the_first_2d_training_gets_encoder_weights(project: Path):
    trainings = planned(project).of("train")
    with_weights = [each["--out-dir"] for each in trainings if "--encoder-weights" in each]
    assert with_weights == ["results/tiny/cotrain/round-00/train_2d"]


def test_a_transductive_pool_is_declared(project: Path):
    plan = planned(project, pool="transductive", shards=9)
    assert all("--transductive" in each for each in plan.of("check-data"))
    assert "test images" in plan.of("summarise")[0]["--note"]
    # 4 unlabelled and 2 test images
    assert {each["--shards"] for each in plan.of("merge") if "teacher" in each["--out-dir"]} == {
        "6"
    }
    assert "test images" not in planned(project).of("summarise")[0].get("--note", "")


@pytest.mark.parametrize("scheduler", ["ilp", "greedy"])
def test_where_jobs_wait_for_each_other_co_training_comes_before_its_control(
    project: Path, scheduler: str
):
    config = settings_file(project, cotraining__last_epochs=1)
    ran = snakemake(
        *(project, "--cores", "1", "--scheduler", scheduler, "--configfile", str(config))
    )
    assert ran.returncode == 0, ran.stderr
    began = [
        (int(round), arm)
        for arm, round in re.findall(r"--arm (\w+) +\\?\s*--round (\d+)", ran.stdout + ran.stderr)
    ]
    arms = [arm for _, arm in began]
    assert arms.count("cotrain") == 5
    assert arms.count("labels_only") == 4
    assert arms == sorted(arms)


def test_a_gpu_is_asked_for_unless_the_device_is_the_cpu(project: Path):
    assert "gpu=1" in planned(project).text
    assert "gpu=1" not in planned(project, compute__device="cpu").text
    batches = {"network_2d__batch_size": 8, "network_3d__batch_size": 2}
    together = planned(project, compute__gpus_per_training=2, **batches).text
    assert "gpu=2, nodes=1" in together
    assert "mem_mb=32000" in together
    # A batch holds a probability for each label.
    five = {name: value for value, name in enumerate("abcde", start=1)}
    assert "mem_mb=20500" in planned(project, labels=five).text


# ------------------------------------------------------------------------- who teaches whom


def test_round_00_of_2d_has_no_teacher(project: Path):
    assert planned(project).teachers()["cotrain/round-00/train_2d"] == ""


def test_an_audit_of_masks_that_teach_nobody_is_refused_with_the_first_that_is_there(project: Path):
    config = settings_file(project, cotraining__first_teacher="both_labels_only")
    audits = "results/tiny/cotrain/round-{}/audit/train_{}.html"
    refused, planned = (
        snakemake(project, audits.format(*which), "-n", "--configfile", str(config))
        for which in (("00", "3d"), ("01", "2d"))
    )
    assert f"the first audit is {audits.format('01', '2d')}." in refused.stdout + refused.stderr
    assert refused.returncode != 0
    assert planned.returncode == 0


def test_with_first_teacher_2d_it_teaches_3d_at_once(project: Path):
    plan = planned(project, rounds=3, cotraining__first_teacher="2d", cotraining__teacher="other")
    assert plan.teachers() == {
        "cotrain/round-00/train_2d": "",
        "cotrain/round-00/train_3d": "round-00/pseudo_2d",
        "cotrain/round-01/train_2d": "round-00/pseudo_3d",
        "cotrain/round-01/train_3d": "round-01/pseudo_2d",
        "cotrain/round-02/train_2d": "round-01/pseudo_3d",
        "cotrain/round-02/train_3d": "round-02/pseudo_2d",
        "labels_only/round-00/train_3d": "",
        "labels_only/round-01/train_2d": "",
        "labels_only/round-01/train_3d": "",
        "labels_only/round-02/train_2d": "",
        "labels_only/round-02/train_3d": "",
    }
    assert plan.sources() == {}


def test_the_mean_of_both_latest_mask_sets_teaches(project: Path):
    plan = planned(project, rounds=3, cotraining__first_teacher="2d", cotraining__teacher="mean")
    taught = {stage: masks for stage, masks in plan.teachers().items() if masks}
    assert taught == {
        "cotrain/round-00/train_3d": "round-00/pseudo_2d",
        "cotrain/round-01/train_2d": "round-01/teacher_2d",
        "cotrain/round-01/train_3d": "round-01/teacher_3d",
        "cotrain/round-02/train_2d": "round-02/teacher_2d",
        "cotrain/round-02/train_3d": "round-02/teacher_3d",
    }
    assert plan.sources() == {
        "round-01/teacher_2d": ["round-00/pseudo_2d", "round-00/pseudo_3d"],
        "round-01/teacher_3d": ["round-01/pseudo_2d", "round-00/pseudo_3d"],
        "round-02/teacher_2d": ["round-01/pseudo_2d", "round-01/pseudo_3d"],
        "round-02/teacher_3d": ["round-02/pseudo_2d", "round-01/pseudo_3d"],
    }
    behind = {each["--out"][-len("round-01/audit/train_2d.tsv") :]: each["--source-masks"].split()
              for each in plan.of("audit")}  # fmt: skip
    assert behind["round-01/audit/train_3d.tsv"] == [
        "results/tiny/cotrain/round-01/pseudo_2d",
        "results/tiny/cotrain/round-00/pseudo_3d",
    ]


def test_by_default_both_train_on_labels_first_and_3d_once_more_at_the_end(project: Path):
    assert planned(project, cotraining={}).teachers() == {
        "cotrain/round-00/train_2d": "",
        "cotrain/round-00/train_3d": "",
        "cotrain/round-01/train_2d": "round-01/teacher_2d",
        "cotrain/round-01/train_3d": "round-01/teacher_3d",
        "cotrain/round-02/train_3d": "round-02/teacher_3d",
        "labels_only/round-01/train_2d": "",
        "labels_only/round-01/train_3d": "",
        "labels_only/round-02/train_3d": "",
    }


@pytest.mark.parametrize("teacher", ["other", "mean"])
def test_with_both_labels_only_nobody_is_taught_in_round_00(project: Path, teacher: str):
    plan = planned(
        project, cotraining__first_teacher="both_labels_only", cotraining__teacher=teacher
    )
    own = {"other": ("round-00/pseudo_3d", "round-01/pseudo_2d"),
           "mean": ("round-01/teacher_2d", "round-01/teacher_3d")}[teacher]  # fmt: skip
    assert plan.teachers() == {
        "cotrain/round-00/train_2d": "",
        "cotrain/round-00/train_3d": "",
        "cotrain/round-01/train_2d": own[0],
        "cotrain/round-01/train_3d": own[1],
        "labels_only/round-01/train_2d": "",
        "labels_only/round-01/train_3d": "",
    }


def test_one_way_2d_teaches_and_learns_from_labels_alone(project: Path):
    plan = planned(project, rounds=3, cotraining__teacher="2d")
    # The 2D network of the control is the same training, and is not run again.
    assert plan.teachers() == {
        "cotrain/round-00/train_2d": "",
        "cotrain/round-00/train_3d": "round-00/pseudo_2d",
        "cotrain/round-01/train_2d": "",
        "cotrain/round-01/train_3d": "round-01/pseudo_2d",
        "cotrain/round-02/train_2d": "",
        "cotrain/round-02/train_3d": "round-02/pseudo_2d",
        "labels_only/round-00/train_3d": "",
        "labels_only/round-01/train_3d": "",
        "labels_only/round-02/train_3d": "",
    }


def test_with_teacher_self_each_network_learns_from_its_own_masks(project: Path):
    plan = planned(
        project, cotraining__teacher="self", cotraining__first_teacher="both_labels_only"
    )
    taught = {stage: masks for stage, masks in plan.teachers().items() if masks}
    assert taught == {
        "cotrain/round-01/train_2d": "round-00/pseudo_2d",
        "cotrain/round-01/train_3d": "round-00/pseudo_3d",
    }


LAST = {"rounds": 2, "cotraining": {"last_epochs": 5}}


def test_after_the_rounds_3d_alone_learns_from_the_mean_of_all_last_masks(project: Path):
    plan = planned(project, **LAST)
    in_round = {stage: masks for stage, masks in plan.teachers().items() if "round-02" in stage}
    assert in_round == {
        "cotrain/round-02/train_3d": "round-02/teacher_3d",
        "labels_only/round-02/train_3d": "",
    }
    assert plan.sources()["round-02/teacher_3d"] == ["round-01/pseudo_2d", "round-01/pseudo_3d"]
    settings = {
        each["--out-dir"].removeprefix("results/tiny/"): each["--settings"]
        for each in plan.of("train")
    }
    for arm in ("cotrain", "labels_only"):
        assert settings[f"{arm}/round-02/train_3d"] == "results/tiny/settings/train_last.yaml"
        assert settings[f"{arm}/round-01/train_3d"] == "results/tiny/settings/train_3d.yaml"
    (exported,) = plan.of("export")
    assert exported["--checkpoint"] == "results/tiny/cotrain/round-02/train_3d/checkpoint.pth"
    # The 2D network stands as the round before left it, also in the mean of both.
    scored = {each["--out"]: each["--masks"] for each in plan.of("evaluate")}
    folder = "results/tiny/evaluation/cotrain"
    assert scored[f"{folder}_2d_round-02.tsv"] == "results/tiny/cotrain/round-01/test_2d"
    assert scored[f"{folder}_3d_round-02.tsv"] == "results/tiny/cotrain/round-02/test_3d"
    means = {each["--out-dir"]: each["--masks"] for each in plan.of("merge")}
    assert means["results/tiny/cotrain/round-02/test_mean"] == (
        "results/tiny/cotrain/round-01/test_2d results/tiny/cotrain/round-02/test_3d"
    )


@pytest.mark.parametrize(
    ("masks", "changes", "heard"),
    [
        ("pseudo_3d", {"rounds": 2}, False),
        ("pseudo_3d", LAST, True),
        ("pseudo_2d", {"rounds": 2}, True),
        ("teacher_3d", {"rounds": 2}, True),
        ("teacher_3d", {"rounds": 2, "cotraining__teacher": "other"}, False),
    ],
)
def test_a_verdict_on_masks_that_teach_nobody_is_told(
    project: Path, masks: str, changes: dict, heard: bool
):
    (project / "review.tsv").write_text(
        f"case\tround\tmasks\tverdict\tmask\ncase_3\t1\t{masks}\texclude\t\n"
    )
    config = settings_file(project, review="review.tsv", **changes)
    ran = snakemake(project, "-n", "--configfile", str(config))
    assert ran.returncode == 0, ran.stderr
    told = f"the verdict on {masks} of case_3 in round 1 changes nothing"
    assert (told in ran.stdout + ran.stderr) != heard


@pytest.mark.parametrize(
    ("teacher", "masks"),
    [
        ("other", "round-02/teacher_3d"),
        ("2d", "round-01/pseudo_2d"),
        ("self", "round-01/pseudo_3d"),
    ],
)
def test_the_last_training_has_the_peers_own_teacher(project: Path, teacher: str, masks: str):
    changes = {"cotraining__teacher": teacher, "cotraining__first_teacher": "both_labels_only"}
    plan = planned(project, **LAST, **changes)
    assert plan.teachers()["cotrain/round-02/train_3d"] == masks


def test_every_round_goes_on_from_the_round_before(project: Path):
    plan = planned(project, rounds=3)
    previous = {
        each["--out-dir"].removeprefix("results/tiny/"): each.get("--previous", "")
        .removeprefix("results/tiny/")
        .removesuffix("/checkpoint.pth")
        for each in plan.of("train")
    }
    assert previous == {
        "cotrain/round-00/train_2d": "",
        "cotrain/round-00/train_3d": "",
        "cotrain/round-01/train_2d": "cotrain/round-00/train_2d",
        "cotrain/round-01/train_3d": "cotrain/round-00/train_3d",
        "cotrain/round-02/train_2d": "cotrain/round-01/train_2d",
        "cotrain/round-02/train_3d": "cotrain/round-01/train_3d",
        "labels_only/round-00/train_3d": "",
        # nobody taught 2D in round 00, so both arms share that training
        "labels_only/round-01/train_2d": "cotrain/round-00/train_2d",
        "labels_only/round-01/train_3d": "labels_only/round-00/train_3d",
        "labels_only/round-02/train_2d": "labels_only/round-01/train_2d",
        "labels_only/round-02/train_3d": "labels_only/round-01/train_3d",
    }


@pytest.mark.parametrize(("last_epochs", "last_of_3d"), [(0, "01"), (100, "02")])
def test_the_model_is_noted_with_the_2d_network_that_ended_the_run(
    project: Path, last_epochs: int, last_of_3d: str
):
    (export,) = planned(project, cotraining__last_epochs=last_epochs).of("export")
    rounds = "results/tiny/cotrain/round"
    assert export["--checkpoint"] == f"{rounds}-{last_of_3d}/train_3d/checkpoint.pth"
    assert export["--averaged-with"] == f"{rounds}-01/train_2d/checkpoint.pth"


# -------------------------------------------------------------------------- what runs again


def test_nothing_is_left_to_do_after_a_run(finished_once: Path):
    assert not planned(finished_once).jobs


def test_a_third_round_adds_exactly_its_own_jobs(finished: Path):
    plan = planned(finished, rounds=3)
    assert plan.jobs == {
        "train": 4,
        "infer_pseudo_masks": 2,
        "merge_pseudo_masks": 2,
        "write_verdicts": 2,
        "audit": 2,
        "draw_audit_page": 2,
        "infer_test_masks": 4,
        "merge_test_masks": 2,
        "evaluate": 6,
        # what shows all rounds, or the last
        "summarise": 1,
        "draw_montage": 1,
        "export": 1,
        "all": 1,
    }
    assert {each["--round"] for each in plan.of("train")} == {"02"}


def test_a_last_training_added_to_a_finished_run_trains_3d_alone(finished: Path):
    plan = planned(finished, cotraining__last_epochs=5)
    assert plan.trained() == {"cotrain/round-02/train_3d", "labels_only/round-02/train_3d"}
    inferred = {each["--out-dir"].removeprefix("results/tiny/") for each in plan.of("infer")}
    assert inferred == {
        "cotrain/round-02/pseudo_3d",
        "cotrain/round-02/test_3d",
        "labels_only/round-02/test_3d",
    }


def test_a_round_added_before_the_last_training_repeats_that_one(project: Path):
    first, second = (planned(project, **LAST | {"rounds": rounds}) for rounds in (2, 3))
    where = "cotrain/round-02/train_3d"
    settings = [
        {each["--out-dir"].removeprefix("results/tiny/"): each["--settings"] for each in of}
        for of in (first.of("train"), second.of("train"))
    ]
    # Another input, so that Snakemake trains it anew as one of the rounds.
    assert settings[0][where] == "results/tiny/settings/train_last.yaml"
    assert settings[1][where] == "results/tiny/settings/train_3d.yaml"
    assert second.trained() - first.trained() == {
        "cotrain/round-02/train_2d",
        "cotrain/round-03/train_3d",
        "labels_only/round-02/train_2d",
        "labels_only/round-03/train_3d",
    }


def test_a_changed_audit_setting_retrains_nothing(finished: Path):
    jobs = planned(finished, audit__max_cases=7).jobs
    assert jobs == {"draw_audit_page": 3, "all": 1}


def test_a_changed_3d_learning_rate_reruns_3d_and_what_follows(finished: Path):
    trained = planned(finished, training_3d__learning_rate=0.0007).trained()
    assert trained == {
        "cotrain/round-00/train_3d",
        "labels_only/round-00/train_3d",
        "labels_only/round-01/train_3d",
        # taught by the new 3D network's masks
        "cotrain/round-01/train_2d",
        "cotrain/round-01/train_3d",
    }


def test_a_command_notes_what_it_sets_out_to_make_again(finished: Path):
    config = settings_file(finished, training_3d__learning_rate=0.0007)
    ran = snakemake(finished, "--cores", "2", "--configfile", str(config))
    assert ran.returncode == 0, ran.stderr
    assert (
        "tiny: `training_3d.learning_rate` is 0.0007, was 0.001. What was made with" in ran.stderr
    )
    assert "is made again" not in snakemake(finished, "-n", "--configfile", str(config)).stderr
    notice = json.loads((finished / ".snakemake/command-tiny.json").read_text())
    assert notice["ended"]
    noted = notice["sets_out_to_make"]
    assert {each.removeprefix("results/tiny/") for each in noted if "/train_" in each} == {
        "cotrain/round-00/train_3d",
        "cotrain/round-01/train_2d",
        "cotrain/round-01/train_3d",
        "labels_only/round-00/train_3d",
        "labels_only/round-01/train_3d",
    }
    assert "results/tiny/cotrain/round-00/pseudo_3d" in noted
    assert "results/tiny/cotrain/round-00/pseudo_2d" not in noted


def test_a_gpu_that_is_asked_for_and_not_there_is_told_at_once(project: Path):
    config = settings_file(project, compute__device="cuda")
    ran = snakemake(project, "--configfile", str(config), "--until", "write_settings")
    assert "compute.device is cuda, but this machine has no nvidia-smi" in ran.stderr


@pytest.mark.parametrize("job", [None, "17"])
def test_trainings_on_a_login_node_are_warned_of(project: Path, job: str | None):
    """Where there is `sbatch`, a run that is no job itself may lack its profile."""
    config = settings_file(with_command(project, "sbatch"))
    environment = {} if job is None else {"SLURM_JOB_ID": job}
    ran = snakemake(project, "--configfile", str(config), "--cores", "2", **environment)
    assert ran.returncode == 0, ran.stderr
    assert ("none in SLURM's queue" in ran.stderr) == (job is None)


@pytest.mark.parametrize("limit", [(), ("--resources", "gpu=1")])
def test_jobs_that_would_share_a_gpu_are_warned_of(project: Path, limit: tuple[str, ...]):
    with_command(project, "nvidia-smi")
    config = settings_file(project, compute__device="cuda")
    ran = snakemake(project, "--configfile", str(config), *limit, "--until", "write_settings")
    assert ran.returncode == 0, ran.stderr
    assert ("give --resources gpu=1" in ran.stderr) == (not limit)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cores", "8"], "Of 2 GPUs 1 can be used at a time: a training of tiny takes 8 of 8"),
        (["--cores", "16"], "takes 12 of 16 cores; give --set-threads train=8."),
        (["--cores", "24"], None),
        (["--cores", "8", "--set-threads", "train=4"], None),
    ],
)
def test_gpus_for_which_there_are_too_few_cores_are_warned_of(project: Path, options, said):
    with_command(project, "nvidia-smi")
    config = settings_file(project, compute__device="cuda")
    command = ["--configfile", str(config), "--resources", "gpu=2", "--until", "write_settings"]
    ran = snakemake(project, *command, *options)
    assert ran.returncode == 0, ran.stderr
    assert "can be used at a time" not in ran.stderr if said is None else said in ran.stderr


def test_gpus_are_warned_of_once_for_experiments_that_train_alike(project: Path):
    with_command(project, "nvidia-smi")
    (project / "experiments.tsv").write_text("experiment\tseed\nfirst\t0\nsecond\t1\n")
    config = settings_file(project, compute__device="cuda", experiments="experiments.tsv")
    command = ["--configfile", str(config), "--resources", "gpu=2", "--until", "write_settings"]
    ran = snakemake(project, *command, "--cores", "8")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("can be used at a time: a training of first takes 8 of 8") == 1
    assert "training of second" not in ran.stderr


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        (("--cores", "3"), True),
        (("--cores", "4"), False),
        (("--cores", "3", "--set-threads", "train=3"), False),
    ],
)
def test_threads_that_a_small_login_node_cuts_are_told(project: Path, options, is_said):
    config = settings_file(with_command(project, "squeue"))
    # Only jobs that run where the command was typed.
    words = ("--executor", "slurm", "--jobs", "1", "--until", "write_settings")
    ran = snakemake(project, "--configfile", str(config), *words, *options)
    assert ran.returncode == 0, ran.stderr
    said = "A training of tiny gets 3 of 4 threads, because this machine has no more cores"
    assert (said in ran.stderr) == is_said


def test_a_command_beside_a_living_one_on_another_machine_is_refused(project: Path):
    notice = project / ".snakemake/command-tiny.json"
    notice.parent.mkdir()
    owner = {"host": "login1", "pid": 7, "born": "1", "slurm_job": "", "cluster": ""}
    notice.write_text(json.dumps(owner | {"heartbeat": time.time()}))
    text = refused(project, settings_file(project))
    assert "Another command for tiny runs in this folder (process 7 on login1" in text


def test_a_comment_in_the_configfile_changes_nothing(finished_once: Path):
    config = settings_file(finished_once)
    config.write_text(f"# a comment\n{config.read_text()}")
    ran = snakemake(finished_once, "-n", "--configfile", str(config))
    assert "Nothing to be done" in ran.stdout + ran.stderr


def planned_with_corrected(path: Path, folder: Path) -> Plan:
    """Return what a dry run would do if another file were moved there; then it is put back.

    With an older time of its own, as after `mv` or `rsync -a`.
    """
    before = path.stat()
    path.write_text("corrected")
    os.utime(path, (0, 0))
    try:
        return planned(folder)
    finally:
        path.write_text("")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_corrected_label_is_learnt_anew(finished: Path, finished_once: Path):
    plan = planned_with_corrected(finished_once / "data/label_0.nii.gz", finished)
    assert plan.jobs["preprocess"] > 0
    assert "cotrain/round-00/train_2d" in plan.trained()


def test_masks_are_scored_anew_by_a_corrected_test_label(finished: Path, finished_once: Path):
    plan = planned_with_corrected(finished_once / "data/label_6.nii.gz", finished)
    scores = list((finished_once / "results/tiny/evaluation").glob("*.tsv"))
    assert plan.jobs["evaluate"] == len(scores) > 0
    assert plan.trained() == set()


def test_an_added_unlabelled_case_retrains_what_it_teaches_and_no_control(finished: Path):
    (finished / "more.nii.gz").touch()
    with open(finished / "cases.tsv", "a") as table:
        table.write(f"more\t{finished}/more.nii.gz\t\tunlabelled\n")
    plan = planned(finished)
    assert plan.trained() == {
        "cotrain/round-00/train_3d",
        "cotrain/round-01/train_2d",
        "cotrain/round-01/train_3d",
    }
    # The test cases' list follows that of the unlabelled ones.
    assert {each.get("--list") for each in plan.of("check-data")} == {"unlabelled", "test", None}
    assert {Path(each["--cases"]).stem for each in plan.of("preprocess")} == {"unlabelled", "test"}


def test_by_default_more_unlabelled_cases_and_rounds_leave_round_00_as_it_is(
    finished_by_default: Path,
):
    assert not planned(finished_by_default, cotraining={}).jobs
    taught = {"cotrain/round-01/train_2d", "cotrain/round-01/train_3d"}
    more_rounds = planned(finished_by_default, cotraining={}, rounds=3).trained()
    assert more_rounds == {
        f"{arm}/round-{round}/train_{network}"
        for arm in ("cotrain", "labels_only")
        for round, network in (("02", "2d"), ("02", "3d"), ("03", "3d"))
    }
    (finished_by_default / "more.nii.gz").touch()
    with open(finished_by_default / "cases.tsv", "a") as table:
        table.write(f"more\t{finished_by_default}/more.nii.gz\t\tunlabelled\n")
    more_cases = planned(finished_by_default, cotraining={}).trained()
    assert more_cases == taught | {"cotrain/round-02/train_3d"}


def test_a_corrected_unlabelled_image_is_segmented_anew(finished: Path, finished_once: Path):
    plan = planned_with_corrected(finished_once / "data/image_3.nii.gz", finished)
    assert "results/tiny/cases/unlabelled.tsv" in {
        each["--cases"] for each in plan.of("preprocess")
    }
    assert "cotrain/round-00/train_3d" in plan.trained()
    assert "labels_only/round-00/train_3d" not in plan.trained()


def test_a_corrected_file_is_not_forgotten_where_a_run_ended_after_its_list(
    finished: Path, finished_once: Path
):
    path = finished_once / "data/image_3.nii.gz"
    before = path.stat()
    path.write_text("corrected")
    try:
        words = ("--cores", "2", "--configfile", str(settings_file(finished)))
        ran = snakemake(finished, "results/tiny/cases/unlabelled.tsv", *words)
        assert ran.returncode == 0, ran.stderr
        assert "cotrain/round-00/train_3d" in planned(finished).trained()
    finally:
        path.write_text("")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_before_a_last_training_the_round_before_it_is_kept_for_more_rounds(
    finished_by_default: Path,
):
    """What results/README.md says under "When you are done"."""
    added = planned(finished_by_default, cotraining={}, rounds=3).trained()
    for checkpoint in finished_by_default.glob("results/tiny/*/round-00/train_*/checkpoint.pth"):
        checkpoint.unlink()
    assert planned(finished_by_default, cotraining={}).jobs == {}
    assert planned(finished_by_default, cotraining={}, rounds=3).trained() == added
    # The last round but one, by number, is the one that an added round goes on from.
    for checkpoint in finished_by_default.glob("results/tiny/*/round-01/train_*/checkpoint.pth"):
        checkpoint.unlink()
    lost = planned(finished_by_default, cotraining={}, rounds=3).trained()
    assert {"cotrain/round-01/train_2d", "cotrain/round-01/train_3d"} <= lost


def test_what_may_be_removed_is_missed_only_by_a_later_change(finished: Path):
    """What results/README.md says under "When you are done"."""
    results = finished / "results/tiny"
    added = planned(finished, rounds=3).trained()
    assert added == {
        f"{arm}/round-02/train_{network}"
        for arm in ("cotrain", "labels_only")
        for network in ("2d", "3d")
    }
    # While a round may be added.
    earlier = list(results.glob("*/round-00/train_*/checkpoint.pth"))
    assert earlier
    for checkpoint in earlier:
        checkpoint.unlink()
    assert planned(finished).jobs == {}
    assert planned(finished, rounds=3).trained() == added
    # When nothing will be changed any more.
    for checkpoint in results.glob("labels_only/round-*/train_*/checkpoint.pth"):
        checkpoint.unlink()
    for split in ("labelled", "unlabelled", "test"):
        shutil.rmtree(results / "preprocessed" / split)
    assert planned(finished).jobs == {}
    later = planned(finished, rounds=3)
    assert later.jobs["preprocess"] >= 3
    assert {"cotrain/round-00/train_3d", "cotrain/round-01/train_3d", *added} <= later.trained()


def test_an_added_test_case_retrains_nothing(finished: Path):
    (finished / "more.nii.gz").touch()
    with open(finished / "cases.tsv", "a") as table:
        table.write(f"more\t{finished}/more.nii.gz\t\ttest\n")
    plan = planned(finished)
    assert plan.trained() == set()
    assert plan.jobs["infer_test_masks"] == 7


def test_a_comment_in_the_case_table_draws_its_page_again_and_no_more(finished: Path):
    table = finished / "cases.tsv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join(["# sorted by hand", header, *rows]) + "\n")
    assert planned(finished).jobs == {"describe_data": 1, "all": 1}


def test_the_same_cases_in_a_table_of_another_name_draw_its_page_again_and_no_more(finished: Path):
    (finished / "cases.tsv").rename(finished / "cases_v2.tsv")
    assert planned(finished, cases="cases_v2.tsv").jobs == {"describe_data": 1, "all": 1}


def test_a_mistyped_verdict_is_refused(project: Path):
    (project / "review.tsv").write_text(
        "case\tround\tmasks\tverdict\tmask\tby\tdate\ncase_2\t0\tpseudo2d\texclude\t\tab\t\n"
    )
    assert "pseudo2d" in refused(project, settings_file(project, review="review.tsv"))


@pytest.mark.parametrize("round_", ["", "7", "001"])
def test_a_verdict_on_a_round_that_there_is_not_is_refused(project: Path, round_: str):
    (project / "review.tsv").write_text(
        f"case\tround\tmasks\tverdict\tmask\ncase_2\t{round_}\tpseudo_2d\texclude\t\n"
    )
    text = refused(project, settings_file(project, review="review.tsv"))
    assert f"there is no round {round_!r}, wanted one of 00, 01" in text


def test_an_audit_table_with_the_same_content_retrains_nothing(finished: Path):
    audit = finished / "results/tiny/cotrain/round-00/audit/train_3d.tsv"
    audit.write_text(audit.read_text())
    assert planned(finished).jobs == {}


def test_a_changed_audit_table_retrains_what_it_taught(finished: Path):
    audit = finished / "results/tiny/cotrain/round-00/audit/train_3d.tsv"
    audit.write_text(audit.read_text() + "more\n")
    assert planned(finished).trained() == {
        "cotrain/round-00/train_3d",
        "cotrain/round-01/train_2d",
        "cotrain/round-01/train_3d",
    }


def test_a_verdict_reruns_what_its_masks_taught_and_no_earlier_round(finished: Path):
    (finished / "review.tsv").write_text(
        "case\tround\tmasks\tverdict\tmask\tby\tdate\n"
        "case_3\t1\tpseudo_2d\texclude\t\tanna\t2026-01-01\n"
    )
    plan = planned(finished, review="review.tsv")
    assert plan.trained() == {"cotrain/round-01/train_3d"}
    # Not the table itself, which a person may be writing while the audit runs.
    verdicts = "results/tiny/cotrain/round-01/audit/verdicts_3d.txt"
    assert [each["--review"] for each in plan.of("audit")] == [verdicts]


def test_more_verdicts_than_a_command_holds_are_refused_with_the_remedy(finished: Path):
    rows = [f"case_3\t1\tpseudo_2d\texclude\tanna\t2026-01-{day:02d}\n" for day in range(1, 29)]
    header = "case\tround\tmasks\tverdict\tby\tdate\n"
    (finished / "review.tsv").write_text(header + "".join(rows * 120))
    config = str(settings_file(finished, review="review.tsv"))
    ran = snakemake(finished, "--configfile", config)
    assert ran.returncode != 0
    assert "review.tsv: 3360 verdicts are on masks that teach the 3d network in" in ran.stderr
    assert "take cases that shall not teach out of cases.tsv" in ran.stderr


def test_the_file_of_a_corrected_mask_is_an_input(finished: Path):
    (finished / "mine.nii.gz").touch()
    (finished / "review.tsv").write_text(
        "case\tround\tmasks\tverdict\tmask\tby\tdate\n"
        "case_3\t01\tteacher_2d\treplace\tmine.nii.gz\tanna\t2026-01-01\n"
    )
    plan = planned(finished, review="review.tsv")
    assert plan.trained() == {"cotrain/round-01/train_2d", "cotrain/round-01/train_3d"}
    assert "mine.nii.gz" in plan.text
    config = str(settings_file(finished, review="review.tsv"))
    assert snakemake(finished, "--configfile", config).returncode == 0
    assert planned(finished, review="review.tsv").jobs == {}
    # Another one that was moved into place, saved before the last audit ran.
    (finished / "mine.nii.gz").write_text("another")
    os.utime(finished / "mine.nii.gz", (1, 1))
    assert planned(finished, review="review.tsv").jobs["audit"] == 2


AS_A_JOB = (
    *("--mode", "remote", "--force", "--no-hooks", "--ignore-incomplete", "--cores", "1"),
    *("--target-jobs", "audit:experiment=tiny,network=3d,round=00", "--allowed-rules", "audit"),
)
"""How a cluster's job calls Snakemake, and reads the Snakefile again."""


def test_settings_and_tables_that_are_edited_during_a_run_fail_none_of_its_jobs(project: Path):
    header = "case\tround\tmasks\tverdict\tmask\tby\n"
    (project / "mine.nii.gz").touch()
    verdict = 'case_3\t0\tpseudo_2d\treplace\tmine.nii.gz\t"anna ""a"" b"\n'
    (project / "review.tsv").write_text(header + verdict)
    config = ("--configfile", str(settings_file(project, rounds=1, review="review.tsv", shards=3)))
    target = "results/tiny/cotrain/round-00/audit/train_3d.tsv"
    ran = snakemake(project, target, *config, STAND_IN_TELLS="COTRAIN_READ")
    assert ran.returncode == 0, ran.stderr
    read = (project / "told").read_text()
    made = (project / target).read_text()
    # A row half typed, and so many cases less that there are fewer shards.
    (project / "review.tsv").write_text(header + verdict + "cas")
    cases = (project / "cases.tsv").read_text()
    rows = [row for row in cases.splitlines() if not row.startswith(("case_4", "case_5"))]
    (project / "cases.tsv").write_text("\n".join(rows) + "\n")
    # And settings for a second experiment, of other rounds and shards.
    settings_file(project, experiment="another", rounds=4, shards=2, review="review.tsv")
    assert snakemake(project, *AS_A_JOB, *config).returncode != 0
    job = snakemake(project, *AS_A_JOB, *config, COTRAIN_READ=read)
    assert job.returncode == 0, job.stderr
    assert (project / target).read_text() == made
    heard = pd.read_csv(project / options_in(f"cotrain {made}")["--review"], sep="\t")
    assert heard[["case", "by"]].values.tolist() == [["case_3", 'anna "a" b']]
    # The command itself reads the files; what the job noted of itself is what it asks for.
    (project / "review.tsv").write_text(header + verdict)
    (project / "cases.tsv").write_text(cases)
    settings_file(project, rounds=1, review="review.tsv", shards=3)
    again = snakemake(project, target, "-n", *config, COTRAIN_READ=read)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_killed_run_goes_on_with_the_same_command(project: Path):
    assert planned(project, rounds=1).jobs["train"] == 3
    config = str(project / "config.yaml")
    environment = {**os.environ, "PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}",
                   "STAND_IN_SECONDS": "2"}  # fmt: skip
    first = subprocess.Popen(
        [*SNAKEMAKE, "--configfile", config],
        cwd=project,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    training_log = project / "logs/tiny/cotrain/round-00/train_2d.log"
    deadline = time.monotonic() + 60
    while not training_log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (project / "results/tiny/summary/summary.txt").exists()
    again = snakemake(project, "--configfile", config)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (project / "results/tiny/summary/summary.txt").exists()


def test_a_report_is_made_with_its_captions(finished_once: Path):
    config = str(settings_file(finished_once))
    ran = snakemake(finished_once, "--configfile", config, "--report", "report.html")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = (finished_once / "report.html").read_text()
    assert "one case through the rounds" in report
    assert "learnt in round 01" in report


# ----------------------------------------------------------------- errors before any job


def refused(folder: Path, config: Path, *options: str) -> str:
    """Return what Snakemake prints about settings that it refuses, without running anything."""
    ran = snakemake(folder, "--configfile", str(config), *options)
    assert ran.returncode != 0
    assert not (folder / "results").exists()
    assert "Traceback" not in ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def test_a_misspelt_key_is_named_with_the_right_one(project: Path):
    text = refused(project, settings_file(project, training_2d__learning_rat=0.1))
    assert "unknown setting `training_2d.learning_rat`; did you mean `learning_rate`." in text


def test_a_missing_file_is_named(project: Path):
    (project / "data/image_3.nii.gz").unlink()
    text = refused(project, settings_file(project))
    assert "1 of 16 files do not exist" in text
    assert "image_3.nii.gz" in text


def test_overlapping_splits_are_named(project: Path):
    table = project / "cases.tsv"
    table.write_text(table.read_text().replace("case_7", "case_0"))
    assert "the case is in labelled and test" in refused(project, settings_file(project))


def test_a_review_table_without_a_column_is_refused(project: Path):
    (project / "review.tsv").write_text("case\tverdict\ncase_3\texclude\n")
    text = refused(project, settings_file(project, review="review.tsv"))
    assert "review.tsv lacks the columns round, masks; wanted" in text


def test_a_file_that_only_a_finished_job_read_is_missed_all_the_same(finished: Path):
    config = settings_file(finished, network_2d__weights="gone.pth")
    ran = snakemake(finished, "-n", "--configfile", str(config))
    assert ran.returncode != 0
    told = "`network_2d.weights` names the file gone.pth, which does not"
    assert told in ran.stdout + ran.stderr


def test_a_key_that_stands_twice_is_refused(project: Path):
    config = settings_file(project)
    config.write_text(config.read_text() + "rounds: 3\n")
    assert "config.yaml has `rounds` twice" in refused(project, config)


def test_a_target_of_another_experiment_is_refused(project: Path):
    text = refused(project, settings_file(project), "--cores", "1", "results/mine/model/a.json")
    assert "results/mine/model/a.json is of the experiment mine, but the settings are" in text


def test_a_command_without_the_package_on_its_path_is_refused_before_any_step(project: Path):
    words = [*SNAKEMAKE, "--configfile", str(settings_file(project)), "--cores", "1"]
    nothing = {**os.environ, "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(words, cwd=project, env=nothing, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "cotrain is not on the path, and all steps need it; activate" in ran.stderr
    assert not (project / "results").exists()


def test_needs_of_a_rule_that_there_is_not_are_refused(project: Path):
    text = refused(project, settings_file(project), "--set-resources", "trains:mem_mb=1")
    assert "for a rule `trains`, which there is not; did you mean `train`?" in text


def test_a_walltime_in_slurms_notation_is_refused(project: Path):
    """YAML takes it for 86,400, and Snakemake for minutes."""
    (project / "mine").mkdir()
    (project / "mine/config.yaml").write_text("set-resources:\n  train:\n    runtime: 24:00:00\n")
    text = refused(project, settings_file(project), "--profile", "mine")
    assert "The runtime of train is 86400 minutes, which is 60 days; give it in minutes" in text


@pytest.mark.parametrize("options", [("--profile", "mine"), ("--profile=mine",)])
def test_a_profile_that_says_a_key_twice_is_refused(project: Path, options: tuple[str, ...]):
    (project / "mine").mkdir()
    block = "set-resources:\n  {}:\n    runtime: 60\n"
    (project / "mine/config.yaml").write_text(block.format("train") + block.format("evaluate"))
    text = refused(project, settings_file(project), *options)
    assert "mine/config.yaml has `set-resources` twice, in the lines 1 and 4" in text


def test_a_channel_that_only_looks_like_ct_is_warned_of(project: Path):
    for name, is_told in (("CT_abdomen", True), ("CT", False), ("octave", False)):
        config = str(settings_file(project, channels=[name]))
        ran = snakemake(project, "-n", "--configfile", config)
        said = ran.stdout + ran.stderr
        assert ("only where it is called CT" in said) == is_told


def test_without_a_configfile_the_ready_ones_are_named(project: Path):
    ran = snakemake(project, "-n")
    assert ran.returncode != 0
    assert "No settings were given" in ran.stdout + ran.stderr


def test_settings_can_be_given_on_the_command_line(project: Path):
    table = project / "cases.tsv"
    table.write_text(table.read_text().replace(f"{project}/", ""))
    text = refused(project, settings_file(project), "--config", "data_folder=elsewhere")
    assert "16 of 16 files do not exist" in text
    assert planned(project, "--config", "rounds=1").jobs["train"] == 3


# ------------------------------------------------------------------------------------ speed


def test_parsing_imports_nothing_heavy(project: Path):
    heavy = project / "heavy"
    heavy.mkdir()
    for module in ("torch", "nnunetv2", "timm", "matplotlib", "nibabel", "scipy", "medpy"):
        (heavy / f"{module}.py").write_text(f"raise ImportError('{module} is heavy')\n")
    config = str(settings_file(project))
    ran = snakemake(project, "-n", "--configfile", config, PYTHONPATH=str(heavy))
    assert ran.returncode == 0, ran.stdout + ran.stderr


MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6)
"""
"""Runs a command in a small process of its own: a child's peak memory starts at its parent's, and
by now this one's holds torch."""


def cost_of_dry_run(folder: Path, **changes: object) -> tuple[float, float]:
    """Return processor seconds (a busy machine must not fail the test) and peak memory in GB."""
    config = str(settings_file(folder, **changes))
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *SNAKEMAKE, "-n", "--configfile", config],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    status, seconds, gigabytes = measured.stdout.split()
    assert status == "0", measured.stderr
    return float(seconds), float(gigabytes)


def test_a_small_dry_run_takes_less_than_five_seconds(project: Path):
    seconds, _ = cost_of_dry_run(project, rounds=3)
    assert seconds < 5


def test_fifty_rounds_of_ten_thousand_cases_are_planned_in_time(tmp_path: Path):
    small, large = tmp_path / "small", tmp_path / "large"
    for folder in (small, large):
        folder.mkdir()
    write_cases(small)
    write_cases(large, labelled=10, unlabelled=10_000, test=100)
    seconds, gigabytes = cost_of_dry_run(large, rounds=50, shards=10)
    # In dry runs of 3 rounds of 8 cases, because processors differ: 12 of them were measured.
    unit, _ = cost_of_dry_run(small, rounds=3)
    assert seconds < 25 * unit
    assert gigabytes < 2


def test_a_table_of_experiments_runs_them_side_by_side(tmp_path):
    write_cases(tmp_path)
    (tmp_path / "sets.tsv").write_text("experiment\tseed\tgroup\none\t1\tfew\ntwo\t2\tfew\n")
    settings_file(tmp_path, experiments="sets.tsv")
    made = snakemake(tmp_path, "--cores", "4", "--configfile", "config.yaml")
    assert made.returncode == 0, made.stderr
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"one", "two", "tiny"}
    words = (tmp_path / "results/tiny/comparison/comparison.txt").read_text()
    assert "--experiments few:one few:two" in words
    for name, seed in (("one", 1), ("two", 2)):
        stage = yaml.safe_load((tmp_path / f"results/{name}/settings/train_3d.yaml").read_text())
        assert stage["seed"] == seed
    again = snakemake(tmp_path, "--cores", "4", "--configfile", "config.yaml")
    assert "Nothing to be done" in again.stderr
