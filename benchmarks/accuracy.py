"""Does co-training pay? In, a data set with labels for every case; out, a table that can say no.

    python benchmarks/accuracy.py run --data left_atrium --data-folder /path/to/LeftAtrium_1.25mm
    python benchmarks/accuracy.py report

`run` trains every method on every labelled set through the workflow, and stores the scores of each
test case in benchmarks/accuracy.tsv and the true quality of all pseudo-masks in
benchmarks/accuracy_masks.tsv. `report` redraws docs/accuracy_tables.md, the pictures
docs/accuracy*.png and the tables of docs/accuracy.md from them.

Which cases are labelled moves a result more than the method does, so a method is judged over sets:
of the cases that are not for testing, in the order of their names, set k labels the k-th block of
n, with seed k. Test cases are scored once per finished run; docs/accuracy.md says which two choices
were made when their scores were known.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from cotrain.audit import true_dice
from cotrain.device import device_of, precision_of
from cotrain.errors import InputError
from cotrain.experiments import experiments_of as experiments_in
from cotrain.files import (
    read_table,
    sha256_of,
    write_atomically,
    write_json,
    write_table,
    write_text,
)
from cotrain.nifti import read_labels
from cotrain.settings import Settings, check
from cotrain.summary import mean_and_sd, paired_gain, read_evaluations

CLONE = Path(__file__).parents[1]
STORED = CLONE / "benchmarks" / "accuracy.tsv"
STORED_MASKS = CLONE / "benchmarks" / "accuracy_masks.tsv"
KEY = ["data", "labelled", "set", "experiment"]
SCORES = ("dice", "jaccard", "hd95_mm", "asd_mm")
ESTIMATES = ("confidence", "agreement")
"""What is known of a pseudo-mask without truth."""


class Method(NamedTuple):
    """One line of the table: whose masks, of which experiment, how many rounds before its end."""

    words: str
    experiment: str
    arm: str
    network: str
    back: int = 0


FIRST_2D = {"cotraining.first_teacher": "2d"}
EXPERIMENTS: dict[str, dict[str, str]] = {
    "labels_first": {},
    "2d_first": FIRST_2D,
    "paper": {
        "recipe": "paper",
        "cotraining": "{{}}",
        "training_3d.warmup_epochs": "{per_round}",
        "training_3d.epochs_per_round": "{after_warmup}",
    },
    "one_way": {**FIRST_2D, "cotraining.teacher": "2d"},
    "self": {"cotraining.teacher": "self"},
    "labels_first_short": {
        "training_3d.warmup_epochs": "{short_first}",
        "training_3d.epochs_per_round": "{short_round}",
        "cotraining.last_epochs": "{short_last}",
    },
    "random_2d": {**FIRST_2D, "network_2d.weights": "random"},
    "long_3d": {
        **FIRST_2D,
        "training_3d.epochs_per_round": "{long}",
        "cotraining.last_epochs": "0",
    },
    "longer_3d": {
        **FIRST_2D,
        "training_3d.epochs_per_round": "{longer}",
        "cotraining.last_epochs": "0",
    },
    "full": FIRST_2D,
}
"""Settings in which an experiment differs from the configuration file, whose order is
`labels_first`. All others have as many epochs of 3D as `2d_first`, but for three: `self` has those
of the file, without 2D, `long_3d` gets the time of everything that `2d_first` computes, and
`longer_3d` what is planned as the time of `labels_first`."""
PEERS = {"mean_teacher": 0.94, "cross_pseudo": 0.48}
"""Peers trained by benchmarks/peers.py, and their 3D epochs as a share of long_3d's: what its time
allows, with the teacher's or the second network's work in each step."""
BASELINE = Method("3D, labels only, in the epochs of 2D first", "2d_first", "labels_only", "3d")
MEAN_OF_LABELS = Method(
    "mean of both, labels only, in the epochs of 2D first", "2d_first", "labels_only", "mean"
)
BOUND = Method("3D, all labels", "full", "labels_only", "3d")
CONTROLS_OF_PRODUCTS = [
    Method("3D, labels only, in the epochs of labels first", "labels_first", "labels_only", "3d"),
    Method(
        "mean of both, labels only, in the epochs of labels first",
        "labels_first",
        "labels_only",
        "mean",
    ),
]
SELF = Method("3D teaches itself", "self", "cotrain", "3d")
RANDOM = Method("3D, co-trained, 2D first, 2D from random weights", "random_2d", "cotrain", "3d")
BAR = [
    Method("2D, labels only", "2d_first", "labels_only", "2d"),
    BASELINE,
    Method("3D, labels only, for about the time of 2D first", "long_3d", "labels_only", "3d"),
    MEAN_OF_LABELS,
    Method(
        "mean of both, labels only, 3D for about the time of 2D first",
        "long_3d",
        "labels_only",
        "mean",
    ),
    *CONTROLS_OF_PRODUCTS,
    Method("3D, labels only, longer than labels first", "longer_3d", "labels_only", "3d"),
    SELF,
    Method("3D, mean teacher", "mean_teacher", "cotrain", "3d"),
    Method("3D, cross pseudo supervision with another 3D", "cross_pseudo", "cotrain", "3d"),
    Method("mean of two 3D, cross pseudo supervision", "cross_pseudo", "cotrain", "mean"),
    Method("3D taught by 2D, one way, 2D first", "one_way", "cotrain", "3d"),
    RANDOM,
    Method(
        "mean of both, co-trained, 2D first, 2D from random weights", "random_2d", "cotrain", "mean"
    ),
    Method("3D, recipe: paper", "paper", "cotrain", "3d"),
    Method("mean of both, recipe: paper", "paper", "cotrain", "mean"),
    Method("3D, labels first, in the epochs of 2D first", "labels_first_short", "cotrain", "3d"),
    Method(
        "mean of both, labels first, in the epochs of 2D first",
        "labels_first_short",
        "cotrain",
        "mean",
    ),
]
"""What the products must be above, to be worth their while: labels alone, and other ways to use the
same unlabelled cases."""
PRODUCTS = [
    Method("3D, co-trained, labels first", "labels_first", "cotrain", "3d"),
    Method("mean of both, co-trained, labels first", "labels_first", "cotrain", "mean"),
]
"""What a run ends with: the exported 3D network, and the mean that `cotrain predict` takes."""
SHORTER = [
    Method("3D, co-trained, 2D first", "2d_first", "cotrain", "3d"),
    Method("mean of both, co-trained, 2D first", "2d_first", "cotrain", "mean"),
]
"""The same of a run in which 2D teaches first, which trains 3D for shorter."""
ALL_PRODUCTS = [*PRODUCTS, *SHORTER]
ORDERS = {
    "labels first": list(zip(CONTROLS_OF_PRODUCTS, PRODUCTS, strict=True)),
    "2D first": list(zip((BASELINE, MEAN_OF_LABELS), SHORTER, strict=True)),
    "no 2D, 3D teaches itself": [(CONTROLS_OF_PRODUCTS[0], SELF)],
    "2D first, 2D from random weights": [(BASELINE, RANDOM)],
}
"""What is trained first: each product, of 3D and of both, behind the same networks on labels alone
in as many steps."""
METHODS = [
    Method("2D, random weights, labels only", "random_2d", "labels_only", "2d"),
    *BAR,
    Method("2D, co-trained, 2D first", "2d_first", "cotrain", "2d"),
    Method(
        "3D, co-trained, 2D first, before the last training", "2d_first", "cotrain", "3d", back=1
    ),
    *ALL_PRODUCTS,
    BOUND,
]


class Data(NamedTuple):
    """A data set: its settings and case table, the share of its co-training's processor time that
    training 3D takes, and the labelled sets whose unlabelled truth chose its settings."""

    title: str
    config: str
    cases: str
    share_of_3d: float
    chosen_on: tuple[int, ...] = (0, 1, 2)


DATA = {
    "left_atrium": Data(
        "Left atrium", "config/left_atrium_4.yaml", "config/cases/left_atrium_4.tsv", 0.475
    ),
    "hippocampus": Data(
        "Hippocampus", "config/hippocampus_4.yaml", "config/cases/hippocampus_4.tsv", 0.39
    ),
}


# ---------------------------------------------------------------------------------- running


def labelled_block(cases: pd.DataFrame, *, labelled: int, block: int) -> pd.DataFrame:
    """Return a case table with the `block`-th block of so many cases labelled, the rest not.

    Raises InputError where there are not as many cases.
    """
    test = cases[cases["split"] == "test"]
    others = cases[cases["split"] != "test"].sort_values("case", ignore_index=True)
    if (block + 1) * labelled > len(others):
        raise InputError(
            f"Set {block} of {labelled} labelled cases needs {(block + 1) * labelled} cases that "
            f"are not for testing, but there are {len(others)}; ask for fewer sets."
        )
    others["split"] = "unlabelled"
    others.loc[block * labelled : (block + 1) * labelled - 1, "split"] = "labelled"
    return pd.concat([others, test], ignore_index=True)


def all_labelled(cases: pd.DataFrame) -> pd.DataFrame:
    """Return a case table with all cases labelled that are not for testing, but the last one.

    The workflow wants an unlabelled case; the label-only network never sees it.
    """
    table = labelled_block(cases, labelled=1, block=0)
    others = table.index[table["split"] != "test"]
    table.loc[others[:-1], "split"] = "labelled"
    table.loc[others[-1], "split"] = "unlabelled"
    return table


def key_of(data: str, place: tuple[int, int], experiment: str) -> dict[str, object]:
    """Return what an experiment's rows are stored under.

    With all cases labelled it is the same one for every number of labelled cases.
    """
    labelled, block = place
    number = "all" if experiment == BOUND.experiment else labelled
    return dict(zip(KEY, (data, number, block, experiment), strict=True))


def name_of(data: str, labelled: int, block: int, experiment: str) -> str:
    """Return the name of an experiment, which is its folder of results."""
    number = key_of(data, (labelled, block), experiment)["labelled"]
    return f"accuracy_{data}_{number}_set{block}_{experiment}"


def epochs_of_3d(settings: Settings) -> int:
    """Return all epochs of the 3D network in an experiment whose first teacher is 2D."""
    per_round = settings.training_3d.epochs_per_round
    return settings.rounds * per_round + settings.cotraining.last_epochs


def experiments_of(
    data: str, sets: list[tuple[int, int]], experiments: list[str], folder: Path
) -> tuple[Path, dict[tuple[int, int, str], Settings]]:
    """Write the tables that the workflow reads; return that of the experiments, and their settings.

    sets: (labelled cases, block). The settings are keyed by (labelled, block, experiment).
    """
    content = yaml.safe_load((CLONE / DATA[data].config).read_text())
    file = check(content, source=DATA[data].config)
    epochs, per_round = epochs_of_3d(file), file.training_3d.epochs_per_round
    numbers = {
        "per_round": per_round,
        "after_warmup": round((epochs - per_round) / (file.rounds - 1)),
        "long": round(epochs / DATA[data].share_of_3d / file.rounds),
    }
    # Its first round is 3D's warm-up, beside which 2D computes as much as in `2d_first`.
    epochs_of_labels_first = epochs - per_round + file.training_3d.warmup_epochs
    more = epochs_of_labels_first - epochs
    numbers["longer"] = round((epochs / DATA[data].share_of_3d + more) / file.rounds)
    # All phases of `labels_first` shorter by the same factor.
    shorter = epochs / epochs_of_labels_first
    short_round = round(shorter * per_round)
    short_last = round(shorter * file.cotraining.last_epochs)
    short_first = epochs - (file.rounds - 1) * short_round - short_last
    numbers |= {"short_round": short_round, "short_last": short_last, "short_first": short_first}
    cases = read_table(CLONE / DATA[data].cases)
    rows, names = {}, {}
    for labelled, block in sets:
        for experiment in experiments:
            if experiment == "full":
                table, wanted = folder / "cases_full.tsv", all_labelled(cases)
            else:
                table = folder / f"cases_{labelled}_set{block}.tsv"
                wanted = labelled_block(cases, labelled=labelled, block=block)
            # A newer file would train everything again.
            if not table.is_file() or not read_table(table).equals(wanted):
                write_table(wanted, table)
            changes = {
                key: value.format(**numbers) for key, value in EXPERIMENTS[experiment].items()
            }
            name = name_of(data, labelled, block, experiment)
            rows[name] = {"experiment": name, "seed": block, "cases": table.resolve(), **changes}
            names[labelled, block, experiment] = name
    path = folder / "experiments.tsv"
    write_table(pd.DataFrame(rows.values()).fillna(""), path)
    content = {**content, "experiment": f"accuracy_{data}", "experiments": str(path)}
    checked, _ = experiments_in(content, source=DATA[data].config)
    return path, {key: checked[name] for key, name in names.items()}


def last_round_of(settings: Settings) -> int:
    """Return the number of the last round, or of the last training after it."""
    return settings.rounds if settings.cotraining.last_epochs else settings.rounds - 1


def round_of(method: Method, settings: Settings) -> int:
    """Return the number of the round that a method is judged by."""
    return last_round_of(settings) - method.back


def evaluation_of(method: Method, settings: Settings) -> str:
    """Return the path of the scores that a method is judged by."""
    return (
        f"results/{settings.experiment}/evaluation/"
        f"{method.arm}_{method.network}_round-{round_of(method, settings):02d}.tsv"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train what is missing, the sets side by side, then store the scores of all.

    Interrupted, it has stored nothing, but goes on when typed again, as the workflow does.
    """
    unknown = set(arguments.experiments) - {*EXPERIMENTS, *PEERS}
    if unknown:
        raise InputError(
            f"There is no experiment {sorted(unknown)[0]!r}; wanted "
            f"{', '.join([*EXPERIMENTS, *PEERS])}."
        )
    asked = [method for method in METHODS if method.experiment in arguments.experiments]
    methods = [method for method in asked if method.experiment in EXPERIMENTS]
    peers = [method for method in asked if method.experiment in PEERS]
    # Peers train on its arrays.
    experiments = [
        *dict.fromkeys([*(["2d_first"] if peers else []), *(m.experiment for m in methods)])
    ]
    sets = [(labelled, block) for labelled in arguments.labelled for block in arguments.sets]
    folder = CLONE / "data" / "accuracy" / arguments.data
    table, settings = experiments_of(arguments.data, sets, experiments, folder)
    for place in sets:
        for method in peers:
            name = name_of(arguments.data, *place, method.experiment)
            settings[*place, method.experiment] = settings[*place, "2d_first"].model_copy(
                update={"experiment": name}
            )
    run_workflow(arguments, table, settings, sets, methods, with_peers=bool(peers))
    for place in sets:
        run_peers(arguments.data, place, settings, peers)
        store(arguments.data, place, settings, asked)


