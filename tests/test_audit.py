"""The audit: what may be learnt, what a person says about it, and what is refused."""

import shutil
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pandas as pd
import pytest
from medpy.metric.binary import dc

from cotrain.__main__ import main
from cotrain.audit import audit_row, learnt_from, true_dice, verdict_on
from cotrain.files import read_table, sha256_of
from cotrain.training import accepted_cases

REVIEW = ["case", "round", "masks", "verdict", "mask", "by", "date"]


@pytest.fixture
def masks(pseudo_masks, tmp_path) -> Path:
    """Return a copy of the mask set, to be spoilt."""
    return shutil.copytree(pseudo_masks, tmp_path / "round-00" / "pseudo_2d")


@pytest.fixture
def audit(masks, audit_words, tmp_path, capsys):
    """Return a function that audits the masks under verdicts, by case; or gives the error."""

    def run(*verdicts: tuple, more: tuple = ()) -> pd.DataFrame | str:
        if verdicts:
            pd.DataFrame(verdicts, columns=REVIEW).to_csv(
                tmp_path / "review.tsv", sep="\t", index=False
            )
            more = (*more, "--review", tmp_path / "review.tsv")
        words = audit_words(masks, tmp_path / "audit" / "train_3d.tsv", *more)
        if main(words) == 2:
            return capsys.readouterr().err
        return read_table(tmp_path / "audit" / "train_3d.tsv").set_index("case")

    return run


def verdict(case, verdict, mask="", masks="pseudo_2d", round_="0"):
    return (case, round_, masks, verdict, mask, "a reader", "2025-01-01")


def altered(path: str, change, out: Path) -> str:
    """Write a label file with changed voxels, as a person's editor would."""
    label = nibabel.load(path)
    array = np.asarray(label.dataobj).copy()
    change(array)
    nibabel.save(nibabel.Nifti1Image(array, label.affine), out)
    return str(out)


def test_every_mask_is_accepted_unless_something_speaks_against_it(audit, masks):
    table = audit()
    assert list(table.index) == ["coarse_u", "flipped_u", "oblique_u", "straight_u"]
    assert (table["accepted"] == "true").all()
    assert table.loc["flipped_u", "soft_sha256"] == sha256_of(masks / "flipped_u.b2nd")


def test_the_true_quality_of_a_mask_is_in_the_table_where_truth_is_known(audit, masks, tiny):
    table = audit()
    for row in tiny.rows("unlabelled"):
        mask, truth = (
            np.asarray(nibabel.load(path).dataobj)
            for path in (masks / f"{row['case']}.nii.gz", row["label"])
        )
        by_hand = np.mean([dc(mask == value, truth == value) for value in (1, 2)])
        assert 0.8 < by_hand < 1
        assert float(table.loc[row["case"], "truth_dice"]) == pytest.approx(by_hand, abs=1e-4)


def test_true_dice_by_hand():
    mask, truth = np.array([1, 1, 1, 0, 2]), np.array([1, 0, 1, 1, 0])
    # Label 1: 2 x 2 / (3 + 3); label 2: missed; label 3 is absent from both.
    assert true_dice(mask, truth, {"a": 1}) == pytest.approx(2 / 3)
    assert true_dice(mask, truth, {"a": 1, "b": 2}) == pytest.approx(1 / 3)
    assert true_dice(mask, truth, {"a": 1, "b": 2, "c": 3}) == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_a_mask_edited_in_place_is_refused_with_the_way_to_register_it(audit, masks):
    path = masks / "oblique_u.nii.gz"
    altered(str(path), lambda array: array.fill(1), path)
    message = audit()
    assert "oblique_u.nii.gz is missing or was edited in place" in message
    assert "review.tsv with the verdict replace" in message


def test_a_missing_mask_is_refused(audit, masks):
    (masks / "oblique_u.nii.gz").unlink()
    assert "oblique_u.nii.gz is missing" in audit()


def test_an_excluded_mask_is_not_learnt(audit, tiny, tmp_path):
    table = audit(verdict("flipped_u", "exclude"))
    assert table.loc["flipped_u", "accepted"] == "false"
    assert table.loc["flipped_u", "reason"] == "exclude by a reader 2025-01-01"
    learnt = accepted_cases(tmp_path / "audit" / "train_3d.tsv", tiny.preprocessed)
    assert [case.name for case in learnt] == ["coarse_u", "oblique_u", "straight_u"]


