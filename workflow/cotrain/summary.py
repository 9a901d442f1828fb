"""Says whether co-training paid: in, evaluations, curves and audits; out, tables and plots.

In: evaluation tables `<arm>_<network>_round-<RR>.tsv` (columns case, label, dice, jaccard,
hd95_mm, asd_mm, hd95_voxel, asd_voxel), `.../<arm>/round-<RR>/train_<network>/curve.csv` and
`.../<arm>/round-<RR>/audit/train_<network>.tsv`. Out, in one folder: `scores.tsv` (one row per arm,
network and round), `summary.txt` (what is printed, too), `dice_per_round.png` and
`training_curves.png`.

A case's score is the mean over its labels; means, deviations and intervals are then over cases.
The gain is the mean of the paired differences d_i over the n test cases, with the paired t interval
mean(d) +/- t(0.975, n - 1) * sd(d) / sqrt(n).
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from cotrain.errors import InputError
from cotrain.files import read_table, write_atomically, write_table, write_text
from cotrain.metrics import DISTANCES, SCORES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CO_TRAINED = "cotrain"
CONTROL = "labels_only"
ARM_WORDS = {CO_TRAINED: "co-trained", CONTROL: "labels only"}
NETWORK_WORDS = {"2d": "2D", "3d": "3D", "mean": "mean"}
NETWORK_COLOURS = {"2d": "tab:blue", "3d": "tab:orange", "mean": "tab:grey"}
CURVE_COLUMNS = ("epoch", "round", "loss", "learning_rate", "share_wanted", "share_realised")


class Trained(NamedTuple):
    """What was trained or scored: an arm's network (`2d`, `3d` or `mean` of both) in a round."""

    arm: str
    network: str
    round: int

    def __str__(self) -> str:
        return f"{words_of(self.arm, self.network)} of round {self.round:02d}"


class Gain(NamedTuple):
    """A mean paired difference with its 95 % confidence interval; infinite from a single case."""

    mean: float
    low: float
    high: float
    cases: int


class Teaching(NamedTuple):
    """The masks that taught a network in a round, counted; None where there is nothing to count."""

    masks: int
    accepted: int
    mean_confidence: float | None
    mean_truth_dice: float | None
    with_truth: int


# ---------------------------------------------------------------------------------- reading


def trained_from_evaluation(path: Path) -> Trained:
    """Return what `<arm>_<network>_round-<RR>.tsv` scores; InputError for another name."""
    found = re.fullmatch(r"(cotrain|labels_only)_(2d|3d|mean)_round-(\d+)\.tsv", path.name)
    if not found:
        raise InputError(
            f"The evaluation table {path} is not named <arm>_<network>_round-<RR>.tsv, "
            "as in cotrain_3d_round-02.tsv; rename it or leave it out."
        )
    return Trained(found[1], found[2], int(found[3]))


def trained_from_stage(path: Path, *, file: str) -> Trained:
    """Return what a file under `<arm>/round-<RR>/` belongs to, from its path.

    `file` is what follows the round's folder, such as `train_<network>/curve.csv`. Raises
    InputError where the path does not end so.
    """
    wanted = re.escape(file).replace("<network>", "(2d|3d)")
    found = re.search(rf"(?:^|/)(cotrain|labels_only)/round-(\d+)/{wanted}$", path.as_posix())
    if not found:
        raise InputError(
            f"The path {path} does not end in <arm>/round-<RR>/{file}, so its arm, round and "
            "network are not known; give the file where it was made."
        )
    return Trained(found[1], found[3], int(found[2]))


def numbers_from(path: Path, *, columns: tuple[str, ...]) -> pd.DataFrame:
    """Return a table with `columns` as floats (an empty cell is NaN) and the others as text.

    Raises InputError where a column is missing or a cell is no number.
    """
    table = read_table(path)
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(
            f"The table {path} lacks the column '{missing[0]}'; make it again with the command "
            "that writes it."
        )
    for column in columns:
        try:
            table[column] = pd.to_numeric(table[column].replace("", math.nan))
        except ValueError as error:
            raise InputError(
                f"The column '{column}' of {path} holds something else than numbers ({error}); "
                "make the table again."
            ) from error
    return table


def read_evaluations(paths: list[Path]) -> dict[Trained, pd.DataFrame]:
    """Return the scores per case (index: case, columns: SCORES) of each evaluation table.

    paths and errors: as of `read_tables`.
    """
    return {trained: means_per_case(table) for trained, table in read_tables(paths).items()}


