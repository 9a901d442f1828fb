"""The command `status` on result trees written by hand and by real working folders."""

import json
import os
import re
import socket
import time

import pytest

from cotrain.__main__ import main
from cotrain.review import OUTLIVED
from cotrain.status import (
    State,
    failure_in,
    joined_state,
    seconds_per_stage,
    stage_state,
    status_text,
)
from cotrain.workfolder import WorkFolder

NOW = time.time()


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Let there be no `squeue`, whatever is installed here."""
    monkeypatch.setattr("cotrain.status.shutil.which", lambda name: None)


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def manifest(folder, number, *, cases):
    write(folder / f"manifest-{number}.tsv", "case\tmask\n" + "c\tc.nii.gz\n" * cases)


def work_in(folder, done, total, unit, *, name="step", seconds_ago=0):
    """Leave a working folder as a step does that was killed `seconds_ago`."""
    work = WorkFolder(folder / "work", {}, name=name)
    work.__enter__()
    work.claim(done=done - 1, total=total)
    work.report(done, total, unit)
    progress = folder / "work" / f"{name}.progress.json"
    sign = json.loads(progress.read_text())
    sign |= {"updated": NOW - seconds_ago, "seconds_left": 150}
    progress.write_text(json.dumps(sign))
    lock = folder / "work" / f"{name}.lock"
    # As another machine sees it, which has but the heartbeat to go by.
    owner = json.loads(lock.read_text())
    # The clock goes on while the other tests run; NOW was read when they were collected.
    heard = time.time() - seconds_ago
    lock.write_text(json.dumps(owner | {"host": "elsewhere", "heartbeat": heard}))
    os.utime(lock, (NOW - seconds_ago, NOW - seconds_ago))


def state(folder, *, cases=None):
    return stage_state(folder, cases=cases, now=NOW)


# ----------------------------------------------------------------------------------- stages


def test_a_stage_that_has_no_folder_is_waiting(tmp_path):
    assert state(tmp_path / "train_2d") == State("waiting")


def test_a_training_with_its_checkpoint_is_done(tmp_path):
    write(tmp_path / "train_2d/checkpoint.pth")
    work_in(tmp_path / "train_2d", 10, 10, "epochs")
    assert state(tmp_path / "train_2d") == State("done")


def test_a_training_heard_of_just_now_is_running(tmp_path):
    work_in(tmp_path / "train_2d", 3, 10, "epochs", seconds_ago=60)
    assert str(state(tmp_path / "train_2d")) == "running (epoch 3 of 10, 2 min left)"


def test_a_step_whose_process_has_died_on_this_machine_is_interrupted_at_once(tmp_path):
    work_in(tmp_path / "train_2d", 3, 10, "epochs")
    lock = tmp_path / "train_2d" / "work" / "step.lock"
    owner = json.loads(lock.read_text()) | {"host": socket.gethostname()}
    lock.write_text(json.dumps(owner))
    assert state(tmp_path / "train_2d").kind == "running"
    lock.write_text(json.dumps(owner | {"born": "1"}))
    assert state(tmp_path / "train_2d").kind == "interrupted"


def test_a_step_that_has_only_a_lock_is_starting(tmp_path):
    WorkFolder(tmp_path / "train_2d/work", {}).__enter__()
    assert str(state(tmp_path / "train_2d")) == "running (starting)"


def test_a_training_not_heard_of_for_long_is_interrupted(tmp_path):
    work_in(tmp_path / "train_2d", 3, 10, "epochs", seconds_ago=3700)
    last = time.localtime(NOW - 3700)
    assert re.fullmatch(
        rf"interrupted \(last sign (\d+-\d+-\d+ )?{time.strftime('%H:%M', last)}\)",
        str(state(tmp_path / "train_2d")),
    )


def test_a_finished_training_that_is_to_be_made_again_is_waiting(tmp_path):
    # Snakemake has removed its checkpoint; what it reported at its end is still there.
    work_in(tmp_path / "train_2d", 10, 10, "epochs", seconds_ago=3700)
    assert state(tmp_path / "train_2d") == State("waiting")


def test_a_failed_step_shows_the_first_line_of_its_error(tmp_path):
    with (
        pytest.raises(RuntimeError),
        WorkFolder(tmp_path / "train_3d/work", {}) as work,
    ):
        work.report(3, 10, "epochs")
        raise RuntimeError("the loss is nan\nsecond line")
    found = state(tmp_path / "train_3d")
    assert str(found) == "failed"
    assert found.detail.endswith("error.txt: RuntimeError: the loss is nan")


def test_a_file_that_is_just_being_written_is_no_sign(tmp_path):
    write(tmp_path / "train_2d" / "work" / ".writing-7-step.progress.json", '{"epo')
    assert state(tmp_path / "train_2d") == State("waiting")


def test_a_mask_set_is_done_when_its_manifests_hold_all_cases(tmp_path):
    manifest(tmp_path / "pseudo_2d", 0, cases=3)
    assert str(state(tmp_path / "pseudo_2d", cases=5)) == "3 of 5 cases"
    manifest(tmp_path / "pseudo_2d", 1, cases=2)
    assert state(tmp_path / "pseudo_2d", cases=5) == State("done")


def test_shards_of_a_mask_set_are_counted_together(tmp_path):
    manifest(tmp_path / "pseudo_2d", 0, cases=3)
    work_in(tmp_path / "pseudo_2d", 3, 3, "cases", name="shard-0", seconds_ago=900)
    work_in(tmp_path / "pseudo_2d", 1, 2, "cases", name="shard-1", seconds_ago=5)
    assert str(state(tmp_path / "pseudo_2d", cases=5)) == "running (case 4 of 5, 2 min left)"


def test_of_several_stages_the_one_that_needs_a_person_is_shown():
    done, waiting, failed = State("done"), State("waiting"), State("failed", "x")
    assert joined_state([done, failed]) == failed
    assert joined_state([done, done]) == done
    assert joined_state([waiting, waiting]) == waiting
    assert str(joined_state([done, waiting])) == "1 of 2 done"


# ------------------------------------------------------------------------------------- logs


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("epoch 1\ncotrain train: torch sees no GPU here; ask for one.\n", "cotrain train: torch"),
        ("/bin/bash: line 2: cotrain: command not found\n", "/bin/bash: line 2: cotrain: command"),
        (
            "Traceback (most recent call last):\n  File 'x'\n    y()\nOSError: the disk\nis full\n",
            "OSError: the disk",
        ),
        (
            "x\n" * 20_000 + "cotrain check-data: 2 problems:\n  - a\n  - b\n",
            "cotrain check-data: 2 problems:\n  - a\n  - b",
        ),
        ("epoch 9 (9/9)\n", None),
        ("cotrain train was interrupted; give the same command to go on.\n", None),
        ("", None),
    ],
)
def test_a_log_says_with_which_sentence_its_step_failed(tmp_path, log, sentence):
    found = failure_in(write(tmp_path / "step.log", log))
    assert found is None if sentence is None else found.startswith(sentence)


# ------------------------------------------------------------------------------------- time


def test_time_is_added_up_over_arms_rounds_and_shards(tmp_path):
    for name, seconds in {
        "plan": 5, "cotrain/round-00/train_2d": 100, "cotrain/round-01/train_2d": 110,
        "labels_only/round-00/train_2d": 90, "cotrain/round-00/pseudo_2d-0": 7,
        "cotrain/round-00/pseudo_2d-1": 8, "cotrain/round-00/audit/train_2d": 1,
        "evaluation/cotrain_3d_round-02": 2, "evaluation/labels_only_3d_round-00": 3,
    }.items():  # fmt: skip
        write(tmp_path / f"{name}.tsv", f"s\th:m:s\tmax_rss\n{seconds}\t0:00:01\t12\n")
    results = tmp_path / "results"
    assert seconds_per_stage(results, benchmarks=tmp_path) == {
        "plan": (1, 5), "train_2d": (3, 300), "pseudo_2d": (2, 15), "audit/train_2d": (1, 1),
        "evaluation/3d": (2, 5),
    }  # fmt: skip
    # The 110 s are those of the last of several allocations, and the 8 s those of a repeat.
    for stage, name, seconds in (
        ("round-01/train_2d", "step", 5000),
        ("round-00/pseudo_2d", "shard-1", 70),
    ):
        told = results / "cotrain" / stage / "work" / f"{name}.progress.json"
        write(told, json.dumps({"seconds": seconds}))
    assert seconds_per_stage(results, benchmarks=tmp_path) == {
        "plan": (1, 5), "train_2d": (3, 5190), "pseudo_2d": (2, 77), "audit/train_2d": (1, 1),
        "evaluation/3d": (2, 5),
    }  # fmt: skip


# ---------------------------------------------------------------------------- whole command


@pytest.fixture
def experiment(tmp_path):
    """Round 00 is done and scored, round 01 runs; the control's round 00 failed."""
    folder = tmp_path / "results/demo"
    write(folder / "settings/train_3d.yaml", "cotraining: {first_teacher: 2d, teacher: mean}\n")
    write(folder / "cases/unlabelled.tsv", "case\timage\tlabel\n" + "u\ti\t\n" * 4)
    write(folder / "cases/test.tsv", "case\timage\tlabel\n" + "t\ti\tl\n" * 2)
    for network in ("2d", "3d"):
        round_folder = folder / "cotrain/round-00"
        write(round_folder / f"train_{network}/checkpoint.pth")
        manifest(round_folder / f"pseudo_{network}", 0, cases=4)
        manifest(round_folder / f"test_{network}", 0, cases=2)
        write(
            folder / f"evaluation/cotrain_{network}_round-00.tsv",
            "case\tlabel\tdice\tjaccard\thd95_mm\tasd_mm\thd95_voxel\tasd_voxel\n"
            "t1\torgan\t0.8\t0.7\t1\t1\t1\t1\nt2\torgan\t0.7\t0.5\t1\t1\t1\t1\n",
        )
    work_in(folder / "cotrain/round-01/train_2d", 3, 10, "epochs", seconds_ago=20)
    write(
        folder / "labels_only/round-00/train_3d" / "work" / "step.error.txt",
        "KilledWorker: no memory\n",
    )
    write(tmp_path / "benchmarks/demo/cotrain/round-00/train_2d.tsv", "s\th:m:s\n3725.5\t1:02:05\n")
    write(tmp_path / "logs/demo/plan.log")
    return tmp_path