def run_workflow(
    arguments: argparse.Namespace,
    table: Path,
    settings: dict[tuple[int, int, str], Settings],
    sets: list[tuple[int, int]],
    methods: list[Method],
    *,
    with_peers: bool,
) -> None:
    """Let Snakemake make the scores of all methods but the peers."""
    targets = {
        evaluation_of(method, settings[*place, method.experiment])
        for place in sets
        for method in methods
    }
    for place in sets:
        for experiment in {method.experiment for method in methods if method.arm == "cotrain"}:
            own = settings[*place, experiment]
            last = f"results/{own.experiment}/cotrain/round-{last_round_of(own):02d}"
            # The last masks teach nobody, but show on unlabelled cases what training has brought.
            targets.add(f"{last}/pseudo_3d/manifest-0.tsv")
    for place in sets if with_peers else []:
        own = f"results/{settings[*place, '2d_first'].experiment}"
        targets |= {f"{own}/settings/{stage}.yaml" for stage in ("train_3d", "infer")}
        targets |= {
            f"{own}/preprocessed/{split}/manifest-0.tsv"
            for split in ("labelled", "unlabelled", "test")
        }
    command = [sys.executable, "-m", "snakemake", *sorted(targets)]
    command += ["--cores", str(arguments.cores), "--quiet", "rules"]
    command += ["--configfile", DATA[arguments.data].config]
    # One thread a job: two trainings side by side are faster than one with two threads, and a step
    # that wants all cores would wait until no other has one.
    command += ["--set-threads", "train=1", "infer_pseudo_masks=1", "infer_test_masks=1"]
    command += ["check_data=1", "plan=1", "preprocess=1"]
    command += ["--config", f"data_folder={arguments.data_folder.resolve()}"]
    command += [f"experiment=accuracy_{arguments.data}", f"experiments={table}"]
    subprocess.run(command, cwd=CLONE, check=True)