def test_only_what_is_learnt_is_another_training(audit, tiny, tmp_path):
    table = tmp_path / "audit" / "train_3d.tsv"
    audit(verdict("flipped_u", "exclude"))
    one_excluded = learnt_from(table)
    others = [verdict(case, "accept") for case in ("coarse_u", "oblique_u", "straight_u")]
    reasons = audit(("flipped_u", "0", "pseudo_2d", "exclude", "", "another", "")).loc[:, "reason"]
    assert reasons["flipped_u"] == "exclude by another"
    assert learnt_from(table) == one_excluded
    audit(verdict("flipped_u", "exclude"), *others)
    assert learnt_from(table) == one_excluded
    audit()
    all_four = learnt_from(table)
    assert all_four != one_excluded
    audit(verdict("flipped_u", "replace", tiny.rows("unlabelled")[1]["label"]))
    assert learnt_from(table) not in (all_four, one_excluded)


def test_a_verdict_that_outlived_its_mask_is_followed_but_told(audit, masks, capsys):
    audit()
    # As when an earlier round is trained again: the verdict was written before, with the page.
    again = masks / "flipped_u.nii.gz"
    altered(str(again), lambda array: array.put(0, 1), masks / "new.nii.gz")
    (masks / "new.nii.gz").replace(again)
    manifest = read_table(masks / "manifest-0.tsv").set_index("case")
    manifest.loc["flipped_u", "mask_sha256"] = sha256_of(again)
    manifest.to_csv(masks / "manifest-0.tsv", sep="\t")
    both = [verdict("flipped_u", "exclude"), verdict("coarse_u", "exclude")]
    told = "exclude by a reader 2025-01-01; given on an earlier mask of this case, look again"
    for _ in range(2):
        table = audit(*both)
        assert table.loc["flipped_u", ["accepted", "reason"]].tolist() == ["false", told]
        assert table.loc["coarse_u", "reason"] == "exclude by a reader 2025-01-01"
        assert f"flipped_u: {told}." in capsys.readouterr().out
    looked_again = (*verdict("flipped_u", "exclude")[:-1], "2025-01-02")
    table = audit(looked_again)
    assert table.loc["flipped_u", "reason"] == "exclude by a reader 2025-01-02"


def test_an_empty_mask_does_not_teach_by_a_verdict_on_the_one_before(audit, masks):
    audit()
    manifest = read_table(masks / "manifest-0.tsv").set_index("case")
    again = masks / "flipped_u.nii.gz"
    altered(str(again), lambda array: array.fill(0), masks / "new.nii.gz")
    (masks / "new.nii.gz").replace(again)
    manifest.loc["flipped_u", ["mask_sha256", "volume_ml"]] = [sha256_of(again), "0"]
    manifest.to_csv(masks / "manifest-0.tsv", sep="\t")
    table = audit(verdict("flipped_u", "accept"))
    assert table.loc["flipped_u", ["accepted", "reason"]].tolist() == [
        "false",
        "the mask is empty (accept by a reader 2025-01-01; given on an earlier mask of this case, "
        "look again)",
    ]
    looked_again = (*verdict("flipped_u", "accept")[:-1], "2025-01-02")
    assert audit(looked_again).loc["flipped_u", "accepted"] == "true"


def test_the_last_verdict_on_a_mask_counts_and_other_rounds_and_masks_do_not(audit):
    table = audit(verdict("flipped_u", "exclude"), verdict("flipped_u", "accept"))
    assert table.loc["flipped_u", "accepted"] == "true"
    for other in ({"round_": "1"}, {"masks": "pseudo_3d"}):
        table = audit(verdict("flipped_u", "exclude", **other))
        assert table.loc["flipped_u", "accepted"] == "true"
    for same_round in ("00", "0"):
        table = audit(verdict("flipped_u", "exclude", round_=same_round))
        assert table.loc["flipped_u", "accepted"] == "false"


