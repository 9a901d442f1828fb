"""Prints how far an experiment is: in, its result tree and benchmarks; out, plain text.

A tool for a person, not a step: unlike the rest of the package it knows the result tree, and may be
asked at any time. A stage is

- done, when what it declares is there: `checkpoint.pth` of a training; of a mask set, manifests
  with as many rows as its case table;
- outdated, when it is done and older than the last command, which set out to make it again;
- failed, when its `work/` folder holds an error, or its log of the last command does (without a
  GPU, say, a step fails before it opens the folder); the first line is printed;
- running, when the process that holds the lock in `work/` may be alive: for certain on its own
  machine, elsewhere by its heartbeat of the last 10 minutes and by SLURM's account;
- interrupted, when it was begun and is not running: the same command goes on with it;
- waiting otherwise.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from cotrain.cases import SPLITS
from cotrain.errors import InputError
from cotrain.files import read_table
from cotrain.review import EMPTY, LOST, OUTLIVED, labels_lost
from cotrain.shards import manifests_of
from cotrain.summary import (
    ARM_WORDS,
    CO_TRAINED,
    CONTROL,
    NETWORK_WORDS,
    Trained,
    aligned,
    read_evaluations,
)
from cotrain.takeover import notice_of
from cotrain.workfolder import content_of, may_live

END_OF_LOG = 20_000
"""Bytes of a log that are read for its last error."""
COLUMNS = ("train_2d", "pseudo_2d", "train_3d", "pseudo_3d", "test")
AUDITS = f"{CO_TRAINED}/round-*/audit/train_?d.tsv"


class State(NamedTuple):
    """How far a stage is.

    kind: `done`, `outdated`, `failed`, `running`, `interrupted`, `partly` or `waiting`.
    """

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        if self.kind == "partly":
            return self.detail
        shown = self.detail if self.kind in ("running", "interrupted") else ""
        return f"{self.kind} ({shown})" if shown else self.kind


# ----------------------------------------------------------------------------------- stages


def stage_state(
    folder: Path, *, cases: int | None, now: float, outdated_before: float = 0
) -> State:
    """Return how far the stage of `folder` is at the Unix time `now`.

    cases: the number of masks that a mask set will have, None where it is not known yet: then one
    manifest counts as all.
    outdated_before: Unix time; what was finished before it will be made again.
    """
    finished = 0
    if folder.name.startswith("train_"):
        made = [path for path in [folder / "checkpoint.pth"] if path.is_file()]
        whole = bool(made)
    else:
        made = manifests_of(folder)
        finished = sum(len(read_table(manifest)) for manifest in made)
        whole = bool(made) and finished >= (cases or 0)
    if whole:
        oldest = min(path.stat().st_mtime for path in made)
        return State("outdated" if oldest < outdated_before else "done")
    work = folder / "work"
    errors = _whole_files(work, "*error.txt")
    if errors:
        first_line = errors[0].read_text().partition("\n")[0]
        return State("failed", f"{errors[0]}: {first_line}")
    signs = [json.loads(sign.read_text()) for sign in _whole_files(work, "*progress.json")]
    unit, done, total, seconds_left = _joined(signs)
    locks = _whole_files(work, "*.lock")
    if any(map(_may_live, locks)):
        left = f", {_minutes(seconds_left)} left" if signs else ""
        return State("running", f"{unit} {done} of {total}{left}" if signs else "starting")
    heard = [sign["updated"] for sign in signs] + _renewed(locks)
    # A finished one that is to be made again left such signs, too.
    if heard and not (signs and done >= total):
        return State("interrupted", f"last sign {_clock(max(heard), now=now)}")
    if finished:
        return State("partly", f"{finished} of {cases} cases")
    return State("waiting")


def joined_state(states: list[State]) -> State:
    """Return one state for several stages: the one that needs a person most, else the count."""
    for kind in ("failed", "running", "interrupted", "partly", "outdated"):
        for state in states:
            if state.kind == kind:
                return state
    done = sum(state.kind == "done" for state in states)
    if 0 < done < len(states):
        return State("partly", f"{done} of {len(states)} done")
    return states[0]


def _joined(signs: list[dict]) -> tuple[str, int, int, float]:
    """Return unit, number done, total and seconds left of a stage's shards, side by side.

    A sign has `<units>_done` and `<units>`, as in cases_done and cases.
    """
    unit, done, total, seconds_left = "", 0, 0, 0.0
    for sign in signs:
        units = next(key for key in sign if key.endswith("_done")).removesuffix("_done")
        unit = units.removesuffix("s")
        done += sign[f"{units}_done"]
        total += sign[units]
        seconds_left = max(seconds_left, sign["seconds_left"])
    return unit, done, total, seconds_left


def _whole_files(folder: Path, pattern: str) -> list[Path]:
    """Return matching files but those that are just being written, whose names begin with a dot."""
    return [path for path in sorted(folder.glob(pattern)) if not path.name.startswith(".")]


def _may_live(lock: Path) -> bool:
    """Return whether the process that holds a lock may be alive."""
    owner = content_of(lock)
    # Without an owner: just removed, or made and not yet filled.
    return lock.exists() if owner is None else may_live(owner)


def _renewed(locks: list[Path]) -> list[float]:
    """Return when each lock was renewed, as Unix time."""
    times = []
    for lock in locks:
        # A step that ends removes its lock, perhaps just now.
        with contextlib.suppress(FileNotFoundError):
            times.append(lock.stat().st_mtime)
    return times


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _clock(moment: float, *, now: float) -> str:
    """Return a time of day, with the date where it was not today."""
    then, today = datetime.fromtimestamp(moment), datetime.fromtimestamp(now)
    return f"{then:%H:%M}" if then.date() == today.date() else f"{then:%Y-%m-%d %H:%M}"


# ------------------------------------------------------------------------------------- logs


def failure_in(log: Path) -> str | None:
    """Return the sentence with which the step of a log failed, None where there is none."""
    with open(log, "rb") as opened:
        opened.seek(max(0, log.stat().st_size - END_OF_LOG))
        end = opened.read().decode(errors="replace")
    # Of this command, with the first problems where it lists any, or of a shell that lacks it.
    sentence = r"^(?:\S+sh: .*)?cotrain(?: [a-z-]+)?: .+(?:\n  - .+){0,3}"
    said = re.findall(sentence, end, flags=re.MULTILINE)
    if said:
        return said[-1]
    _, found, trace = end.rpartition("Traceback (most recent call last):")
    lines = [line for line in trace.splitlines() if line[:1].strip()]
    return lines[0] if found and lines else None


def failures_in(logs: Path, *, since: float) -> dict[str, list[str]]:
    """Return {step: `log: sentence` of each shard that failed} of the logs of an experiment.

    A step is a log's path without shard and suffix, as in `cotrain/round-00/pseudo_2d`. since: Unix
    time; what was written before is of an earlier command, which somebody may have mended.
    """
    failures: dict[str, list[str]] = {}
    for log in sorted(logs.glob("**/*.log")):
        # Snakemake removes the log of a step that begins again, perhaps just now.
        with contextlib.suppress(FileNotFoundError):
            sentence = failure_in(log) if log.stat().st_mtime >= since else None
            if sentence:
                step = re.sub(r"-\d+$", "", log.relative_to(logs).with_suffix("").as_posix())
                failures.setdefault(step, []).append(f"{log}: {sentence}")
    return failures


# ------------------------------------------------------------------------------------- text


def seconds_per_stage(folder: Path, *, benchmarks: Path) -> dict[str, tuple[int, float]]:
    """Return each stage's finished jobs and their seconds, over all allocations that they took.

    Where a step of the experiment in `folder` has a working folder, it tells; Snakemake's benchmark
    tables (column `s`) know but the last allocation, and a repeat of seconds hides what it took.
    A stage is a table's path without its arm, round and shard: `cotrain/round-00/pseudo_2d-1.tsv`
    and `cotrain/round-01/pseudo_2d-0.tsv` are two jobs of `pseudo_2d`.
    """
    spent: dict[str, tuple[int, float]] = {}
    for table in sorted(benchmarks.glob("**/*.tsv")):
        name = table.relative_to(benchmarks).with_suffix("").as_posix()
        name = re.sub(rf"{CO_TRAINED}|{CONTROL}|round-\d+|-\d+$", "", name)
        stage = "/".join(part.strip("_-") for part in name.split("/") if part.strip("_-"))
        jobs, seconds = spent.get(stage, (0, 0.0))
        step, _, shard = table.stem.partition("-")
        work = folder / table.relative_to(benchmarks).parent / step / "work"
        told = content_of(work / f"{f'shard-{shard}' if shard else 'step'}.progress.json") or {}
        took = told.get("seconds") or sum(map(float, read_table(table)["s"]))
        spent[stage] = (jobs + 1, seconds + took)
    return spent


def status_text(folder: Path, *, benchmarks: Path, logs: Path, now: float) -> str:
    """Return the status of the experiment whose results are in `folder`."""
    cases = {split: _cases_in(folder / f"cases/{split}.tsv") for split in SPLITS}
    rounds = sorted(folder.glob("*/round-[0-9]*"), key=_running_order)
    # A person's verdicts are written down before anything is trained.
    if not any(path.name != "audit" for each in rounds for path in each.iterdir()):
        rounds = []
    command, outdated_before = _last_command(folder)
    states = {
        stage: stage_state(
            stage,
            cases=cases["test" if stage.name.startswith("test_") else "unlabelled"],
            now=now,
            outdated_before=outdated_before.get(stage, 0),
        )
        for round_folder in rounds
        for stage in _stages_of(round_folder, tested=cases["test"] != 0)
    }
    failures = []
    for step, found in failures_in(logs, since=command).items():
        state = states.get(folder / step)
        if state is None:
            failures += found
        elif state.kind in ("waiting", "partly", "interrupted"):
            states[folder / step] = State("failed", found[0])
    if not rounds and (folder / "comparison").is_dir():
        compared = [*(folder / "comparison").glob("*.txt")]
        told = [*failures, *(f"see {path}" for path in compared)]
        parts = [f"{folder.name} compares experiments, which have a status each", *told]
        return "\n".join(parts) + "\n"
    parts = [f"experiment {folder.name}, {datetime.fromtimestamp(now):%Y-%m-%d %H:%M}"]
    warnings = _data_warnings(logs / "cases" / "describe_data.log")
    if warnings:
        page = folder / "cases" / "dataset_report.html"
        parts.append(f"warnings about the data ({page})\n" + "\n".join(warnings))
    preprocessed = _preprocessed(folder / "preprocessed", cases)
    if rounds:
        parts.append(_rounds_table(rounds, states, _dice_of(folder / "evaluation")))
        if preprocessed:
            parts.append(f"preprocessed so far: {preprocessed}")
    else:
        planned = (folder / "preprocessed" / "plans.json").is_file()
        parts.append(
            "No round has been started. "
            f"Cases checked: {'no' if cases['unlabelled'] is None else 'yes'}; "
            f"planned: {'yes' if planned else 'no'}; "
            f"preprocessed: {preprocessed or 'all'}."
        )
    judged = [line for audit in sorted(folder.glob(AUDITS)) for line in _judged_in(audit, folder)]
    if judged:
        parts.append("masks that were judged, or do not teach\n" + "\n".join(judged))
    running = [
        _running_line(stage, folder, state, logs=logs, now=now)
        for stage, state in states.items()
        if state.kind in ("running", "interrupted")
    ]
    if running:
        parts.append("running\n" + "\n".join(running))
    failures += [state.detail for state in states.values() if state.kind == "failed"]
    if failures:
        parts.append("failed\n" + "\n".join(f"  {failure}" for failure in failures))
    spent = seconds_per_stage(folder, benchmarks=benchmarks)
    if spent:
        parts.append(_time_table(spent))
    places = _look_next(folder, logs=logs, outdated_before=outdated_before)
    parts.append("look next\n" + "\n".join(f"  {line}" for line in places))
    return "\n\n".join(parts) + "\n"


def _data_warnings(log: Path) -> list[str]:
    """Return the lines in which the check of the data warned of what is often a mistake."""
    if not log.is_file():
        return []
    lines = log.read_text().splitlines()
    mark = "warning: "
    return [f"  {line.removeprefix(mark)}" for line in lines if line.startswith(mark)]


def _running_line(stage: Path, folder: Path, state: State, *, logs: Path, now: float) -> str:
    """Return where each process of a stage runs, in which of its allocations, and its log."""
    name = stage.relative_to(folder)
    lines = [f"  {name}: {state}"]
    for lock in _whole_files(stage / "work", "*.lock"):
        owner = content_of(lock)
        if owner is None:
            # Just made or just removed.
            continue
        step = lock.name.removesuffix(".lock")
        starts = lock.with_name(f"{step}.starts.tsv")
        where = f"process {owner['pid']} on {owner['node']}"
        if owner["slurm_job"]:
            where = f"SLURM job {owner['slurm_job']} on {owner['node']}"
        if starts.is_file():
            where += f", allocation {len(read_table(starts))}"
        if owner["ends"]:
            left = owner["ends"] - now
            where += f", {_minutes(left)} of it left" if left > 0 else ", its time limit is over"
        shard = step.removeprefix("shard") if step.startswith("shard") else ""
        lines.append(f"    {where}; log: {logs / name}{shard}.log")
    return "\n".join(lines)


def _last_command(folder: Path) -> tuple[float, dict[Path, float]]:
    """Return when the last command began, and the same by folder in which it was to make files."""
    notice = Path(os.path.abspath(folder)).parents[1] / notice_of(folder.name)
    if not notice.is_file():
        return 0, {}
    began = notice.stat().st_mtime
    # Each begins with results/<experiment>, which may be called otherwise from here.
    folders = json.loads(notice.read_text()).get("sets_out_to_make", [])
    return began, {folder.joinpath(*Path(each).parts[2:]): began for each in folders}


def _preprocessed(folder: Path, cases: dict[str, int | None]) -> str:
    """Return how many cases of each split are preprocessed, '' where all are."""
    # A case's properties are written last.
    done = {split: len(_whole_files(folder / split, "*.pkl")) for split in cases}
    if all(cases[split] is not None and done[split] >= cases[split] for split in cases):
        return ""
    return ", ".join(
        f"{split} {done[split]} of {'?' if count is None else count}"
        for split, count in cases.items()
    )


def _judged_in(audit: Path, folder: Path) -> list[str]:
    """Return lines on masks of an audit that were judged or do not teach, and on lost labels."""
    table = read_table(audit)
    teach = (table["accepted"] == "true").sum()
    told = {
        word: table["reason"].str.contains(sign).sum()
        for word, sign in (
            ("thrown out", "^exclude"),
            ("corrected", "^replace"),
            ("accepted by a person", "^accept"),
            ("empty", f"^{EMPTY}"),
            ("judged on an earlier mask", re.escape(OUTLIVED)),
        )
    }
    found = ", ".join(f"{count} {word}" for word, count in told.items() if count)
    place = audit.relative_to(folder).with_suffix("")
    lines = [f"  {place}: {teach} of {len(table)} teach; {found}"] if found else []
    return lines + [f"  {place}: {LOST.format(name)}" for name in labels_lost(table)]


def _cases_in(table: Path) -> int | None:
    """Return of how many cases of a split masks are made; None where its list is not written."""
    if not table.is_file():
        return None
    rows = read_table(table)
    # Test cases without a label anywhere are not scored, and left alone.
    return 0 if table.stem == "test" and (rows["label"] == "").all() else len(rows)


def _running_order(round_folder: Path) -> tuple[bool, str]:
    """Sort key: the co-training's rounds, then the control's."""
    return round_folder.parent.name == CONTROL, round_folder.name


def _stages_of(round_folder: Path, *, tested: bool) -> list[Path]:
    """Return the stages of a round, and others that were begun in it, such as `test_mean`.

    A control has no stage that it shares with the co-training, because nobody taught it so far.
    """
    networks, kinds = ["2d", "3d"], ["train", "pseudo"]
    last = _last_round_of(round_folder.parents[1])
    # Where 2D is trained all the same, the settings of an earlier last training were left over.
    if round_folder.name == f"round-{last}" and not (round_folder / "train_2d").exists():
        networks.remove("2d")
    if round_folder.parent.name == CONTROL:
        kinds = ["train"]
        cotraining = _cotraining_of(round_folder.parents[1])
        first = round_folder.name == "round-00"
        shared = {"2d"} if first or cotraining["teacher"] == "2d" else set()
        if first and cotraining["first_teacher"] != "2d":
            shared.add("3d")
        networks = [network for network in networks if network not in shared]
    if tested:
        kinds.append("test")
    usual = [f"{kind}_{network}" for kind in kinds for network in networks]
    begun = [path.name for path in sorted(round_folder.glob("t*_*")) if path.is_dir()]
    return [round_folder / name for name in dict.fromkeys([*usual, *begun])]


def _last_round_of(folder: Path) -> str | None:
    """Return the round of the last training of the 3D network alone, where it was asked for."""
    path = folder / "settings" / "train_last.yaml"
    return f"{yaml.safe_load(path.read_text())['last_round']:02d}" if path.is_file() else None


def _cotraining_of(folder: Path) -> dict:
    """Return who teaches whom, as the settings of the 3D network's training say."""
    path = folder / "settings" / "train_3d.yaml"
    if not path.is_file():
        raise InputError(
            f"{path} is missing, though a control was trained by it; run the workflow again, or "
            "put the file back."
        )
    return yaml.safe_load(path.read_text())["cotraining"]