def run_peers(
    data: str,
    place: tuple[int, int],
    settings: dict[tuple[int, int, str], Settings],
    peers: list[Method],
) -> None:
    """Train and score the peers that are missing or outdated on a labelled set, side by side."""
    base = settings.get((*place, "2d_first"))
    running = []
    for peer in dict.fromkeys(method.experiment for method in peers):
        results = CLONE / "results" / settings[*place, peer].experiment
        scores = {
            method.network: CLONE / evaluation_of(method, settings[*place, peer])
            for method in peers
            if method.experiment == peer
        }
        epochs = round(PEERS[peer] * epochs_of_3d(base) / DATA[data].share_of_3d)
        used = ["preprocessed/plans.json", "settings/train_3d.yaml", "settings/infer.yaml"]
        used += [f"cases/{split}.tsv" for split in ("labelled", "unlabelled", "test")]
        made_of = {each: sha256_of(CLONE / "results" / base.experiment / each) for each in used}
        made_of |= {"peers.py": sha256_of(CLONE / "benchmarks" / "peers.py"), "epochs": epochs}
        made_of["precision"] = precision_of(base.compute, device_of(base.compute), training=True)
        note = results / "made_of.json"
        is_made = all(each.is_file() for each in scores.values()) and note.is_file()
        if is_made and json.loads(note.read_text()) == made_of:
            continue
        for each in scores.values():
            each.unlink(missing_ok=True)
        write_json(made_of, note)
        command = [sys.executable, CLONE / "benchmarks" / "peers.py"]
        command += ["--peer", peer, "--epochs", epochs, "--scores", scores["3d"]]
        command += ["--scores-of-mean", scores["mean"]] if "mean" in scores else []
        command += ["--experiment", CLONE / "results" / base.experiment, "--out-dir", results]
        command += ["--labels", *(f"{label}={value}" for label, value in base.labels.items())]
        running.append(subprocess.Popen([str(word) for word in command], cwd=CLONE))
    if any([process.wait() for process in running]):
        raise InputError("A peer was not trained; its error is above.")