def test_of_the_sources_of_a_mean_exclude_wins_then_replace():
    def review(*verdicts):
        return pd.DataFrame(
            [
                verdict("a", word, masks=masks, round_=number, mask=f"{word}.nii.gz")
                for number, masks, word in verdicts
            ],
            columns=REVIEW,
        )

    sources = ["round-01/pseudo_2d", "round-00/pseudo_3d", "round-01/teacher_3d"]
    both = review(("1", "pseudo_2d", "accept"), ("0", "pseudo_3d", "exclude"))
    assert verdict_on("a", sources, both)["verdict"] == "exclude"
    replaced = review(("1", "pseudo_2d", "replace"), ("0", "pseudo_3d", "accept"))
    assert verdict_on("a", sources, replaced)["mask"] == "replace.nii.gz"
    # A mean that was looked at itself decides, unless it was but accepted.
    for own, of_source, decides in (
        ("exclude", "replace", "exclude"),
        ("replace", "exclude", "replace"),
        ("accept", "exclude", "exclude"),
    ):
        both_kinds = review(("1", "teacher_3d", own), ("0", "pseudo_3d", of_source))
        assert verdict_on("a", sources, both_kinds)["verdict"] == decides
    two = review(("1", "pseudo_2d", "replace"), ("1", "teacher_3d", "replace"))
    two.loc[1, "mask"] = "of_the_mean.nii.gz"
    assert verdict_on("a", sources, two)["mask"] == "of_the_mean.nii.gz"
    assert verdict_on("a", sources, review(("0", "pseudo_2d", "exclude"))) is None
    assert verdict_on("b", sources, both) is None


def test_a_replacement_is_learnt_in_the_masks_place(audit, tiny, masks, tmp_path):
    row = tiny.rows("unlabelled")[2]
    corrected = altered(row["label"], lambda a: a.put(range(900), 0), tmp_path / "corrected.nii.gz")
    table = audit(verdict("oblique_u", "replace", corrected))
    audited = table.loc["oblique_u"]
    assert audited["accepted"] == "true"
    assert audited["mask"] == corrected
    assert audited["confidence"] == "1.0000"
    image = nibabel.load(corrected)
    voxels = np.count_nonzero(np.asarray(image.dataobj))
    volume_ml = voxels * abs(np.linalg.det(image.affine)) / 1000
    assert float(audited["volume_ml"]) == pytest.approx(volume_ml, abs=1e-3)
    assert audited["soft"] != str(masks / "oblique_u.b2nd")
    # On the preprocessed grid: certain, and what nnU-Net makes of a true label there.
    soft = blosc2.open(audited["soft"])[:]
    truth = blosc2.open(str(tiny.truth / "unlabelled" / "oblique_u") + "_seg.b2nd")[0]
    assert set(np.unique(soft)) == {0, 255}
    for channel, value in enumerate((1, 2)):
        assert dc(soft[channel] == 255, truth == value) > 0.9
    learnt = accepted_cases(tmp_path / "audit" / "train_3d.tsv", tiny.preprocessed)
    assert audited["soft"] in [case.soft for case in learnt]


def test_a_replacement_on_the_same_voxels_equals_the_preprocessed_label(audit, tiny):
    table = audit(verdict("flipped_u", "replace", tiny.rows("unlabelled")[1]["label"]))
    soft = blosc2.open(table.loc["flipped_u", "soft"])[:]
    truth = blosc2.open(str(tiny.truth / "unlabelled" / "flipped_u") + "_seg.b2nd")[0]
    assert np.array_equal(soft == 255, np.stack([truth == 1, truth == 2]))
    assert table.loc["flipped_u", "truth_dice"] == "1.0000"


def test_an_empty_replacement_is_learnt_and_told(audit, tiny, tmp_path):
    label = tiny.rows("unlabelled")[1]["label"]
    empty = altered(label, lambda a: a.fill(0), tmp_path / "empty.nii.gz")
    audited = audit(verdict("flipped_u", "replace", empty)).loc["flipped_u"]
    assert audited["accepted"] == "true"
    assert "the corrected mask is empty, and teaches" in audited["reason"]


def test_a_replacement_on_another_grid_is_refused(audit, tiny):
    message = audit(verdict("flipped_u", "replace", tiny.rows("unlabelled")[0]["label"]))
    assert "has its voxels up to" in message


def test_a_replacement_with_an_unknown_label_is_refused(audit, tiny, tmp_path):
    label = tiny.rows("unlabelled")[1]["label"]
    corrected = altered(label, lambda a: a.put(0, 7), tmp_path / "corrected.nii.gz")
    message = audit(verdict("flipped_u", "replace", corrected))
    assert "holds the values [7], wanted 0 for the background and [1, 2]" in message


def test_an_empty_mask_is_not_learnt_unless_a_person_accepts_it(audit, masks):
    manifest = read_table(masks / "manifest-0.tsv")
    manifest.loc[manifest["case"] == "coarse_u", "volume_ml"] = "0.0000"
    manifest.to_csv(masks / "manifest-0.tsv", sep="\t", index=False)
    refused = audit().loc["coarse_u"]
    assert (refused["accepted"], refused["reason"]) == ("false", "the mask is empty")
    assert audit(verdict("coarse_u", "accept")).loc["coarse_u", "accepted"] == "true"


