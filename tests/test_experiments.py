"""Experiments as a table of changes, and what is said of them side by side."""

import math

import pandas as pd
import pytest

from cotrain.__main__ import main
from cotrain.compare import table_of, text_of
from cotrain.errors import InputError
from cotrain.experiments import experiments_of

BASE = {
    "experiment": "sets",
    "cases": "cases.tsv",
    "labels": {"a": 1},
    "seed": 3,
    "cotraining": {"teacher": "other"},
}


def table(folder, text):
    path = folder / "experiments.tsv"
    path.write_text(text.replace(" ", "\t"))
    return {**BASE, "experiments": str(path)}


def test_without_a_table_a_file_is_one_experiment():
    experiments, groups = experiments_of(BASE, source="x")
    assert list(experiments) == ["sets"]
    assert groups == {}


def test_a_name_may_look_like_a_number(tmp_path):
    experiments, _ = experiments_of(table(tmp_path, "experiment\n2024_01\n'007'\non\n"), source="x")
    assert list(experiments) == ["2024_01", "007", "on"]


def test_a_review_of_all_experiments_is_refused_and_one_of_each_is_not(tmp_path):
    content = table(tmp_path, "experiment review\none one.tsv\ntwo \n")
    experiments, _ = experiments_of(content, source="x")
    assert [str(each.review) for each in experiments.values()] == ["one.tsv", "None"]
    with pytest.raises(InputError, match=r"x: `review` beside `experiments` would judge .* column"):
        experiments_of({**content, "review": "shared.tsv"}, source="x")


def test_a_row_changes_what_its_cells_say_and_nothing_else(tmp_path):
    content = table(
        tmp_path,
        "experiment seed group cotraining.teacher network_3d.features_per_stage\n"
        "one 1 few mean [8,16]\n"
        "two  few  \n"
        "three 3   \n",
    )
    experiments, groups = experiments_of(content, source="x")
    assert groups == {"one": "few", "two": "few", "three": "all"}
    one, two = experiments["one"], experiments["two"]
    assert (one.seed, one.cotraining.teacher) == (1, "mean")
    assert one.network_3d.features_per_stage == (8, 16)
    assert (two.seed, two.cotraining.teacher) == (3, "other")
    assert two.network_3d.features_per_stage is None
    assert one.labels == {"a": 1}
    # The file is not changed by a row.
    assert BASE["cotraining"] == {"teacher": "other"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name seed\none 1\n", "no column `experiment`"),
        ("experiment seed\n", "has no rows"),
        ("experiment seed\none 1\none 2\n", "'one' twice"),
        ("experiment seed\nsets 1\n", "name of the whole comparison"),
        (
            "experiment sede\none 1\n",
            r"experiment one: unknown setting `sede`; did you mean `seed`",
        ),
        ("experiment cotraining.teacher\none [\n", "not YAML"),
        ("experiment seed\none many\n", "experiment one: `seed` is 'many'"),
        ("experiment seed\n 1\n", "row without a name"),
        ("", "not a table that can be read"),
        ("experiment seed\none 1\ntwo 2 3\n", "row 2: it has 3 cells, wanted 2 as in the heading"),
        ("experiment seed\none 1 \ntwo 2 \n", "more cells than the 2 headings"),
    ],
)
def test_a_mistake_in_the_table_is_told_with_its_place(tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        experiments_of(table(tmp_path, text), source="x")


# ------------------------------------------------------------------------------ comparison


def evaluate(folder, arm, network, round_, dice):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"case": f"c{number}", "label": "a", "dice": value, "jaccard": 0.5}
        | dict.fromkeys(("hd95_mm", "asd_mm", "hd95_voxel", "asd_voxel"), 1.0)
        for number, value in enumerate(dice)
    ]
    path = folder / f"{arm}_{network}_round-{round_:02d}.tsv"
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)


@pytest.fixture
def three(tmp_path):
    """Return evaluations of experiments that gain 4, 6 and 8 points in the last round."""
    for name, gain in (("one", 0.04), ("two", 0.06), ("three", 0.08)):
        folder = tmp_path / name / "evaluation"
        for round_ in (0, 1):
            evaluate(folder, "labels_only", "3d", round_, [0.70, 0.80])
            evaluate(folder, "cotrain", "3d", round_, [0.70 + gain * round_, 0.80 + gain * round_])
    return {
        name: sorted((tmp_path / name / "evaluation").iterdir()) for name in ("one", "two", "three")
    }


def test_the_comparison_by_hand(three):
    made = table_of(three, dict.fromkeys(three, "few"))
    assert made["cotrain_3d"].tolist() == pytest.approx([0.79, 0.81, 0.83])
    assert made["worst_cotrain_3d"].tolist() == pytest.approx([0.74, 0.76, 0.78])
    text = text_of(made)
    assert "81.0 ± 2.0" in text
    assert "75.0 ± 0.0" in text
    # Differences 4, 6, 8: sd 2, t(0.975, 2) = 4.303, so 6 +/- 4.303 * 2 / sqrt(3).
    half = 4.303 * 2 / math.sqrt(3)
    assert f"{6 - half:+.1f} to {6 + half:+.1f}" in text
    assert "few: co-trained 3D - labels only 3D = +6.0 points" in text
    assert text.rstrip().endswith("a gain.")


def test_a_difference_that_rounds_to_nothing_has_no_sign_of_a_loss(tmp_path):
    evaluate(tmp_path / "evaluation", "labels_only", "3d", 0, [0.70])
    evaluate(tmp_path / "evaluation", "cotrain", "3d", 0, [0.6999])
    named = {"one": sorted((tmp_path / "evaluation").iterdir())}
    assert "= +0.0 points" in text_of(table_of(named, {"one": "all"}))


def test_one_experiment_of_a_group_has_no_interval(three):
    text = text_of(table_of(three, {"one": "a", "two": "b", "three": "b"}))
    assert "a: co-trained 3D - labels only 3D = +4.0 points, from one experiment." in text


def test_the_command_writes_text_table_and_picture(three, tmp_path, capsys):
    words = ["compare", "--experiments", *(f"rate: 0.1, few:{name}" for name in three)]
    words += ["--evaluation", *(str(table) for tables in three.values() for table in tables)]
    assert main([*words, "--out-dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (tmp_path / "out/comparison.txt").read_text()
    assert (tmp_path / "out/comparison.png").stat().st_size > 1000
    assert len(pd.read_csv(tmp_path / "out/comparison.tsv", sep="\t")) == 3