def store(
    data: str,
    place: tuple[int, int],
    settings: dict[tuple[int, int, str], Settings],
    methods: list[Method],
) -> None:
    """Put the scores, minutes and mask qualities of one labelled set into the stored tables."""
    rows, masks = [], []
    for method in methods:
        own = settings[*place, method.experiment]
        key = key_of(data, place, method.experiment)
        (scores,) = read_evaluations([CLONE / evaluation_of(method, own)]).values()
        results = CLONE / "results" / own.experiment
        if method.experiment in PEERS:
            minutes = float((results / "minutes.txt").read_text())
            precision = json.loads((results / "made_of.json").read_text())["precision"]
        else:
            minutes, precision = cost_of(results, method, last=round_of(method, own))
        for case, row in scores.iterrows():
            rows.append(
                {
                    **key,
                    "arm": method.arm,
                    "network": method.network,
                    "back": method.back,
                    "case": case,
                    **{score: f"{row[score]:.5f}" for score in SCORES},
                    "minutes": f"{minutes:.2f}",
                    "precision": precision,
                }
            )
    # Of each experiment once, whatever the number of its methods: it opens every mask.
    for experiment in dict.fromkeys(method.experiment for method in methods):
        if experiment not in PEERS:
            key = key_of(data, place, experiment)
            own = settings[*place, experiment]
            masks += [{**key, **row} for row in mask_qualities(own)]
    _replace_rows(STORED, pd.DataFrame(rows).astype(str))
    if masks:
        _replace_rows(STORED_MASKS, pd.DataFrame(masks).astype(str))