def test_a_label_that_no_mask_holds_is_told(audit, masks, tiny, capsys, tmp_path):
    audit()
    assert "WARNING" not in capsys.readouterr().out
    manifest = read_table(masks / "manifest-0.tsv")
    assert (manifest["absent"] == "").all()
    manifest["absent"] = "core"
    manifest.to_csv(masks / "manifest-0.tsv", sep="\t", index=False)
    assert (audit()["absent"] == "core").all()
    assert "WARNING: the label core is in none of the masks that teach" in capsys.readouterr().out
    # Of older code, without that column.
    manifest.drop(columns="absent").to_csv(masks / "manifest-0.tsv", sep="\t", index=False)
    assert (audit()["absent"] == "").all()
    manifest.to_csv(masks / "manifest-0.tsv", sep="\t", index=False)
    # A corrected mask that has it.
    audit(verdict("flipped_u", "replace", tiny.rows("unlabelled")[1]["label"]))
    assert "WARNING" not in capsys.readouterr().out
    # One that has lost the other label, too: the one that all have lost is told.
    row = tiny.rows("unlabelled")[1]["label"]
    empty = altered(row, lambda a: np.copyto(a, 0), tmp_path / "none.nii.gz")
    table = audit(verdict("flipped_u", "replace", empty))
    assert table.loc["flipped_u", "absent"] == "shell;core"
    said = capsys.readouterr().out
    assert "the label core is in none" in said and "the label shell" not in said


def test_whoever_accepts_a_source_has_not_accepted_an_empty_mean(masks, tiny, tmp_path):
    mean = shutil.copytree(masks, tmp_path / "round-01" / "teacher_3d")
    made = read_table(mean / "manifest-0.tsv").set_index("case", drop=False).loc["coarse_u"]
    made = {**made, "volume_ml": "0"}
    row = next(each for each in tiny.rows("unlabelled") if each["case"] == "coarse_u")

    def accepted(of: str) -> tuple[str, str]:
        judged = dict(zip(REVIEW, verdict("coarse_u", "accept", masks=of, round_="1"), strict=True))
        audited = audit_row(made, row, judged, mean, tiny.settings.labels)
        return audited["accepted"], audited["reason"]

    judged = "accept by a reader 2025-01-01"
    assert accepted("pseudo_2d") == ("false", f"the mask is empty ({judged}: one of its sources)")
    assert accepted("teacher_3d") == ("true", judged)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            verdict("flipped_u", "delete"),
            "the column `verdict` has 'delete', wanted one of accept, ex",
        ),
        (
            verdict("flipped_u", "exclude", masks="pseudo2d"),
            "has 'pseudo2d', wanted one of pseudo_2d",
        ),
        (verdict("fliped_u", "exclude"), "judges the case 'fliped_u', which is not among"),
        (verdict("flipped_u", "replace", "none.nii.gz"), "'none.nii.gz' does not exist"),
        (verdict("flipped_u", "replace"), "'' does not exist"),
    ],
)
def test_a_review_that_cannot_be_followed_is_refused(audit, row, sentence):
    assert sentence in audit(row)


def test_a_review_without_a_column_is_refused(audit, tmp_path):
    (tmp_path / "short.tsv").write_text("case\tround\tverdict\n")
    message = audit(more=("--review", tmp_path / "short.tsv"))
    assert "lacks the columns masks; wanted case, round" in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "review.tsv is not a table that can be read (No columns"),
        ("{head}\n{row}\n{row}\t\n", "row 2: it has 8 cells, wanted 7 as in the heading"),
        ("{head}\n{row}\t\n{row}\t\n", "the rows have more cells than the 7 headings"),
    ],
)
def test_what_an_editor_makes_of_a_review_is_refused(audit, tmp_path, text, sentence):
    row = "\t".join(verdict("flipped_u", "exclude"))
    (tmp_path / "review.tsv").write_text(text.format(head="\t".join(REVIEW), row=row))
    assert sentence in audit(more=("--review", tmp_path / "review.tsv"))


def test_a_soft_mask_that_changed_after_the_audit_is_not_learnt(audit, masks, tiny, tmp_path):
    audit()
    (masks / "coarse_u.b2nd").write_bytes((masks / "flipped_u.b2nd").read_bytes())
    with pytest.raises(ValueError, match="not the file that was audited"):
        accepted_cases(tmp_path / "audit" / "train_3d.tsv", tiny.preprocessed)