def _dice_of(evaluation: Path) -> dict[Trained, float]:
    """Return the mean test Dice (0..1) of everything that was evaluated on at least one case."""
    scored = read_evaluations(_whole_files(evaluation, "*_round-*.tsv"))
    return {key: cases["dice"].mean() for key, cases in scored.items() if not cases.empty}


def _rounds_table(
    rounds: Iterable[Path], states: dict[Path, State], dice: dict[Trained, float]
) -> str:
    """Return a line per arm and round; `-` where there is no such stage, or no score that holds."""
    rows = [["arm", "round", *COLUMNS, *(f"{word} Dice %" for word in NETWORK_WORDS.values())]]
    for round_folder in rounds:
        arm, number = round_folder.parent.name, round_folder.name.removeprefix("round-")
        cells = [ARM_WORDS[arm], number]
        for column in COLUMNS:
            found = [
                state
                for stage, state in states.items()
                if stage.parent == round_folder and stage.name.startswith(column)
            ]
            cells.append(str(joined_state(found)) if found else "-")
        for network in NETWORK_WORDS:
            value = dice.get(Trained(arm, network, int(number)))
            # A score of masks that are made again is of the network before.
            masks = states.get(round_folder / f"test_{network}", State("done"))
            known = value is not None and masks.kind == "done"
            cells.append(f"{100 * value:.1f}" if known else "-")
        rows.append(cells)
    return aligned(rows)