def mask_qualities(settings: Settings) -> list[dict[str, str]]:
    """Return the mean true Dice of each set of pseudo-masks, beside what is known without truth.

    A row says which masks: those that a network made (`of 2d`), or those that taught it (`for 2d`).
    Without truth their confidence is known and, of those that a network made, the agreement: their
    Dice with the other network's of the same round. `tells` is Spearman's rank correlation of
    either with the true Dice over cases: whether it finds the bad masks.
    """
    results = CLONE / "results" / settings.experiment
    rows = []
    for audit in sorted(results.glob("cotrain/round-*/audit/train_*.tsv")):
        taught = read_table(audit).rename(columns={"truth_dice": "true_dice"})
        rows.append((audit.parts[-3], audit.stem.replace("train_", "for "), taught))
    truths = read_table(results / "cases" / "unlabelled.tsv").set_index("case")["label"]
    for manifest in sorted(results.glob("cotrain/round-*/pseudo_*/manifest-0.tsv")):
        made = read_table(manifest)
        network = manifest.parent.name.removeprefix("pseudo_")
        other = manifest.parents[1] / f"pseudo_{'3d' if network == '2d' else '2d'}" / manifest.name
        theirs = read_table(other).set_index("case")["mask"] if other.is_file() else None
        for index, case, mask in made[["case", "mask"]].itertuples():
            label_map = read_labels(manifest.parent / mask)[0]
            against = {"true_dice": truths[case]}
            if theirs is not None:
                against["agreement"] = other.parent / theirs[case]
            for name, path in against.items():
                dice = true_dice(label_map, read_labels(path)[0], settings.labels)
                made.loc[index, name] = dice
        rows.append((manifest.parts[-3], manifest.parts[-2].replace("pseudo_", "of "), made))
    return [
        {"round": str(int(round_[-2:])), "masks": masks, **qualities_of(table)}
        for round_, masks, table in rows
    ]


def qualities_of(table: pd.DataFrame) -> dict[str, str]:
    """Return the means over the cases of a mask set, and what tells its good masks from its bad.

    table: `true_dice`, `confidence` and, where there is another network's, `agreement`.
    """
    numbers = {
        name: pd.to_numeric(table[name]) if name in table else None
        for name in ("true_dice", *ESTIMATES)
    }
    row = {name: "" if each is None else f"{each.mean():.5f}" for name, each in numbers.items()}
    for name in ESTIMATES:
        both = numbers[name], numbers["true_dice"]
        # Of equal ones there is no order to tell.
        is_ordered = all(each is not None and each.nunique() > 1 for each in both)
        row[f"{name}_tells"] = (
            f"{both[0].corr(both[1], method='spearman'):.3f}" if is_ordered else ""
        )
    return row


def cost_of(results: Path, method: Method, *, last: int) -> tuple[float, str]:
    """Return the processor minutes of all training and mask making up to a round.

    And the precision of its trainings, `fp32` or `bf16`, which a CPU chooses by what it computes
    fast: minutes of one compare with minutes of the same alone.
    results: folder of the experiment, whose steps noted both beside what they made. Its test masks
    and scores, and the audits of a second each, are not counted. last: number of the round that it
    ends with.
    """
    if method.arm == "cotrain":
        # The last round's own masks are made for this table alone, and teach nobody.
        steps = [
            path
            for number in range(last + 1)
            for kind in ("train_*", "teacher_*", *(["pseudo_*"] if number < last else []))
            for path in results.glob(f"cotrain/round-{number:02d}/{kind}/provenance*.json")
        ]
    else:
        networks = ["2d", "3d"] if method.network == "mean" else [method.network]
        # A training that nobody has taught so far is the same in both arms; 2D has no last one.
        steps = []
        for number in range(last + 1):
            for network in networks:
                of_round = [
                    results / f"{arm}/round-{number:02d}/train_{network}/provenance.json"
                    for arm in ("labels_only", "cotrain")
                ]
                steps += [path for path in of_round if path.is_file()][:1]
    noted = {path: json.loads(path.read_text()) for path in steps}
    minutes = sum(note["cpu_seconds"] for note in noted.values()) / 60
    # Masks are made in a precision of their own.
    of_trainings = {
        note["precision"] for path, note in noted.items() if path.parent.name.startswith("train_")
    }
    return minutes, "+".join(sorted(of_trainings))


def _replace_rows(path: Path, rows: pd.DataFrame) -> None:
    """Add rows to a stored table in place of those of the same experiment and set."""
    if path.is_file():
        stored = read_table(path)
        fresh = set(rows[KEY].itertuples(index=False, name=None))
        kept = [key not in fresh for key in stored[KEY].itertuples(index=False, name=None)]
        rows = pd.concat([stored[kept], rows])
    write_table(rows.sort_values([*KEY, *rows.columns[4:8]], ignore_index=True), path)


# -------------------------------------------------------------------------------- reporting


class Standing(NamedTuple):
    """A method's test scores over labelled sets: one row a set, and the means over its cases."""

    method: Method
    sets: pd.DataFrame

    @property
    def dice(self) -> pd.Series:
        """Mean Dice in %, by set."""
        return 100 * self.sets["dice"]


