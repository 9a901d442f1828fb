"""The command `evaluate` on tiny NIfTI files of 1 x 2 x 4 mm, turned and flipped."""

import nibabel
import numpy as np
import pandas as pd
import pytest

from cotrain.__main__ import main
from cotrain.evaluate import COLUMNS
from cotrain.files import read_table

SHAPE = (5, 6, 4)
# A turn by 90 degrees about z, a flipped z, and edges of 1 x 2 x 4 mm along the array's axes.
AFFINE = np.array([[0, -2.0, 0, 30], [1.0, 0, 0, -20], [0, 0, -4.0, 7], [0, 0, 0, 1]])


def write(path, *voxels, affine=AFFINE, shape=SHAPE):
    array = np.zeros(shape, np.uint8)
    for *voxel, value in voxels:
        array[tuple(voxel)] = value
    path.parent.mkdir(exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)
    return str(path)


def write_cases(folder, labels):
    rows = [{"case": case, "image": "unused.nii.gz", "label": label} for case, label in labels]
    pd.DataFrame(rows, columns=["case", "image", "label"]).to_csv(
        folder / "test.tsv", sep="\t", index=False
    )


def evaluate(folder):
    return main(
        ["evaluate", "--masks", str(folder / "masks"), "--cases", str(folder / "test.tsv"),
         "--labels", "front=1", "back=2", "--out", str(folder / "out.tsv")]
    )  # fmt: skip


@pytest.fixture
def two_cases(tmp_path):
    """Case b is perfect; case a misses `front` by one voxel along each of its labels' y axis."""
    write_cases(
        tmp_path,
        [
            ("b", write(tmp_path / "labels/b.nii.gz", (1, 1, 1, 1), (3, 3, 3, 2))),
            ("a", write(tmp_path / "labels/a.nii.gz", (1, 1, 1, 1), (3, 3, 3, 2))),
            ("unlabelled", ""),
        ],
    )
    write(tmp_path / "masks/b.nii.gz", (1, 1, 1, 1), (3, 3, 3, 2))
    write(tmp_path / "masks/a.nii.gz", (1, 2, 1, 1), (3, 3, 3, 2))
    return tmp_path


def test_the_table_has_a_sorted_row_per_labelled_case_and_label(two_cases, capsys):
    assert evaluate(two_cases) == 0
    table = read_table(two_cases / "out.tsv")
    assert tuple(table) == COLUMNS
    assert list(zip(table["case"], table["label"], strict=True)) == [
        ("a", "back"), ("a", "front"), ("b", "back"), ("b", "front"),
    ]  # fmt: skip
    assert table["dice"].astype(float).tolist() == [1, 0, 1, 1]
    assert table["hd95_mm"].astype(float).tolist() == [0, 2, 0, 0]
    assert table["hd95_voxel"].astype(float).tolist() == [0, 1, 0, 0]
    assert capsys.readouterr().out == "mean Dice over 2 cases: front 50.0 %, back 100.0 %\n"


def test_without_labels_nothing_is_scored_and_said(tmp_path, capsys):
    write_cases(tmp_path, [("a", ""), ("b", "")])
    assert evaluate(tmp_path) == 0
    table = read_table(tmp_path / "out.tsv")
    assert table.empty and tuple(table) == COLUMNS
    assert "nothing was scored" in capsys.readouterr().out


def test_a_missing_mask_is_named(two_cases, capsys):
    (two_cases / "masks/a.nii.gz").unlink()
    assert evaluate(two_cases) == 2
    assert f"mask {two_cases / 'masks/a.nii.gz'} is missing" in capsys.readouterr().err
    assert not (two_cases / "out.tsv").exists()


def test_a_mask_of_another_shape_is_named(two_cases, capsys):
    write(two_cases / "masks/a.nii.gz", shape=(5, 6, 3))
    assert evaluate(two_cases) == 2
    assert str(two_cases / "masks/a.nii.gz") in capsys.readouterr().err


def test_a_mask_with_another_affine_is_named(two_cases, capsys):
    """The authors' code writes masks with `affine=eye(4)`: that must not pass."""
    write(two_cases / "masks/a.nii.gz", affine=np.eye(4))
    assert evaluate(two_cases) == 2
    error = capsys.readouterr().err
    assert str(two_cases / "masks/a.nii.gz") in error and "affine" in error


def test_a_value_that_no_label_has_is_named_with_its_file(two_cases, capsys):
    write(two_cases / "masks/a.nii.gz", (0, 0, 0, 7))
    assert evaluate(two_cases) == 2
    error = capsys.readouterr().err
    assert str(two_cases / "masks/a.nii.gz") in error and "value 7" in error