def _time_table(spent: dict[str, tuple[int, float]]) -> str:
    rows = [["time spent in", "jobs", "time"]]
    rows += [[stage, str(jobs), _duration(seconds)] for stage, (jobs, seconds) in spent.items()]
    jobs = sum(jobs for jobs, _ in spent.values())
    rows.append(["all", str(jobs), _duration(sum(seconds for _, seconds in spent.values()))])
    return aligned(rows)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def _look_next(folder: Path, *, logs: Path, outdated_before: dict[Path, float]) -> list[str]:
    """Return where a person finds more, of what is there; with a word where it is made again."""
    places = {
        "scores and gain": [folder / "summary/summary.txt"],
        "the model for nnUNetv2_predict": [folder / "model"],
        "the data": [folder / "cases/dataset_report.html"],
        "masks that taught": sorted(folder.glob(f"{CO_TRAINED}/round-*/audit/*.html"))[-2:],
        "logs": [logs],
    }
    lines = []
    for what, paths in places.items():
        for path in (path for path in paths if path.exists()):
            # Of the pages in a folder one may be made again, and another stay.
            word = "" if path.suffix == ".html" else _of_the_run_before(path, outdated_before)
            lines.append(f"{what}: {path}{word}")
    if any(folder.glob("*/round-*/train_*/tensorboard")):
        lines.append(f"curves: tensorboard --logdir {folder}")
    return lines or [f"nothing yet; start it: {_command_for(folder.name)}"]