def test_the_status_has_a_line_per_arm_and_round(experiment, capsys):
    assert main(["status", "demo", "--results", str(experiment / "results")]) == 0
    text = capsys.readouterr().out
    lines = [re.sub(r"  +", " | ", line) for line in text.splitlines()]
    assert lines[2] == (
        "arm | round | train_2d | pseudo_2d | train_3d | pseudo_3d | test | "
        "2D Dice % | 3D Dice % | mean Dice %"
    )
    assert lines[3] == "co-trained | 00 | done | done | done | done | done | 75.0 | 75.0 | -"
    assert lines[4] == (
        "co-trained | 01 | running (epoch 3 of 10, 2 min left) | waiting | waiting | waiting | "
        "waiting | - | - | -"
    )
    # The control shares the 2D network of round 00, which nobody taught.
    assert lines[5] == "labels only | 00 | - | - | failed | - | waiting | - | - | -"
    assert "error.txt: KilledWorker: no memory" in text
    assert "train_2d | 1 | 1 h 02 min" in lines
    assert f"logs: {experiment / 'logs/demo'}" in text


def test_a_score_that_is_being_written_is_none_yet(experiment, capsys):
    write(experiment / "results/demo/evaluation/.writing-node-1-cotrain_2d_round-01.tsv", "case")
    assert main(["status", "demo", "--results", str(experiment / "results")]) == 0
    assert "75.0" in capsys.readouterr().out


