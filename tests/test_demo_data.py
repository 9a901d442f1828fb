"""The demo's subjects: sound, the same from the same seed, and not solved by a threshold."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK
from nibabel.processing import resample_from_to

from cotrain.__main__ import main
from cotrain.demo_data import LABELS, Template, load_template, make_subject
from cotrain.files import read_table, sha256_of

NUMBERS = ["--labelled", "2", "--unlabelled", "3", "--test", "1"]


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("demo") / "brains"
    assert main(["make-demo-data", "--folder", str(made), *NUMBERS]) == 0
    return made


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return read_table(folder / "cases.tsv")


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def images_and_labels(
    folder: Path, table: pd.DataFrame
) -> list[tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]]:
    columns = zip(table["image"], table["label"], strict=True)
    return [
        (nibabel.load(folder / image), nibabel.load(folder / label)) for image, label in columns
    ]


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * np.count_nonzero(first & second) / (first.sum() + second.sum())


def best_dice_of_an_intensity_band(image: np.ndarray, truth: np.ndarray) -> float:
    """Return the highest Dice that any band between two of 41 intensity quantiles reaches."""
    edges = np.unique(np.quantile(image, np.linspace(0, 1, 41)))
    band = np.clip(np.searchsorted(edges, image, side="right") - 1, 0, len(edges) - 2).ravel()
    bins = len(edges) - 1
    voxels = np.concatenate([[0], np.bincount(band, minlength=bins).cumsum()])
    hits = np.concatenate([[0], np.bincount(band, weights=truth.ravel(), minlength=bins).cumsum()])
    return max(
        2 * (hits[high] - hits[low]) / (voxels[high] - voxels[low] + truth.sum())
        for low, high in combinations(range(bins + 1), 2)
    )


def test_same_seed_gives_the_same_bytes_in_another_process_with_more_threads(
    folder: Path, tmp_path: Path
) -> None:
    threads = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "4")
    again = tmp_path / "again"
    subprocess.run(
        [sys.executable, "-m", "cotrain", "make-demo-data", "--folder", again, *NUMBERS],
        check=True,
        env={**os.environ, **threads},
    )
    assert hashes(again) == hashes(folder)


def test_files_carry_no_time_of_making(folder: Path, table: pd.DataFrame) -> None:
    for image in table["image"]:
        head = (folder / image).read_bytes()[:8]
        assert head[3] == 0, "the gzip header names a file"
        assert head[4:8] == bytes(4), "the gzip header holds a time"


def test_another_seed_gives_other_subjects(template: Template) -> None:
    first, second = (make_subject(template, seed=seed, index=0) for seed in (0, 1))
    assert first.image.tobytes() != second.image.tobytes()
    assert first.label.tobytes() != second.label.tobytes()


def test_a_subject_does_not_depend_on_how_many_are_made(
    template: Template, folder: Path, table: pd.DataFrame
) -> None:
    image = nibabel.load(folder / table["image"].iloc[-1])
    alone = make_subject(template, seed=0, index=len(table) - 1)
    assert np.array_equal(alone.image, np.asanyarray(image.dataobj))


def test_splits_are_disjoint_and_of_the_sizes_asked_for(table: pd.DataFrame) -> None:
    assert list(table.columns) == ["case", "image", "label", "split"]
    assert table["split"].value_counts().to_dict() == {"labelled": 2, "unlabelled": 3, "test": 1}
    for column in ("case", "image", "label"):
        assert table[column].is_unique


def test_every_case_has_its_files_and_its_entry(folder: Path, table: pd.DataFrame) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {str(value): name for name, value in LABELS.items()}
    assert description["numTraining"] == len(table)
    listed = [(entry["image"], entry["label"]) for entry in description["training"]]
    assert listed == list(zip(table["image"], table["label"], strict=True))
    on_disk = {str(path.relative_to(folder)) for path in folder.glob("*Tr/*")}
    assert on_disk == {*table["image"], *table["label"]}


def test_image_and_label_share_grid_and_affine(folder: Path, table: pd.DataFrame) -> None:
    for image, label in images_and_labels(folder, table):
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8


def test_every_subject_has_every_label(folder: Path, table: pd.DataFrame) -> None:
    for _, label in images_and_labels(folder, table):
        array = np.asanyarray(label.dataobj)
        assert np.bincount(array.ravel(), minlength=3)[1:].min() > 500
        assert array.max() == 2


def test_sizes_spacings_and_axes_vary(template: Template) -> None:
    subjects = [make_subject(template, seed=0, index=index) for index in range(12)]
    steps = [subject.affine[:3, :3] for subject in subjects]
    spacings = {tuple(np.linalg.norm(step, axis=0).round(6)) for step in steps}
    assert spacings == {(2.0, 2.0, 2.5), (2.0, 2.0, 3.0)}
    assert len({subject.image.shape for subject in subjects}) > 6
    assert {np.linalg.det(step) < 0 for step in steps} == {True, False}
    oblique = {bool(np.count_nonzero(np.abs(step) > 1e-9) > 3) for step in steps}
    assert oblique == {True, False}


def test_itk_reads_every_affine(folder: Path, table: pd.DataFrame) -> None:
    # nnU-Net reads through ITK, which refuses axes that are not at right angles.
    for path, (image, _) in zip(table["image"], images_and_labels(folder, table), strict=True):
        read = SimpleITK.ReadImage(str(folder / path))
        assert read.GetSize() == image.shape
        assert read.GetSpacing() == pytest.approx(np.linalg.norm(image.affine[:3, :3], axis=0))
        corner = np.array([-1, -1, 1]) * read.TransformIndexToPhysicalPoint((1, 2, 3))
        assert corner == pytest.approx(image.affine[:3] @ [1, 2, 3, 1], abs=1e-3)


def test_subjects_differ_in_shape(folder: Path, table: pd.DataFrame) -> None:
    labels = [label for _, label in images_and_labels(folder, table)]
    for first, second in combinations(labels, 2):
        moved = np.asanyarray(resample_from_to(second, first, order=0).dataobj)
        fixed = np.asanyarray(first.dataobj)
        # The same place in the world is not the same place in the head.
        assert 0.05 < dice(fixed > 0, moved > 0) < 0.9


def test_image_and_label_are_deformed_alike() -> None:
    # A head that is nothing but a striatum: its image must be bright where its label is.
    x, y, z = np.ogrid[-80:81, -86:75, -74:87]
    ellipsoid = ((x / 20) ** 2 + ((y + 6) / 25) ** 2 + ((z - 6) / 15) ** 2 < 1).astype(np.float32)
    nothing = np.zeros_like(ellipsoid)
    head = Template(
        t1=0.7 * ellipsoid,
        tissues=np.stack([ellipsoid, nothing, nothing, nothing, nothing]),
        origin_mm=np.array([-80.0, -86.0, -74.0]),
    )
    for index in range(4):
        subject = make_subject(head, seed=0, index=index)
        bright = subject.image > 0.5 * np.median(subject.image[subject.label == 1])
        assert dice(bright, subject.label == 1) > 0.9


def test_no_intensity_band_finds_the_nuclei(folder: Path, table: pd.DataFrame) -> None:
    # Measured over 26 subjects: mean 0.10 for the striatum, 0.12 for the thalamus, at most 0.16.
    for image, label in images_and_labels(folder, table):
        array, truth = np.asanyarray(image.dataobj), np.asanyarray(label.dataobj)
        for value in (1, 2):
            assert best_dice_of_an_intensity_band(array, truth == value) < 0.25


def test_an_identical_folder_is_left_untouched(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["make-demo-data", "--folder", str(folder), *NUMBERS]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_folder_is_completed(folder: Path, tmp_path: Path) -> None:
    # dataset.json is written last, so a killed run leaves none.
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "brain_000.nii.gz").write_bytes(gzip.compress(b"half"))
    assert main(["make-demo-data", "--folder", str(tmp_path), *NUMBERS]) == 0
    assert hashes(tmp_path) == hashes(folder)


def test_a_folder_with_a_lost_image_is_completed(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "labelsTr" / "brain_003.nii.gz").unlink()
    assert main(["make-demo-data", "--folder", str(copy), *NUMBERS]) == 0
    assert hashes(copy) == hashes(folder)


@pytest.mark.parametrize("content", ['{"name": "Hippocampus"}', "no JSON"])
def test_another_data_set_is_refused_and_kept(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dataset.json").write_text(content)
    assert main(["make-demo-data", "--folder", str(tmp_path), *NUMBERS]) == 2
    assert "give another --folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]
    assert (tmp_path / "dataset.json").read_text() == content


@pytest.mark.parametrize("option", ["--labelled=0", "--unlabelled=-1", "--test=-1", "--seed=-1"])
def test_a_number_out_of_range_is_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["make-demo-data", "--folder", str(tmp_path), option]) == 2
    assert f"{option.partition('=')[0]} is" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