def read_tables(paths: list[Path]) -> dict[Trained, pd.DataFrame]:
    """Return each evaluation table, with a row for each case and label.

    Raises InputError where a table's name is not of the pattern, or one is given twice.
    """
    tables: dict[Trained, pd.DataFrame] = {}
    for file in paths:
        trained = trained_from_evaluation(file)
        if trained in tables:
            raise InputError(f"The {trained} is evaluated twice, once in {file}; give it once.")
        tables[trained] = numbers_from(file, columns=SCORES)
    return dict(sorted(tables.items()))


def read_curves(paths: list[Path]) -> dict[tuple[str, str], pd.DataFrame]:
    """Return the training curve of each (arm, network): that of its last round has all epochs."""
    by_round = sorted(
        (trained_from_stage(path, file="train_<network>/curve.csv"), path) for path in paths
    )
    last = {(trained.arm, trained.network): path for trained, path in by_round}
    return {key: numbers_from(path, columns=CURVE_COLUMNS) for key, path in last.items()}


def read_audits(paths: list[Path]) -> dict[Trained, Teaching]:
    """Return what taught each network in each round, from `audit/train_<network>.tsv` tables.

    Raises InputError where a path is another one, or a table does not say what was accepted.
    """
    teachings = {}
    for path in paths:
        trained = trained_from_stage(path, file="audit/train_<network>.tsv")
        table = numbers_from(path, columns=("confidence", "truth_dice"))
        try:
            teachings[trained] = teaching_of(table)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return dict(sorted(teachings.items(), key=lambda item: (item[0].arm, item[0].round, item[0])))


# -------------------------------------------------------------------------------- computing