def test_nothing_is_waited_for_where_no_test_case_has_a_label(experiment):
    folder = experiment / "results/demo"
    write(folder / "cases/test.tsv", "case\timage\tlabel\n" + "t\ti\t\n" * 2)
    text = status_text(folder, benchmarks=experiment / "b", logs=experiment / "l", now=NOW)
    lines = [re.sub(r"  +", " | ", line) for line in text.splitlines()]
    assert lines[4].endswith("waiting | waiting | waiting | - | - | - | -")
    assert "test 0 of 0" in text


def test_what_the_last_command_set_out_to_make_again_is_outdated(experiment):
    folder = experiment / "results/demo"
    again = ["cotrain/round-00/train_3d", "cotrain/round-00/pseudo_3d", "cotrain/round-00/test_3d"]
    notice = write(
        experiment / ".snakemake/command-demo.json",
        json.dumps({"sets_out_to_make": [f"results/demo/{each}" for each in again]}),
    )

    def first_line() -> str:
        text = status_text(folder, benchmarks=experiment / "b", logs=experiment / "l", now=NOW)
        return re.sub(r"  +", " | ", text.splitlines()[3]).removeprefix("co-trained | 00 | ")

    # The files above were just written; NOW was read when the tests were collected.
    later = time.time() + 60
    os.utime(notice, (later, later))
    # Test masks are outdated in one of two stages, and their scores with them.
    assert first_line() == "done | done | outdated | outdated | outdated | 75.0 | - | -"
    os.utime(folder / f"{again[0]}/checkpoint.pth", (later + 60, later + 60))
    assert first_line().startswith("done | done | done | outdated | outdated | ")
    (folder / f"{again[1]}/manifest-0.tsv").unlink()
    assert first_line().startswith("done | done | done | waiting | outdated | ")