def _of_the_run_before(path: Path, outdated_before: dict[Path, float]) -> str:
    """Return a word on a file or folder that the last command set out to make again, and has not.

    outdated_before: Unix times, by folder in which files are made.
    """
    made_in = path if path.is_dir() else path.parent
    began = [time for folder, time in outdated_before.items() if folder.is_relative_to(made_in)]
    files = path.rglob("*") if path.is_dir() else [path]
    newest = max((each.stat().st_mtime for each in files if each.is_file()), default=0)
    return " (outdated: of the run before)" if began and newest < max(began) else ""


def _command_for(experiment: str) -> str:
    """Return the command that runs an experiment, whose settings may lie anywhere."""
    ours = Path(f"config/{experiment}.yaml")
    # Without the profile, a cluster's login node would do all the work itself.
    profile = " --profile slurm" if shutil.which("squeue") else ""
    return f"snakemake{profile} --configfile {ours if ours.is_file() else 'SETTINGS.yaml'}"


# ---------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cotrain status`."""
    parser.add_argument("experiment", metavar="EXPERIMENT", help="its name, as in its settings")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder of all results (default: results); benchmarks and logs lie beside it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the status; InputError with the known experiments where the name is not one."""
    results: Path = arguments.results
    # A shell completes its folder.
    if Path(arguments.experiment).parent == results:
        arguments.experiment = Path(arguments.experiment).name
    if not results.is_dir():
        raise InputError(
            f"There is no folder {os.path.abspath(results)}; go to where snakemake was typed, or "
            "name its results by --results."
        )
    folder = results / arguments.experiment
    known = sorted(path.name for path in results.glob("*/") if path.is_dir())
    if not known:
        print(
            f"Nothing has been started: {results} holds no experiment. "
            f"Start one: {_command_for(arguments.experiment)}"
        )
        return
    if arguments.experiment not in known:
        raise InputError(
            f"There is no experiment '{arguments.experiment}' in {results}; "
            f"known: {', '.join(known)}."
        )
    # From inside of it, `.` has no parent to see.
    beside = Path(os.path.abspath(results)).parent
    if not results.is_absolute():
        beside = Path(os.path.relpath(beside))
    text = status_text(
        folder,
        benchmarks=beside / "benchmarks" / arguments.experiment,
        logs=beside / "logs" / arguments.experiment,
        now=time.time(),
    )
    print(text, end="")
