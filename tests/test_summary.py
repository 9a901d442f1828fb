"""Summary numbers worked by hand, the whole command on hand-written tables, and the pictures."""

import math
import re

import pandas as pd
import pytest

from cotrain.__main__ import main
from cotrain.errors import InputError
from cotrain.files import read_table
from cotrain.summary import (
    Gain,
    Trained,
    means_per_case,
    paired_gain,
    read_curves,
    read_evaluations,
    scores_table,
    teaching_of,
    verdict,
)

EVALUATION_COLUMNS = (
    "case", "label", "dice", "jaccard", "hd95_mm", "asd_mm", "hd95_voxel", "asd_voxel",
)  # fmt: skip
AUDIT_COLUMNS = (
    "case", "mask", "soft", "accepted", "reason", "confidence", "volume_ml", "truth_dice",
)  # fmt: skip
CURVE_COLUMNS = (
    "epoch", "round", "loss", "learning_rate", "share_wanted", "share_realised", "seconds",
)  # fmt: skip


def write_table(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    separator = "," if path.suffix == ".csv" else "\t"
    lines = [separator.join(map(str, row)) for row in [columns, *rows]]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_evaluation(folder, name, dice):
    rows = [(case, "organ", value, value / 2, 3, 1, 2, 0.5) for case, value in dice.items()]
    return write_table(folder / f"{name}.tsv", EVALUATION_COLUMNS, rows)


def series(*values):
    return pd.Series(values, index=[f"case_{number}" for number in range(len(values))])


# ------------------------------------------------------------------------------------- gain


def test_the_paired_interval_of_four_cases():
    """Differences 3, 5, 3, 5 points: mean 4, sd 2/sqrt(3), t(0.975, 3) = 3.18245.

    Half the interval: 3.18245 * 1.1547 / 2 = 1.8374 points.
    """
    gain = paired_gain(series(0.83, 0.75, 0.53, 0.95), series(0.80, 0.70, 0.50, 0.90))
    assert gain == pytest.approx((0.04, 0.021626, 0.058374, 4), abs=1e-6)


def test_cases_are_paired_by_name_not_by_place():
    scores = pd.Series({"a": 0.9, "b": 0.5})
    control = pd.Series({"b": 0.4, "a": 0.8})
    assert paired_gain(scores, control) == pytest.approx((0.1, 0.1, 0.1, 2))


def test_one_case_has_no_finite_interval():
    assert paired_gain(series(0.9), series(0.8)) == pytest.approx((0.1, -math.inf, math.inf, 1))


def test_other_cases_on_the_other_side_are_refused():
    with pytest.raises(InputError, match="same cases on both sides"):
        paired_gain(pd.Series({"a": 0.9}), pd.Series({"b": 0.9}))


@pytest.mark.parametrize(
    ("gain", "sentence"),
    [
        (
            Gain(0.04, 0.0216, 0.0584, 4),
            "Co-training beat labels alone by 4.0 points of Dice "
            "(95 % interval +2.2 to +5.8, paired over 4 test cases).",
        ),
        (
            Gain(-0.02, -0.03, -0.01, 5),
            "Co-training did not beat labels alone: it scored 2.0 points of Dice lower "
            "(95 % interval -3.0 to -1.0, paired over 5 test cases).",
        ),
        (
            Gain(0.02, -0.005, 0.045, 3),
            "Co-training and labels alone cannot be told apart: the difference is +2.0 points of "
            "Dice (95 % interval -0.5 to +4.5, paired over 3 test cases).",
        ),
        (
            Gain(0.1, -math.inf, math.inf, 1),
            "Co-training and labels alone cannot be told apart from one test case "
            "(difference +10.0 points of Dice).",
        ),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(gain, sentence):
    assert verdict(gain, of="Co-training", over="labels alone") == sentence


def test_equal_scores_cannot_be_told_apart():
    gain = paired_gain(series(0.8, 0.9), series(0.8, 0.9))
    assert "cannot be told apart" in verdict(gain, of="A", over="B")
    assert "+0.0 points" in verdict(gain, of="A", over="B")


# ----------------------------------------------------------------------------------- tables


def test_labels_are_averaged_within_a_case_before_cases_are():
    """Case a: labels 0.9 and 0.5, mean 0.7; case b: one label, 0.1. Mean 0.4, sd 0.6/sqrt(2)."""
    rows = [("a", "x", 0.9, 0, 4, 0, 0, 0), ("a", "y", 0.5, 0, 8, 0, 0, 0),
            ("b", "x", 0.1, 0, 1, 0, 0, 0)]  # fmt: skip
    cases = means_per_case(pd.DataFrame(rows, columns=EVALUATION_COLUMNS))
    (row,) = scores_table({Trained("cotrain", "3d", 1): cases}).to_dict("records")
    assert (row["arm"], row["network"], row["round"], row["cases"]) == ("cotrain", "3d", "01", 2)
    assert row["dice_mean"] == pytest.approx(0.4)
    assert row["dice_sd"] == pytest.approx(0.6 / math.sqrt(2))
    assert (row["dice_worst"], row["dice_worst_case"]) == (0.1, "b")
    # For a distance the worst is the largest: the mean of 4 and 8, of case a.
    assert row["hd95_mm_worst"] == 6


def test_only_accepted_masks_with_known_truth_count_as_teachers_truth():
    audit = pd.DataFrame(
        {
            "accepted": ["true", "true", "false"],
            "confidence": [0.9, 0.7, 0.1],
            "truth_dice": [0.8, math.nan, 0.2],
        }
    )
    assert teaching_of(audit) == pytest.approx((3, 2, 0.8, 0.8, 1))


def test_a_round_without_accepted_masks_has_no_means():
    audit = pd.DataFrame({"accepted": ["false"], "confidence": [0.9], "truth_dice": [0.8]})
    assert teaching_of(audit) == (1, 0, None, None, 0)


def test_an_audit_that_is_neither_true_nor_false_is_refused():
    audit = pd.DataFrame({"accepted": ["maybe"], "confidence": [0.9], "truth_dice": [0.8]})
    with pytest.raises(InputError, match="maybe"):
        teaching_of(audit)


def test_the_curve_of_the_last_round_is_the_whole_one(tmp_path):
    first, second = (
        write_table(
            tmp_path / f"cotrain/round-0{round_}/train_2d/curve.csv",
            CURVE_COLUMNS, [(epoch, epoch, 1.0, 0.01, 0, 0, 2) for epoch in range(round_ + 1)],
        )
        for round_ in (0, 1)
    )  # fmt: skip
    curve = read_curves([tmp_path / second, tmp_path / first])[("cotrain", "2d")]
    assert curve["epoch"].tolist() == [0, 1]


def test_a_table_with_another_name_is_refused(tmp_path):
    path = tmp_path / "best_3d.tsv"
    path.write_text("case\n")
    with pytest.raises(InputError, match=r"cotrain_3d_round-02\.tsv"):
        read_evaluations([path])


# ---------------------------------------------------------------------------- whole command


@pytest.fixture
def experiment(tmp_path):
    """Two rounds over three cases; the 3D network beats its control by 3, 5 and 4 points."""
    evaluation = tmp_path / "evaluation"
    control = {"a": 0.80, "b": 0.70, "c": 0.60}
    for name, dice in {
        "cotrain_2d_round-00": {"a": 0.75, "b": 0.65, "c": 0.55},
        "cotrain_3d_round-00": {"a": 0.70, "b": 0.60, "c": 0.50},
        "cotrain_2d_round-01": {"a": 0.78, "b": 0.68, "c": 0.58},
        "cotrain_3d_round-01": {"a": 0.83, "b": 0.75, "c": 0.64},
        "labels_only_2d_round-00": {"a": 0.74, "b": 0.64, "c": 0.54},
        "labels_only_2d_round-01": {"a": 0.77, "b": 0.67, "c": 0.57},
        "labels_only_3d_round-01": control,
        "labels_only_mean_round-01": {"a": 0.85, "b": 0.75, "c": 0.64},
    }.items():
        write_evaluation(evaluation, name, dice)
    curves, audits = [], []
    for number in (0, 1):
        round_folder = tmp_path / f"cotrain/round-0{number}"
        for network in ("2d", "3d"):
            rows = [(epoch, number, 1 / (epoch + 1), 0.01, 0.25, 0.25, 1.5)
                    for epoch in range(3 * number, 3 * number + 3)]  # fmt: skip
            curves.append(
                write_table(round_folder / f"train_{network}/curve.csv", CURVE_COLUMNS, rows)
            )
        audits.append(
            write_table(
                round_folder / "audit/train_3d.tsv",
                AUDIT_COLUMNS,
                [
                    ("u1", "u1.nii.gz", "u1.b2nd", "true", "", 0.9, 20, 0.8),
                    ("u2", "u2.nii.gz", "u2.b2nd", "true", "", 0.8, 20, ""),
                    ("u3", "u3.nii.gz", "u3.b2nd", "false", "empty", 0, 0, 0.0),
                ],
            )
        )
    return tmp_path, curves, audits


def summarise(folder, *, curves=(), audits=(), note=""):
    evaluations = map(str, (folder / "evaluation").glob("*.tsv"))
    return main(
        ["summarise", "--evaluation", *evaluations, "--curves", *curves,
         "--audits", *audits, "--out-dir", str(folder / "summary"), "--note", note]
    )  # fmt: skip


def test_the_summary_has_rounds_finals_gain_teachers_and_note(experiment, capsys):
    folder, curves, audits = experiment
    assert summarise(folder, curves=curves, audits=audits, note="Pool: train_only.") == 0
    text = (folder / "summary/summary.txt").read_text()
    assert capsys.readouterr().out == text
    lines = [re.sub(r"  +", " | ", line) for line in text.splitlines()]
    assert "round | 2D | 3D | labels only 2D | labels only 3D" in lines
    assert "00 | 65.0 | 60.0 | 64.0 | -" in lines
    assert "01 | 68.0 | 74.0 | 67.0 | 70.0" in lines
    assert "co-trained 3D | 74.0 ± 9.5 | 37.0 | 3.00 | 1.00 | 64.0 c" in lines
    assert "labels only mean | 74.7 ± 10.5 | 37.3 | 3.00 | 1.00 | 64.0 c" in lines
    # Of one label the tables above say all.
    assert "of each label" not in text
    # Differences 3, 5, 4: mean 4, sd 1, t(0.975, 2) = 4.30265, half 4.30265 / sqrt(3) = 2.484.
    assert (
        "Co-training beat labels alone by 4.0 points of Dice "
        "(95 % interval +1.5 to +6.5, paired over 3 test cases)." in lines
    )
    assert any(
        line.startswith("Co-training and the mean of the two label-only networks cannot be")
        for line in lines
    )
    assert any(line.startswith("3D of round 01 beat 3D of round 00 by 14.0") for line in lines)
    assert (
        "Worst case of the co-trained 3D network: Dice 64.0 % (c); "
        "of its control: Dice 60.0 % (c)." in lines
    )
    assert "00 | 3D | 3 | 2 | 85.0 | 80.0 (of 1)" in lines
    assert lines[-1] == "Pool: train_only."

    scores = read_table(folder / "summary/scores.tsv")
    assert len(scores) == 8
    final = scores[(scores["arm"] == "cotrain") & (scores["round"] == "01")].set_index("network")
    assert float(final.loc["3d", "dice_mean"]) == pytest.approx(0.74)
    for picture in ("dice_per_round.png", "training_curves.png"):
        assert (folder / "summary" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_mean_of_both_co_trained_networks_is_held_against_that_of_the_control(experiment):
    folder, _, _ = experiment
    summary = folder / "summary/summary.txt"
    assert summarise(folder) == 0
    assert "The mean of the two co-trained" not in summary.read_text()
    # Over the control's 85, 75 and 64: 2, 4 and 3 points, half the interval is 2.484.
    write_evaluation(
        folder / "evaluation", "cotrain_mean_round-01", {"a": 0.87, "b": 0.79, "c": 0.67}
    )
    assert summarise(folder) == 0
    assert (
        "The mean of the two co-trained networks beat the mean of the two label-only networks by "
        "3.0 points of Dice (95 % interval +0.5 to +5.5, paired over 3 test cases).\n"
    ) in summary.read_text()


def test_of_several_labels_each_ones_dice_is_told(tmp_path):
    for arm, tumour in (("cotrain", (0.0, 0.1)), ("labels_only", (0.5, 0.7))):
        rows = [(case, "organ", 0.9, 0.8, 3, 1, 2, 0.5) for case in "ab"]
        rows += [
            (case, "tumour", dice, dice / 2, 3, 1, 2, 0.5)
            for case, dice in zip("ab", tumour, strict=True)
        ]
        name = f"evaluation/{arm}_3d_round-00.tsv"
        write_table(tmp_path / name, EVALUATION_COLUMNS, rows)
    assert summarise(tmp_path) == 0
    lines = (tmp_path / "summary/summary.txt").read_text().splitlines()
    first = lines.index("Dice in % of each label, round 00")
    assert [re.sub(r"  +", " | ", line) for line in lines[first + 2 : first + 5]] == [
        "network | organ | tumour",
        "co-trained 3D | 90.0 | 5.0",
        "labels only 3D | 90.0 | 60.0",
    ]


def test_without_a_control_the_gain_is_said_to_be_unknown(tmp_path, capsys):
    write_evaluation(tmp_path / "evaluation", "cotrain_3d_round-00", {"a": 0.7, "b": 0.8})
    assert summarise(tmp_path) == 0
    assert (
        "Co-training against labels alone: not known, the labels only 3D of round 00 was not "
        "evaluated." in capsys.readouterr().out
    )


def test_without_labels_the_summary_says_that_nothing_could_be_scored(tmp_path, capsys):
    write_evaluation(tmp_path / "evaluation", "cotrain_3d_round-00", {})
    assert summarise(tmp_path) == 0
    assert "Nothing could be scored: there is no test case with a label." in capsys.readouterr().out
    (row,) = read_table(tmp_path / "summary/scores.tsv").to_dict("records")
    assert (row["cases"], row["dice_mean"], row["dice_worst_case"]) == ("0", "", "")
    assert (tmp_path / "summary/dice_per_round.png").is_file()


def test_without_any_evaluation_the_summary_has_headings_and_says_so(tmp_path, capsys):
    assert main(["summarise", "--out-dir", str(tmp_path)]) == 0
    assert "Nothing could be scored" in capsys.readouterr().out
    scores = read_table(tmp_path / "scores.tsv")
    assert scores.empty and "dice_mean" in scores


def test_an_audit_whose_path_does_not_say_its_round_is_refused(experiment, capsys):
    folder, _, audits = experiment
    moved = folder / "train_3d.tsv"
    moved.write_text("case\n")
    assert summarise(folder, audits=[*audits, str(moved)]) == 2
    assert "<arm>/round-<RR>/audit/train_<network>.tsv" in capsys.readouterr().err