def test_a_model_that_the_last_command_makes_again_is_of_the_run_before(experiment):
    folder = experiment / "results/demo"
    weights = write(folder / "model/Dataset001_cotrain/fold_all/checkpoint_final.pth")
    write(folder / "summary/summary.txt")
    notice = write(
        experiment / ".snakemake/command-demo.json",
        json.dumps({"sets_out_to_make": ["results/demo/model/Dataset001_cotrain/fold_all"]}),
    )

    def next_lines() -> list[str]:
        text = status_text(folder, benchmarks=experiment / "b", logs=experiment / "l", now=NOW)
        return text.split("look next\n")[1].splitlines()[:2]

    later = time.time() + 60
    os.utime(notice, (later, later))
    assert next_lines() == [
        f"  scores and gain: {folder}/summary/summary.txt",
        f"  the model for nnUNetv2_predict: {folder}/model (outdated: of the run before)",
    ]
    os.utime(weights, (later + 60, later + 60))
    assert next_lines()[1].endswith("/model")


def test_a_step_that_fails_before_it_opens_its_folder_is_failed(experiment):
    logs = experiment / "logs/demo/cotrain/round-01"
    said = "cotrain infer: compute.device is cuda, but torch sees no GPU here"
    write(logs / "pseudo_2d-0.log", f"{said}; ask the scheduler for one.\n")
    write(logs / "audit_3d.log", "cotrain audit: u.nii.gz was edited in place; put it back.\n")
    # Of what is done or runs, a log says nothing new.
    write(logs / "train_2d.log", "cotrain train: it is being written by another; wait.\n")
    folder = experiment / "results/demo"

    def status() -> str:
        return status_text(
            folder, benchmarks=experiment / "b", logs=experiment / "logs/demo", now=NOW
        )

    lines = [re.sub(r"  +", " | ", line) for line in status().splitlines()]
    assert lines[4].startswith("co-trained | 01 | running (epoch 3 of 10, 2 min left) | failed | ")
    assert f"{logs}/pseudo_2d-0.log: {said}" in status()
    assert f"{logs}/audit_3d.log: cotrain audit: u.nii.gz was edited" in status()
    assert "being written by another" not in status()
    # A new command has not come to them yet.
    notice = write(experiment / ".snakemake/command-demo.json", "{}")
    later = time.time() + 60
    os.utime(notice, (later, later))
    assert said not in status()
    assert "audit_3d.log" not in status()


def test_the_status_can_be_asked_for_from_inside_the_results(experiment, monkeypatch, capsys):
    write(
        experiment / ".snakemake/command-demo.json",
        json.dumps({"sets_out_to_make": ["results/demo/cotrain/round-00/train_3d"]}),
    )
    later = time.time() + 60
    os.utime(experiment / ".snakemake/command-demo.json", (later, later))
    monkeypatch.chdir(experiment / "results")
    assert main(["status", "demo", "--results", "."]) == 0
    text = capsys.readouterr().out
    assert f"logs: {os.path.join('..', 'logs', 'demo')}" in text
    assert "1 h 02 min" in text
    assert "outdated" in text


