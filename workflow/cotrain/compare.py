"""Experiments beside each other: in, their evaluations; out, a table with means over experiments.

The intervals of one experiment's summary cover its test cases only. Here the unit is the
experiment, which may differ in its labelled cases or its seed: mean and sample standard deviation
over experiments, and the paired 95 % t interval of the gain in test Dice over its control.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cotrain.errors import InputError
from cotrain.files import write_atomically, write_table, write_text
from cotrain.summary import (
    CO_TRAINED,
    CONTROL,
    NETWORK_COLOURS,
    NETWORK_WORDS,
    aligned,
    mean_and_sd,
    paired_gain,
    points,
    read_evaluations,
    words_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARISONS = (("3d", "3d"), ("2d", "2d"), ("mean", "mean"), ("3d", "mean"))
"""Networks whose gain is told: a co-trained one over one trained on labels only."""
METHODS = [(arm, network) for arm in (CO_TRAINED, CONTROL) for network in NETWORK_WORDS]


def final_scores(tables: list[Path]) -> dict[tuple[str, str], pd.DataFrame]:
    """Return (arm, network) → scores per case of the last round of an experiment's evaluations."""
    scored = read_evaluations(tables)
    last = max(trained.round for trained in scored)
    return {
        (trained.arm, trained.network): cases
        for trained, cases in scored.items()
        if trained.round == last
    }


def table_of(named: dict[str, list[Path]], groups: dict[str, str]) -> pd.DataFrame:
    """Return one row per experiment: group, and mean test Dice (0..1) of each arm's networks.

    named: experiment → its evaluations. `worst_<arm>_<network>` is the least Dice of a case. Raises
    InputError where an experiment has no scored test case.
    """
    rows = []
    for name, tables in named.items():
        row: dict[str, object] = {"experiment": name, "group": groups[name]}
        scores = final_scores(tables) if tables else {}
        if not any(len(cases) for cases in scores.values()):
            raise InputError(
                f"{name} has no scored test case and cannot be compared; give test cases a label "
                "in its case table, or leave it out of the table of experiments."
            )
        for (arm, network), cases in scores.items():
            row[f"{arm}_{network}"] = cases["dice"].mean()
            row[f"worst_{arm}_{network}"] = cases["dice"].min()
        rows.append(row)
    return pd.DataFrame(rows)


def text_of(table: pd.DataFrame) -> str:
    """Return the comparison as text: each experiment, then means over the experiments of a group.

    Differences are paired by experiment.
    """
    named = [(f"{arm}_{network}", words_of(arm, network)) for arm, network in METHODS]
    named = [(column, words) for column, words in named if column in table]
    rows = [["experiment", "group", *(words for _, words in named)]]
    for row in table.to_dict("records"):
        cells = [points(row[column]) for column, _ in named]
        rows.append([row["experiment"], row["group"], *cells])
    parts = ["Dice of the test cases in %, last round\n\n" + aligned(rows)]
    means = [["group", "experiments", *(words for _, words in named)]]
    sentences = []
    for group, members in table.groupby("group", sort=False):
        cells = [mean_and_sd(100 * members[column]) for column, _ in named]
        means.append([str(group), str(len(members)), *cells])
        sentences += [
            _gain_sentence(str(group), members, network, baseline)
            for network, baseline in COMPARISONS
            if {f"{CO_TRAINED}_{network}", f"{CONTROL}_{baseline}"} <= set(members)
        ]
    parts.append("Mean ± standard deviation over experiments\n\n" + aligned(means))
    parts.append("\n".join(sentences))
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(table: pd.DataFrame) -> "Figure":
    """Return the gain of each experiment's co-trained networks over their controls, by group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(table["group"]))
    for shift, (network, colour) in zip((-0.2, 0.0, 0.2), NETWORK_COLOURS.items(), strict=True):
        columns = [f"{CO_TRAINED}_{network}", f"{CONTROL}_{network}"]
        if not set(columns) <= set(table):
            continue
        gains = 100 * (table[columns[0]] - table[columns[1]])
        places = [groups.index(group) + shift for group in table["group"]]
        axes.plot(places, gains, "o", color=colour, label=NETWORK_WORDS[network])
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel("co-trained - labels only, points of Dice")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure


def _gain_sentence(group: str, members: pd.DataFrame, network: str, baseline: str) -> str:
    by_name = members.set_index("experiment")
    gain = paired_gain(by_name[f"{CO_TRAINED}_{network}"], by_name[f"{CONTROL}_{baseline}"])
    of, over = words_of(CO_TRAINED, network), words_of(CONTROL, baseline)
    start = f"{group}: {of} - {over} = {points(gain.mean, sign=True)} points"
    if gain.cases == 1:
        return f"{start}, from one experiment."
    low, high = points(gain.low, sign=True), points(gain.high, sign=True)
    interval = f"95 % interval {low} to {high}"
    meaning = (
        "a gain" if gain.low > 0 else "a loss" if gain.high < 0 else "not to be told from nothing"
    )
    return f"{start} ({interval}, paired over {gain.cases} experiments): {meaning}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain compare`."""
    parser.add_argument(
        "--experiments",
        nargs="+",
        required=True,
        metavar="GROUP:NAME",
        help="each experiment, with the group it is averaged in",
    )
    parser.add_argument(
        "--evaluation",
        nargs="+",
        type=Path,
        required=True,
        metavar="TSV",
        help="tables <NAME>/evaluation/<arm>_<network>_round-<RR>.tsv of all of them",
    )
    parser.add_argument("--out-dir", type=Path, required=True, help="folder to write into")


def run(arguments: argparse.Namespace) -> None:
    """Write comparison.tsv, comparison.txt and comparison.png, and print the text."""
    groups = {}
    for word in arguments.experiments:
        group, _, name = word.rpartition(":")
        groups[name] = group
    named = {
        name: [table for table in arguments.evaluation if table.parent.parent.name == name]
        for name in groups
    }
    table = table_of(named, groups)
    text = text_of(table)
    write_table(table.round(6), arguments.out_dir / "comparison.tsv")
    with write_atomically(arguments.out_dir / "comparison.png") as temporary:
        draw(table).savefig(temporary, dpi=150)
    write_text(text, arguments.out_dir / "comparison.txt")
    print(text, end="")