def means_per_case(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over labels of each score (index: case) from rows per case and label."""
    return table.groupby("case")[list(SCORES)].mean()


def scores_table(evaluations: Mapping[Trained, pd.DataFrame]) -> pd.DataFrame:
    """Return one row per arm, network and round: cases, then mean, sd and worst of every score.

    The sd is that of a sample (n - 1), empty below two cases. The worst case has the least Dice or
    Jaccard, or the largest distance; `dice_worst_case` is its name. Without cases all are empty.
    """
    columns = ["arm", "network", "round", "cases"]
    columns += [f"{score}_{of}" for score in SCORES for of in ("mean", "sd", "worst")]
    rows = []
    for trained, cases in evaluations.items():
        row: dict[str, str | int | float] = {
            "arm": trained.arm,
            "network": trained.network,
            "round": f"{trained.round:02d}",
            "cases": len(cases),
        }
        for score in SCORES:
            worst = cases[score].max() if score in DISTANCES else cases[score].min()
            row |= {
                f"{score}_mean": cases[score].mean(),
                f"{score}_sd": cases[score].std(ddof=1),
                f"{score}_worst": worst,
            }
        row["dice_worst_case"] = "" if cases.empty else cases["dice"].idxmin()
        rows.append(row)
    return pd.DataFrame(rows, columns=[*columns, "dice_worst_case"])


def paired_gain(scores: pd.Series, baseline: pd.Series) -> Gain:
    """Return the mean of `scores - baseline` over cases, with its paired 95 % t interval.

    Both are indexed by case. Raises InputError where they are empty or hold different cases.
    """
    from scipy.stats import t

    if scores.empty or set(scores.index) != set(baseline.index):
        raise InputError(
            f"A paired comparison needs the same cases on both sides, but one has {len(scores)} "
            f"and the other {len(baseline)}, or other names; evaluate both on one case table."
        )
    differences = (scores - baseline.loc[scores.index]).to_numpy()
    mean, cases = float(differences.mean()), len(differences)
    if cases == 1:
        return Gain(mean, -math.inf, math.inf, cases)
    half = float(t.ppf(0.975, cases - 1) * differences.std(ddof=1) / math.sqrt(cases))
    return Gain(mean, mean - half, mean + half, cases)


def verdict(gain: Gain, *, of: str, over: str) -> str:
    """Return the one honest sentence that a gain in Dice (0..1) allows, in points of per cent."""
    if gain.cases == 1:
        return (
            f"{of} and {over} cannot be told apart from one test case "
            f"(difference {points(gain.mean, sign=True)} points of Dice)."
        )
    interval = (
        f"95 % interval {points(gain.low, sign=True)} to {points(gain.high, sign=True)}, "
        f"paired over {gain.cases} test cases"
    )
    if gain.low > 0:
        return f"{of} beat {over} by {points(gain.mean)} points of Dice ({interval})."
    if gain.high < 0:
        lower = points(-gain.mean)
        return f"{of} did not beat {over}: it scored {lower} points of Dice lower ({interval})."
    return (
        f"{of} and {over} cannot be told apart: "
        f"the difference is {points(gain.mean, sign=True)} points of Dice ({interval})."
    )


def teaching_of(audit: pd.DataFrame) -> Teaching:
    """Count an audit table (columns accepted, confidence, truth_dice; NaN where not known).

    The means are over accepted masks, those that taught; the truth's over those where it is known.
    Raises InputError where `accepted` is neither true nor false.
    """
    unclear = sorted(set(audit["accepted"]) - {"true", "false"})
    if unclear:
        raise InputError(
            f"the column 'accepted' holds '{unclear[0]}', but only true or false has a meaning; "
            "mend the table."
        )
    taught = audit[audit["accepted"] == "true"]
    known = taught["truth_dice"].dropna()
    return Teaching(
        masks=len(audit),
        accepted=len(taught),
        mean_confidence=None if taught.empty else float(taught["confidence"].mean()),
        mean_truth_dice=None if known.empty else float(known.mean()),
        with_truth=len(known),
    )


# ---------------------------------------------------------------------------------- writing


def summary_text(
    tables: Mapping[Trained, pd.DataFrame],
    teachings: Mapping[Trained, Teaching],
    *,
    note: str = "",
) -> str:
    """Return the text of `summary.txt`. tables: as of `read_tables`."""
    tables = {trained: table for trained, table in tables.items() if not table.empty}
    scored = {trained: means_per_case(table) for trained, table in tables.items()}
    if scored:
        parts = [_rounds_part(scored), _final_part(scored), _labels_part(tables)]
        parts = [*filter(None, parts), _gain_part(scored)]
    else:
        parts = ["Nothing could be scored: there is no test case with a label."]
    if teachings:
        parts.append(_teaching_part(teachings))
    if note:
        parts.append(note)
    return "\n\n".join(parts) + "\n"


def aligned(rows: list[list[str]]) -> str:
    """Return rows of cells as lines with aligned columns, the first row being the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def words_of(arm: str, network: str) -> str:
    """Return what texts and pictures call a network of an arm."""
    return f"{ARM_WORDS[arm]} {NETWORK_WORDS[network]}"


def mean_and_sd(values: pd.Series, *, digits: int = 1) -> str:
    """Return mean ± sample standard deviation, of a single value the value alone."""
    deviation = values.std(ddof=1)
    spread = "" if math.isnan(deviation) else f" ± {deviation:.{digits}f}"
    return f"{values.mean():.{digits}f}{spread}"


def points(dice: float, *, sign: bool = False) -> str:
    """Return a Dice or a difference of two, 0..1, in per cent with one decimal, and no -0.0."""
    return f"{100 * dice:{'+' if sign else ''}z.1f}"


def _cell(value: float | None) -> str:
    return "-" if value is None else points(value)


def _last_round(scored: Mapping[Trained, pd.DataFrame]) -> int:
    """Return the last round in which the co-trained 3D network was scored, else the last of all."""
    of_student = [key.round for key in scored if (key.arm, key.network) == (CO_TRAINED, "3d")]
    return max(of_student or [key.round for key in scored])


def _rounds_part(scored: Mapping[Trained, pd.DataFrame]) -> str:
    columns = [(arm, network) for arm in (CO_TRAINED, CONTROL) for network in ("2d", "3d")]
    rows = [["round", "2D", "3D", "labels only 2D", "labels only 3D"]]
    for number in sorted({trained.round for trained in scored}):
        cells = [scored.get(Trained(arm, network, number)) for arm, network in columns]
        means = [None if cases is None else cases["dice"].mean() for cases in cells]
        rows.append([f"{number:02d}", *map(_cell, means)])
    counts = sorted({len(cases) for cases in scored.values()})
    over = " or ".join(map(str, counts))
    return f"Dice in %, mean over {over} test cases\n\n{aligned(rows)}"


def _final_part(scored: Mapping[Trained, pd.DataFrame]) -> str:
    last = _last_round(scored)
    heading = ["network", "Dice %", "Jaccard %", "HD95 mm", "ASD mm", "worst case (Dice %)"]
    rows = [heading]
    for trained, cases in scored.items():
        if trained.round == last:
            means = cases.mean()
            rows.append(
                [
                    words_of(trained.arm, trained.network),
                    mean_and_sd(100 * cases["dice"]),
                    points(means["jaccard"]),
                    f"{means['hd95_mm']:.2f}",
                    f"{means['asd_mm']:.2f}",
                    f"{points(cases['dice'].min())} {cases['dice'].idxmin()}",
                ]
            )
    return f"Final round {last:02d}, mean ± standard deviation over cases\n\n{aligned(rows)}"


def _labels_part(tables: Mapping[Trained, pd.DataFrame]) -> str:
    """Return the final Dice of each label, which a mean over labels hides; nothing for one."""
    last = _last_round(tables)
    names = list(dict.fromkeys(name for table in tables.values() for name in table["label"]))
    if len(names) < 2:
        return ""
    rows = [["network", *names]]
    for trained, table in tables.items():
        if trained.round == last:
            dice = table.groupby("label")["dice"].mean()
            cells = [_cell(dice.get(name)) for name in names]
            rows.append([words_of(trained.arm, trained.network), *cells])
    return f"Dice in % of each label, round {last:02d}\n\n{aligned(rows)}"


def _gain_part(scored: Mapping[Trained, pd.DataFrame]) -> str:
    last = _last_round(scored)
    final = scored.get(Trained(CO_TRAINED, "3d", last))
    if final is None:
        return "The gain is not known: the co-trained 3D network was not evaluated."
    baselines = [
        (Trained(CONTROL, "3d", last), "Co-training", "labels alone"),
        (Trained(CONTROL, "mean", last), "Co-training", "the mean of the two label-only networks"),
    ]
    if last > 0:
        first = Trained(CO_TRAINED, "3d", 0)
        baselines.append((first, f"3D of round {last:02d}", "3D of round 00"))
    sentences = []
    for baseline, of, over in baselines:
        if baseline in scored:
            gain = paired_gain(final["dice"], scored[baseline]["dice"])
            sentences.append(verdict(gain, of=of, over=over))
        else:
            sentences.append(f"{of} against {over}: not known, the {baseline} was not evaluated.")
    # What `cotrain predict` makes, against the best that labels alone give in the same steps.
    means = [scored.get(Trained(arm, "mean", last)) for arm in (CO_TRAINED, CONTROL)]
    if all(cases is not None for cases in means):
        gain = paired_gain(*(cases["dice"] for cases in means))
        of = "The mean of the two co-trained networks"
        sentences.append(verdict(gain, of=of, over="the mean of the two label-only networks"))
    control = scored.get(Trained(CONTROL, "3d", last))
    worst = f"Worst case of the co-trained 3D network: {_worst(final)}"
    if control is not None:
        worst += f"; of its control: {_worst(control)}"
    sentences += [
        worst + ".",
        "The intervals cover the test cases only, not the choice of labelled cases or the seed.",
    ]
    return f"Gain of the co-trained 3D network, round {last:02d}\n\n" + "\n".join(sentences)


def _worst(cases: pd.DataFrame) -> str:
    return f"Dice {points(cases['dice'].min())} % ({cases['dice'].idxmin()})"


def _teaching_part(teachings: Mapping[Trained, Teaching]) -> str:
    rows = [["round", "taught", "masks", "accepted", "mean confidence %", "mean true Dice %"]]
    for trained, teaching in teachings.items():
        truth = _cell(teaching.mean_truth_dice)
        if teaching.mean_truth_dice is not None:
            truth += f" (of {teaching.with_truth})"
        rows.append(
            [
                f"{trained.round:02d}",
                NETWORK_WORDS[trained.network],
                str(teaching.masks),
                str(teaching.accepted),
                _cell(teaching.mean_confidence),
                truth,
            ]
        )
    return f"The masks that taught each network (means over the accepted ones)\n\n{aligned(rows)}"


# ---------------------------------------------------------------------------------- drawing


def draw_dice_per_round(evaluations: Mapping[Trained, pd.DataFrame]) -> "Figure":
    """Return the mean Dice over rounds: co-trained solid, controls dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="round", ylabel="Dice on test cases, %")
    scored = {trained: cases for trained, cases in evaluations.items() if not cases.empty}
    if not scored:
        axes.text(
            0.5, 0.5, "there is no test case with a label", ha="center", transform=axes.transAxes
        )
        return figure
    for arm, line, fill in ((CO_TRAINED, "-", "full"), (CONTROL, "--", "none")):
        for network, colour in NETWORK_COLOURS.items():
            places = sorted(
                (key.round, 100 * cases["dice"].mean())
                for key, cases in scored.items()
                if (key.arm, key.network) == (arm, network)
            )
            if places:
                axes.plot(
                    *zip(*places, strict=True),
                    line,
                    color=colour,
                    marker="o",
                    fillstyle=fill,
                    label=words_of(arm, network),
                )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_training_curves(curves: Mapping[tuple[str, str], pd.DataFrame]) -> "Figure":
    """Return loss, learning rate and unlabelled share over epochs, one column per network.

    Co-trained curves are solid, controls dashed; grey lines mark where the co-training's rounds
    begin.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(3, 2, sharex="col")
    for column, network in enumerate(("2d", "3d")):
        of_network = {arm: curve for (arm, name), curve in curves.items() if name == network}
        panels[0, column].set_title(f"{NETWORK_WORDS[network]} network")
        panels[2, column].set_xlabel("epoch")
        _draw_column(panels[:, column], of_network, colour=NETWORK_COLOURS[network])
    for axes, name in zip(panels[:, 0], ("loss", "learning rate", "unlabelled share"), strict=True):
        axes.set_ylabel(name)
    return figure


def _draw_column(
    panels: Sequence["Axes"], curves: Mapping[str, pd.DataFrame], *, colour: str
) -> None:
    """Draw one network's curves, by arm, into its panels: loss, learning rate, share."""
    for arm, curve in curves.items():
        line = "-" if arm == CO_TRAINED else "--"
        for axes, score in zip(panels[:2], ("loss", "learning_rate"), strict=True):
            axes.plot(curve["epoch"], curve[score], line, color=colour, label=ARM_WORDS[arm])
        if arm == CO_TRAINED:
            panels[2].plot(curve["epoch"], curve["share_wanted"], color="black", label="wanted")
            panels[2].plot(
                curve["epoch"], curve["share_realised"], ".", color=colour, label="realised"
            )
            panels[2].set_ylim(-0.05, 1.05)
            starts = curve.groupby("round")["epoch"].min()
            for axes in panels:
                for start in starts.iloc[1:]:
                    axes.axvline(start - 0.5, color="0.8", linewidth=1, zorder=0)
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")


# ---------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cotrain summarise`."""
    parser.add_argument(
        "--evaluation",
        type=Path,
        nargs="*",
        default=[],
        metavar="TSV",
        help="<arm>_<network>_round-<RR>.tsv; none where there are no test cases",
    )
    parser.add_argument(
        "--curves",
        type=Path,
        nargs="*",
        default=[],
        metavar="CSV",
        help="<arm>/round-<RR>/train_<network>/curve.csv",
    )
    parser.add_argument(
        "--audits",
        type=Path,
        nargs="*",
        default=[],
        metavar="TSV",
        help="<arm>/round-<RR>/audit/train_<network>.tsv",
    )
    parser.add_argument(
        "--out-dir", type=Path, required=True, metavar="DIR", help="folder to write into"
    )
    parser.add_argument("--note", default="", metavar="TEXT", help="paragraph for the text's end")


def run(arguments: argparse.Namespace) -> None:
    """Write scores, text and pictures, and print the text."""
    tables = read_tables(arguments.evaluation)
    evaluations = {trained: means_per_case(table) for trained, table in tables.items()}
    text = summary_text(tables, read_audits(arguments.audits), note=arguments.note)
    figures = {
        "dice_per_round.png": draw_dice_per_round(evaluations),
        "training_curves.png": draw_training_curves(read_curves(arguments.curves)),
    }
    write_table(scores_table(evaluations).round(6), arguments.out_dir / "scores.tsv")
    for name, figure in figures.items():
        with write_atomically(arguments.out_dir / name) as temporary:
            figure.savefig(temporary, dpi=150)
    write_text(text, arguments.out_dir / "summary.txt")
    print(text, end="")