def test_a_control_waits_for_no_round_00_that_it_shares_whole(experiment):
    folder = experiment / "results/demo"
    write(
        folder / "settings/train_3d.yaml",
        "cotraining: {first_teacher: both_labels_only, teacher: other}\n",
    )
    (folder / "labels_only/round-00/train_3d" / "work" / "step.error.txt").unlink()
    (folder / "labels_only/round-00/train_3d/work").rmdir()
    (folder / "labels_only/round-00/train_3d").rmdir()
    text = status_text(folder, benchmarks=experiment / "b", logs=experiment / "l", now=NOW)
    line = re.sub(r"  +", " | ", text.splitlines()[5])
    assert line == "labels only | 00 | - | - | - | - | - | - | - | -"


def test_after_the_rounds_only_3d_is_waited_for(experiment):
    folder = experiment / "results/demo"
    write(folder / "settings/train_last.yaml", "last_round: 2\n")
    for arm in ("cotrain", "labels_only"):
        write(folder / f"{arm}/round-02/train_3d/checkpoint.pth")
    text = status_text(folder, benchmarks=experiment / "b", logs=experiment / "l", now=NOW)
    lines = [re.sub(r"  +", " | ", line) for line in text.splitlines()]
    assert "co-trained | 02 | - | - | done | waiting | waiting | - | - | -" in lines
    assert "labels only | 02 | - | - | done | - | waiting | - | - | -" in lines


def test_an_experiment_without_test_cases_waits_for_no_test(tmp_path):
    folder = tmp_path / "results/demo"
    write(folder / "cases/test.tsv", "case\timage\tlabel\n")
    write(folder / "cotrain/round-00/train_2d/checkpoint.pth")
    text = status_text(folder, benchmarks=tmp_path / "b", logs=tmp_path / "l", now=NOW)
    line = re.sub(r"  +", " | ", text.splitlines()[3])
    assert line == "co-trained | 00 | done | waiting | waiting | waiting | - | - | - | -"


@pytest.mark.parametrize(
    ("squeue", "command"),
    [
        (None, "snakemake --configfile config/demo.yaml"),
        ("/usr/bin/squeue", "snakemake --profile slurm --configfile config/demo.yaml"),
    ],
)
def test_an_experiment_without_a_round_says_how_far_its_preparation_is(
    tmp_path, monkeypatch, squeue, command
):
    monkeypatch.setattr("cotrain.status.shutil.which", lambda name: squeue)
    folder = tmp_path / "results/demo"
    write(folder / "cases/unlabelled.tsv", "case\timage\tlabel\n")
    write(folder / "cotrain/round-01/audit/verdicts_2d.txt")
    text = status_text(folder, benchmarks=tmp_path / "b", logs=tmp_path / "l", now=NOW)
    assert "No round has been started. Cases checked: yes; planned: no; preprocessed: " in text
    assert "labelled 0 of ?, unlabelled 0 of 0, test 0 of ?." in text
    assert f"start it: {command}\n" in text


def test_cases_still_preprocessed_while_rounds_run_are_counted(experiment):
    folder = experiment / "results/demo"
    for split, cases in (("labelled", 1), ("unlabelled", 3), ("test", 1)):
        write(folder / f"cases/{split}.tsv", "case\timage\tlabel\n" + "c\ti\tl\n" * cases)
        write(folder / f"preprocessed/{split}/c.pkl")
        write(folder / f"preprocessed/{split}/.tmp-d.pkl")

    def text() -> str:
        return status_text(folder, benchmarks=experiment / "b", logs=experiment / "l", now=NOW)

    assert "preprocessed so far: labelled 1 of 1, unlabelled 1 of 3, test 1 of 1\n" in text()
    for case in ("d", "e"):
        write(folder / f"preprocessed/unlabelled/{case}.pkl")
    assert "preprocessed so far" not in text()