def standings_of(stored: pd.DataFrame) -> list[Standing]:
    """Return how the methods stand that were scored, in the order of METHODS.

    stored: rows of the stored table of one data set and number of labelled cases.
    """
    standings = []
    for method in METHODS:
        rows = stored[
            (stored["experiment"] == method.experiment)
            & (stored["arm"] == method.arm)
            & (stored["network"] == method.network)
            & (stored["back"] == method.back)
        ]
        if not rows.empty:
            by_set = rows.groupby("set")
            sets = by_set[[*SCORES, "minutes"]].mean()
            sets["worst"] = by_set["dice"].min()
            sets["precision"] = by_set["precision"].first()
            standings.append(Standing(method, sets))
    return standings


def table_of(standings: list[Standing]) -> list[str]:
    """Return the lines of a Markdown table: a method a line."""
    named = {standing.method: standing for standing in standings}
    lines = [
        "| method | sets | Dice % | worst case % | Jaccard % | HD95 mm | ASD mm | over 3D, labels "
        "only | gap recovered | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for standing in standings:
        sets = standing.sets
        cells = [
            standing.method.words,
            " ".join(map(str, sets.index)),
            mean_and_sd(standing.dice),
            mean_and_sd(100 * sets["worst"]),
            mean_and_sd(100 * sets["jaccard"]),
            mean_and_sd(sets["hd95_mm"], digits=2),
            mean_and_sd(sets["asd_mm"], digits=2),
            _over(standing, named.get(BASELINE)),
            _gap(standing, named.get(BASELINE), named.get(BOUND)),
            _minutes(standing),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def bar_for(product: Method) -> list[Method]:
    """Return what a product must be above: after longer training, the shorter one, too."""
    return [*BAR, *SHORTER] if product in PRODUCTS else BAR


def answer_of(standings: list[Standing]) -> list[str]:
    """Return the lines of a short Markdown table: how far the products are above each method."""
    named = {standing.method: standing for standing in standings}
    products = [named[method] for method in ALL_PRODUCTS if method in named]
    above = "".join(f" {product.method.words}, is above it by |" for product in products)
    lines = [f"| method | sets | Dice % | minutes |{above}", "|---" * (4 + len(products)) + "|"]
    for standing in standings:
        is_product = standing.method in ALL_PRODUCTS
        gains = [
            _gain(product.dice, standing.dice) if standing.method in bar_for(product.method) else ""
            for product in products
        ]
        words = f"**{standing.method.words}**" if is_product else standing.method.words
        cells = [words, " ".join(map(str, standing.sets.index)), mean_and_sd(standing.dice)]
        cells += [_minutes(standing), *gains]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def bar_of(standings: list[Standing], *, chosen_on: tuple[int, ...]) -> list[str]:
    """Return the lines of a Markdown table: each product against all it must be above.

    chosen_on: sets whose unlabelled truth chose the settings; the others are shown apart, too.
    """
    named = {standing.method: standing for standing in standings}
    lines = [
        "| product | against | sets | Dice, points | on sets not used for tuning "
        "| worst case, points |",
        "|---|---|---|---|---|---|",
    ]
    for product in (named[method] for method in ALL_PRODUCTS if method in named):
        for other in (named[method] for method in bar_for(product.method) if method in named):
            sets = product.sets.index.intersection(other.sets.index)
            if sets.empty:
                continue
            fresh = product.dice.drop(list(chosen_on), errors="ignore")
            worst = [100 * each.sets["worst"] for each in (product, other)]
            lines.append(
                f"| {product.method.words} | {other.method.words} | {' '.join(map(str, sets))} "
                f"| {_gain(product.dice, other.dice)} | {_gain(fresh, other.dice)} "
                f"| {_gain(*worst)} |"
            )
    return lines


def numbers_of(by_number: dict[int, list[Standing]]) -> list[str]:
    """Return the lines of a Markdown table: what each product gains with how many labelled cases.

    by_number: how the methods stand, by the number of labelled cases.
    """
    lines = [
        "| labelled | order | sets | 3D, labels only | 3D, co-trained | gain "
        "| mean of both, labels only | mean of both, co-trained | gain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for labelled, standings in by_number.items():
        named = {standing.method: standing for standing in standings}
        for order, pairs in ORDERS.items():
            complete = {
                pair[1].network: pair for pair in pairs if all(method in named for method in pair)
            }
            if not complete:
                continue
            # Of the sets that all of them have: which cases are labelled moves every mean.
            scored = [named[method].dice for pair in complete.values() for method in pair]
            sets = pd.concat(scored, axis=1, join="inner").index
            cells = []
            for network in ("3d", "mean"):
                if network not in complete:
                    cells += ["", "", ""]
                    continue
                before, after = (named[method].dice[sets] for method in complete[network])
                cells += [mean_and_sd(before), mean_and_sd(after), _gain(after, before)]
            lines.append(
                f"| {labelled} | {order} | {' '.join(map(str, sets))} | {' | '.join(cells)} |"
            )
    return lines


def _over(standing: Standing, baseline: Standing | None) -> str:
    """Return the gain over the baseline; nothing where it is missing, or the method itself.

    All labels are the same cases whichever set is labelled, and so are not paired with sets.
    """
    if baseline is None or baseline.method == standing.method:
        return ""
    if standing.method == BOUND:
        return f"{standing.dice.mean() - baseline.dice.mean():+.1f}"
    return _gain(standing.dice, baseline.dice)


def _minutes(standing: Standing) -> str:
    """Return the mean minutes of the sets, each precision by itself, because it sets the pace."""
    means = standing.sets.groupby("precision")["minutes"].mean()
    return ", ".join(f"{minutes:.0f} in {precision}" for precision, minutes in means.items())


def _gain(values: pd.Series, others: pd.Series) -> str:
    """Return the gain of values over others, both by set, paired by the sets that both have.

    With an interval from three sets on: that of two is 13 times as wide as its standard error.
    """
    both = values.index.intersection(others.index)
    if both.empty:
        return ""
    gain = paired_gain(values[both], others[both])
    mean = f"{gain.mean:+z.1f}"
    if gain.cases < 3:
        return mean
    # A bound next to zero must show its side of it.
    digits = 2 if min(abs(gain.low), abs(gain.high)) < 0.1 else 1
    text = f"{mean} ({gain.low:+.{digits}f} to {gain.high:+.{digits}f})"
    return f"**{text}**" if gain.low > 0 or gain.high < 0 else text


def _gap(standing: Standing, baseline: Standing | None, bound: Standing | None) -> str:
    """Return (x - labels only) / (all labels - labels only) in %, over the sets of both x's.

    All labels are the same cases whichever set is labelled, so that their mean is over seeds.
    """
    if baseline is None or bound is None or standing.method in (BASELINE, BOUND):
        return ""
    sets = standing.dice.index.intersection(baseline.dice.index)
    if sets.empty:
        return ""
    low, high = baseline.dice[sets].mean(), bound.dice.mean()
    return f"{100 * (standing.dice[sets].mean() - low) / (high - low):.0f} %"


def masks_table(stored: pd.DataFrame) -> list[str]:
    """Return the lines of a Markdown table: true Dice of the pseudo-masks, round by round."""
    lines = [
        "| experiment | round | masks | sets | true Dice % | confidence % | agreement % "
        "| confidence tells | agreement tells |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (experiment, round_, masks), rows in stored.groupby(["experiment", "round", "masks"]):
        cells = [experiment, round_, masks.replace("d", "D"), " ".join(map(str, rows["set"]))]
        for name in ("true_dice", *ESTIMATES):
            cells.append(_mean_of_stored(100 * rows[name], digits=1))
        for name in ESTIMATES:
            cells.append(_mean_of_stored(rows[f"{name}_tells"], digits=2))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _mean_of_stored(values: pd.Series, *, digits: int) -> str:
    """Return mean and sd of what is stored; nothing where nothing is."""
    values = values.dropna()
    return "" if values.empty else mean_and_sd(values, digits=digits)


def draw(standings: dict[str, list[Standing]], path: Path) -> None:
    """Draw the Dice of every set, a line a method, a panel for each data set and label count."""
    from matplotlib.figure import Figure

    columns = min(2, len(standings))
    rows = -(-len(standings) // columns)
    lines = [len(panel) for panel in standings.values()]
    heights = [0.3 * max(lines[columns * row : columns * (row + 1)]) + 1.2 for row in range(rows)]
    figure = Figure(figsize=(7 * columns, sum(heights)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    for unused in grid[len(standings) :]:
        unused.set_axis_off()
    for axes, (title, panel) in zip(grid, standings.items(), strict=False):
        for line, standing in enumerate(reversed(panel)):
            uses_unlabelled = standing.method.arm == "cotrain"
            others = "tab:orange" if standing.method in BAR else "tab:blue"
            colour = others if uses_unlabelled else "0.5"
            axes.plot(standing.dice, [line] * len(standing.dice), "o", color=colour, alpha=0.6)
            axes.plot(standing.dice.mean(), line, "|", color=colour, markersize=18)
        axes.set_yticks(range(len(panel)), [each.method.words for each in reversed(panel)])
        axes.set_xlabel("test Dice, %; dots: sets, bar: mean")
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=130)


def draw_by_number(by_data: dict[str, dict[int, list[Standing]]], path: Path) -> None:
    """Draw the Dice of the built-in order beside its control, over the number of labelled cases.

    by_data: a data set's title, and how the methods stand by the number of labelled cases.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(by_data), 3.8), layout="constrained")
    for axes, (title, by_number) in zip(
        figure.subplots(1, len(by_data), squeeze=False).flat, by_data.items(), strict=True
    ):
        named = {
            place: {standing.method: standing.dice for standing in standings}
            for place, standings in enumerate(by_number.values())
        }
        for line, marker, network, pair in zip(
            ("-", "--"), "os", ("3D", "mean of both"), ORDERS["labels first"], strict=True
        ):
            for arm, colour, method in zip(
                ("labels only", "co-trained"), ("0.5", "tab:blue"), pair, strict=True
            ):
                dice = {place: each[method] for place, each in named.items() if method in each}
                means = [each.mean() for each in dice.values()]
                label = f"{network}, {arm}"
                axes.plot(list(dice), means, line, marker=marker, color=colour, label=label)
                for place, each in dice.items():
                    axes.plot([place] * len(each), each, marker, color=colour, alpha=0.3, ms=4)
        for bound in [each[BOUND] for each in named.values() if BOUND in each][:1]:
            axes.axhline(bound.mean(), color="0.7", linestyle=":", label="3D, all labels")
        axes.set_xticks(range(len(by_number)), map(str, by_number))
        axes.set(title=title, xlabel="labelled cases", ylabel="test Dice, %")
        axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)


def report(arguments: argparse.Namespace) -> None:
    """Redraw docs/accuracy_tables.md, the pictures and the tables of docs/accuracy.md."""
    if not STORED.is_file():
        raise InputError(f"{STORED} is missing; make it with `accuracy.py run`.")
    stored = read_table(STORED)
    numbers = [*SCORES, "minutes", "set", "back"]
    stored[numbers] = stored[numbers].apply(pd.to_numeric)
    masks = read_table(STORED_MASKS)
    tells = [f"{name}_tells" for name in ESTIMATES]
    of_masks = ["true_dice", *ESTIMATES, *tells, "set", "round"]
    masks[of_masks] = masks[of_masks].apply(pd.to_numeric)
    parts, panels, blocks, by_data = [], {}, {}, {}
    is_bound = stored["experiment"] == BOUND.experiment
    for data in DATA:
        # All labels are the same cases beside any number of labelled ones.
        bound = stored[is_bound & (stored["data"] == data)]
        others = stored[~is_bound & (stored["data"] == data)]
        by_number = {
            labelled: standings_of(pd.concat([rows, bound]))
            for labelled, rows in others.groupby(others["labelled"].astype(int))
        }
        if by_number:
            by_data[DATA[data].title] = by_number
        if len(by_number) > 1:
            blocks[f"{data}_by_number"] = numbers_of(by_number)
            parts += [f"## {DATA[data].title}, by number of labelled cases", ""]
            parts += [*numbers_of(by_number), ""]
        for labelled, standings in by_number.items():
            title = f"{DATA[data].title}, {labelled} labelled"
            panels[title] = standings
            blocks[f"{data}_{labelled}"] = answer_of(standings)
            of_these = masks[(masks["data"] == data) & (masks["labelled"] == str(labelled))]
            bar = bar_of(standings, chosen_on=DATA[data].chosen_on)
            parts += [f"## {title}", "", *table_of(standings), "", *bar, ""]
            parts += [
                "Pseudo-masks *of* each network, and those it was taught by (*for*), unlabelled "
                "cases. Agreement: Dice between both networks' masks; *tells*: rank correlation "
                "with the true Dice over cases. Both are of newer runs alone:",
                "",
                *masks_table(of_these),
                "",
            ]
    write_text(TABLES_PAGE + "\n".join(parts), CLONE / "docs" / "accuracy_tables.md")
    page = CLONE / "docs" / "accuracy.md"
    write_text(filled(page.read_text(), blocks), page)
    draw(panels, CLONE / "docs" / "accuracy.png")
    draw_by_number(by_data, CLONE / "docs" / "accuracy_by_number.png")


TABLES_PAGE = """# All tables of the accuracy benchmark

Made by `python benchmarks/accuracy.py report` from the stored scores. What they mean, and how they
were measured: [accuracy.md](accuracy.md). Where two rows have other sets, compare them by the
tables of products, which pair the sets that both have.

"""


def filled(page: str, blocks: dict[str, list[str]]) -> str:
    """Return a page with a table between each `<!-- table NAME -->` and the next `<!-- end -->`.

    Raises InputError where no scores of a table are stored, or one of the two lines is missing.
    """
    marks = re.findall(r"<!-- (table|end)\b", page)
    if marks != ["table", "end"] * (len(marks) // 2):
        raise InputError(
            "docs/accuracy.md wants `<!-- table NAME -->` and `<!-- end -->` in turn, and has "
            f"{', '.join(marks)}; put back what is missing."
        )

    def table(found: re.Match) -> str:
        if found[1] not in blocks:
            raise InputError(
                f"docs/accuracy.md wants a table {found[1]!r}, and no scores of it are stored; "
                f"stored are {', '.join(blocks)}."
            )
        return f"<!-- table {found[1]} -->\n" + "\n".join(blocks[found[1]]) + "\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="train, score and store")
    running.add_argument("--data", choices=sorted(DATA), required=True)
    running.add_argument("--data-folder", type=Path, required=True, help="where its images are")
    running.add_argument("--labelled", type=int, nargs="+", default=[4], help="labelled cases")
    running.add_argument("--sets", type=int, nargs="+", default=[0, 1, 2], help="blocks of cases")
    running.add_argument(
        "--experiments",
        nargs="+",
        default=[*EXPERIMENTS, *PEERS],
        metavar="NAME",
        help=f"of {', '.join([*EXPERIMENTS, *PEERS])}; default: all",
    )
    running.add_argument("--cores", type=int, default=2, help="jobs side by side")
    running.set_defaults(run=run)
    redrawing = commands.add_parser("report", help="redraw tables and plot from what is stored")
    redrawing.set_defaults(run=report)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