def test_verdicts_and_masks_that_do_not_teach_are_counted(experiment):
    folder = experiment / "results/demo"
    reasons = ["exclude by ab", f"accept; {OUTLIVED}", "the mask is empty", "", "replace by ab"]
    rows = [f"c\t{'false' if w[:1] in 'et' and w else 'true'}\t{w}\n" for w in reasons]
    audits = folder / "cotrain/round-01/audit"
    write(audits / "train_3d.tsv", "case\taccepted\treason\n" + "".join(rows))
    write(audits / "train_2d.tsv", "case\taccepted\treason\nc\ttrue\t\n")
    lost = "case\taccepted\treason\tabsent\nc\ttrue\t\ta;b\nc\ttrue\t\tb\nc\tfalse\t\t\n"
    write(folder / "cotrain/round-00/audit/train_3d.tsv", lost)
    text = status_text(folder, benchmarks=experiment / "b", logs=experiment / "l", now=NOW)
    assert (
        "  cotrain/round-01/audit/train_3d: 3 of 5 teach; 1 thrown out, 1 corrected, "
        "1 accepted by a person, 1 empty, 1 judged on an earlier mask\n" in text
    )
    assert "audit/train_2d" not in text
    assert "  cotrain/round-00/audit/train_3d: the label b is in none of the masks that" in text
    assert "the label a " not in text


def test_the_command_names_the_settings_where_they_are_and_a_placeholder_elsewhere(tmp_path):
    folder = tmp_path / "results/mine"
    write(folder / "cases/unlabelled.tsv", "case\timage\tlabel\n")
    text = status_text(folder, benchmarks=tmp_path / "b", logs=tmp_path / "l", now=NOW)
    assert "snakemake --configfile SETTINGS.yaml" in text


def test_without_any_experiment_it_says_how_to_start_one(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    assert main(["status", "demo", "--results", str(tmp_path / "results")]) == 0
    assert "snakemake --configfile config/demo.yaml" in capsys.readouterr().out


def test_a_folder_in_which_nothing_lies_is_told_from_one_in_which_nothing_has_run(tmp_path, capsys):
    assert main(["status", "mine", "--results", str(tmp_path / "results")]) == 2
    assert "go to where snakemake was typed" in capsys.readouterr().err


def test_warnings_about_the_data_are_shown(experiment, capsys):
    log = experiment / "logs/demo/cases/describe_data.log"
    write(log, "warning: Mixed.\nwarning: Thin.\nsound\n")
    results = experiment / "results"
    assert main(["status", "demo", "--results", str(results)]) == 0
    page = results / "demo/cases/dataset_report.html"
    assert f"warnings about the data ({page})\n  Mixed.\n  Thin.\n\n" in capsys.readouterr().out


def test_a_comparison_of_experiments_points_to_its_table(tmp_path):
    folder = tmp_path / "results" / "loo"
    write(folder / "comparison" / "comparison.txt")
    write(tmp_path / "logs" / "comparison.log", "cotrain compare: too few.\n")
    text = status_text(folder, benchmarks=tmp_path, logs=tmp_path / "logs", now=time.time())
    assert "cotrain compare: too few." in text
    assert "loo compares experiments" in text
    assert str(folder / "comparison" / "comparison.txt") in text


def test_a_wrong_name_is_answered_with_the_known_ones(experiment, capsys):
    assert main(["status", "dmeo", "--results", str(experiment / "results")]) == 2
    assert "no experiment 'dmeo'" in (error := capsys.readouterr().err) and "known: demo" in error


def test_what_runs_is_shown_with_its_job_its_allocation_and_its_log(tmp_path, monkeypatch):
    stage = tmp_path / "results/heart/cotrain/round-00/train_2d"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu7")
    monkeypatch.setattr("cotrain.slurm.own_end", lambda: time.time() + 34 * 60)
    for done in (2, 3):
        work_in(stage, done, 10, "epochs")
        (stage / "work/step.lock").rename(stage / "work/kept")
    (stage / "work/kept").rename(stage / "work/step.lock")
    # The person who asks is not in that job.
    monkeypatch.delenv("SLURM_JOB_ID")
    text = status_text(
        tmp_path / "results/heart",
        benchmarks=tmp_path / "benchmarks/heart",
        logs=tmp_path / "logs/heart",
        now=time.time(),
    )
    assert (
        "  cotrain/round-00/train_2d: running (epoch 3 of 10, 2 min left)\n"
        "    SLURM job 4711 on gpu7, allocation 2, 34 min of it left; "
        f"log: {tmp_path}/logs/heart/cotrain/round-00/train_2d.log\n"
    ) in text
