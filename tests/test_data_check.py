"""`check-data`: sound data give a table and a page; all problems of others come in one error."""

import argparse
import os
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest

from cotrain import data_check
from cotrain.errors import InputError
from cotrain.files import read_table

SPACING_MM = (0.5, 1, 2)
SHAPE = (10, 12, 8)


def affine_of(spacing: tuple) -> np.ndarray:
    """Return an RAS affine with these voxel sizes."""
    return np.diag([*spacing, 1.0])


class DataSet:
    """A small data set in a folder, which tests spoil: two labelled, two unlabelled, two test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = []
        splits = ["labelled", "labelled", "unlabelled", "unlabelled", "test", "test"]
        for number, split in enumerate(splits):
            case = f"case{number}"
            self.write_image(case)
            labelled = number != 2 and number != 5
            if labelled:
                self.write_label(case)
            self.rows.append(
                (case, f"{case}.nii.gz", f"{case}_label.nii.gz" if labelled else "", split)
            )

    def write_image(self, case: str, *, scale: float = 1, spacing: tuple = SPACING_MM) -> None:
        rng = np.random.default_rng(int(case[-1]))
        array = (scale * rng.normal(100, 10, SHAPE)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(array, affine_of(spacing)), self.folder / f"{case}.nii.gz")

    def label(self) -> np.ndarray:
        """Return labels: 24 voxels of value 1, 10 of value 2; no flip leaves them the same."""
        labels = np.zeros(SHAPE, np.uint8)
        labels[1:5, 2:8, 3] = 1
        labels[7, 2:7, 4:6] = 2
        return labels

    def write_label(
        self, case: str, labels: np.ndarray | None = None, *, spacing: tuple = SPACING_MM
    ) -> None:
        image = nibabel.Nifti1Image(self.label() if labels is None else labels, affine_of(spacing))
        nibabel.save(image, self.folder / f"{case}_label.nii.gz")

    def check(self, *words: str, labels: tuple = ("liver=1", "tumour=2")) -> Path:
        table = self.folder / "cases.tsv"
        lines = ["case\timage\tlabel\tsplit", *("\t".join(row) for row in self.rows)]
        table.write_text("\n".join(lines) + "\n")
        parser = argparse.ArgumentParser()
        data_check.add_arguments(parser)
        out_dir = self.folder / "out"
        arguments = ["--cases", str(table), "--out-dir", str(out_dir), "--labels", *labels, *words]
        data_check.run(parser.parse_args(arguments))
        return out_dir

    def error(self, *words: str, **options) -> str:
        with pytest.raises(InputError) as caught:
            self.check(*words, **options)
        assert not list((self.folder / "out").glob("*.*"))
        return str(caught.value)


@pytest.fixture
def data(tmp_path) -> DataSet:
    return DataSet(tmp_path)


class Page(HTMLParser):
    """Collects the addresses a page uses and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses, self.text = [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    ("split", "listed"),
    [
        ("labelled", ["case0", "case1"]),
        ("unlabelled", ["case2", "case3"]),
        ("test", ["case4", "case5"]),
    ],
)
def test_the_list_of_a_split_is_written_alone(data, split, listed):
    out_dir = data.check("--list", split)
    assert [path.name for path in out_dir.glob("*.*")] == [f"{split}.tsv"]
    rows = read_table(out_dir / f"{split}.tsv")
    assert list(rows.columns) == ["case", "image", "label"]
    assert list(rows["case"]) == listed
    assert rows["image"][1] == str(data.folder / f"{listed[1]}.nii.gz")


def test_the_list_of_other_files_is_another_one(data):
    lists = []
    for fingerprint in ("one", "other", "one"):
        folder = data.check("--list", "unlabelled", "--fingerprint", fingerprint)
        lists.append((folder / "unlabelled.tsv").read_bytes())
        assert list(read_table(folder / "unlabelled.tsv")["case"]) == ["case2", "case3"]
    assert lists[0] == lists[2] != lists[1]


def test_a_transductive_pool_has_the_test_images(data):
    rows = read_table(data.check("--list", "unlabelled", "--transductive") / "unlabelled.tsv")
    assert list(rows["case"]) == ["case2", "case3", "case4", "case5"]
    assert list(rows["label"]) == ["", str(data.folder / "case3_label.nii.gz"), "", ""]


def test_a_data_set_without_test_cases_has_an_empty_list_of_them(data):
    data.rows = data.rows[:4]
    test = read_table(data.check("--list", "test") / "test.tsv")
    assert list(test.columns) == ["case", "image", "label"]
    assert test.empty


def test_a_list_is_refused_for_a_problem_in_another_split(data):
    (data.folder / "case5.nii.gz").write_bytes(b"")
    assert "case case5: " in data.error("--list", "labelled")


def test_sound_files_are_opened_once_and_changed_ones_again(data, capsys):
    def opened() -> str:
        lines = capsys.readouterr().err.splitlines()
        return lines[-1].split(" cases")[0] if lines else "checked none"

    page = (data.check() / "dataset_report.html").read_text()
    assert opened() == "checked 6/6"
    assert (data.check() / "dataset_report.html").read_text() == page
    assert opened() == "checked none"
    data.write_image("case2", scale=2)
    table = read_table(data.check() / "dataset.tsv")
    assert opened() == "checked 1/1"
    assert float(table["intensity_mean"][2]) == pytest.approx(200, abs=2)
    # Another label to look for: all labels are read again.
    data.check(labels=("liver=1", "lesion=2"))
    assert opened() == "checked 6/6"
    # What is wrong is looked at until it is mended.
    (data.folder / "case4.nii.gz").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match="case case4: "):
            data.check(labels=("liver=1", "lesion=2"))
        assert opened() == "checked 1/1"


def test_a_killed_check_goes_on_with_the_files_it_has_not_opened(data, capsys, monkeypatch):
    examined = data_check.examined

    def killed_at_the_fourth(task, *, labels):
        if task[0]["case"] == "case3":
            raise KeyboardInterrupt
        return examined(task, labels=labels)

    with monkeypatch.context() as patch:
        patch.setattr(data_check, "SECONDS_BETWEEN_SAVES", -1)
        patch.setattr(data_check, "examined", killed_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            data.check()
    capsys.readouterr()
    data.check()
    assert "checked 3/3 cases" in capsys.readouterr().err


def test_the_dataset_table_holds_geometry_intensities_and_volumes(data):
    table = read_table(data.check() / "dataset.tsv")
    first = table.loc[0]
    assert first["split"] == "labelled"
    assert first["shape"] == "10x12x8"
    assert first["spacing_mm"] == "0.5x1x2"
    assert first["orientation"] == "RAS"
    voxels = nibabel.load(data.folder / "case0.nii.gz").get_fdata()
    assert float(first["intensity_min"]) == pytest.approx(voxels.min(), rel=1e-5)
    assert float(first["intensity_p50"]) == pytest.approx(np.median(voxels), rel=1e-5)
    assert float(first["intensity_mean"]) == pytest.approx(voxels.mean(), rel=1e-5)
    # a voxel is 0.5 x 1 x 2 = 1 mm3 = 0.001 ml
    assert first["volume_ml_liver"] == "0.024"
    assert first["volume_ml_tumour"] == "0.01"
    assert list(table["volume_ml_liver"] == "") == [False, False, True, False, False, True]


def test_the_page_needs_no_other_file_and_shows_no_test_case(data):
    page = Page(data.check() / "dataset_report.html")
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    # Two plots, and the slices of two labelled and two unlabelled cases.
    assert len(page.addresses) == 6
    for case in ("case0", "case1", "case2", "case3"):
        assert case in page.text
    assert "case4" not in page.text
    assert "1 test cases have no label and cannot be scored, such as case5" in page.text


def test_the_page_says_whether_test_images_are_learnt_from(data):
    assert "pool: train_only" in (data.check() / "dataset_report.html").read_text()
    assert (
        "pool: transductive" in (data.check("--transductive") / "dataset_report.html").read_text()
    )


def test_two_processes_find_what_one_finds(data, capsys):
    one = (data.check() / "dataset.tsv").read_text()
    two = (data.check("--jobs", "2") / "dataset.tsv").read_text()
    assert one == two
    assert "checked 6/6 cases, 0 with problems" in capsys.readouterr().err


def test_all_problems_come_in_one_error(data):
    path = data.folder / "case0.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    data.write_label("case1", spacing=(0.5, 1, 2.5))
    constant = nibabel.Nifti1Image(np.ones(SHAPE, np.float32), affine_of(SPACING_MM))
    nibabel.save(constant, data.folder / "case4.nii.gz")
    message = data.error()
    lines = message.splitlines()
    assert lines[0].startswith("3 problems in the data of ")
    assert "case case0: " in lines[1] and "cannot be read as NIfTI" in lines[1]
    assert "case case1: " in lines[2] and "up to 3.5 mm" in lines[2]
    assert "case case4: " in lines[3] and "the value 1 in every voxel" in lines[3]
    assert len(lines) == 4


def test_at_most_twenty_problems_are_printed(data):
    for number in range(6, 31):
        data.rows.append((f"case{number}", f"case{number}.nii.gz", "", "unlabelled"))
        (data.folder / f"case{number}.nii.gz").write_bytes(b"")
    lines = data.error().splitlines()
    assert lines[0].startswith("25 problems")
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  ... and 5 more"


def test_a_value_of_no_label_is_named_with_the_known_ones(data):
    labels = data.label()
    labels[0, 0, 0] = 7
    data.write_label("case3", labels)
    data.write_label("case4", labels)
    message = data.error()
    assert "case case3 (and 1 more cases)" in message
    assert "case3_label.nii.gz holds the label value 7" in message
    assert "background=0, liver=1, tumour=2" in message


def test_an_image_given_as_a_label_is_one_problem(data):
    image = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) % 500
    data.write_label("case3", image)
    lines = data.error().splitlines()
    # Of 0 to 499 three are background and labels.
    assert "case3_label.nii.gz holds 497 values that are not among the labels" in lines[1]
    assert "such as 3, 4, 5; give the label's path" in lines[1]
    assert len(lines) == 2


def test_a_label_in_no_labelled_case_is_refused(data):
    for case in ("case0", "case1"):
        data.write_label(case, np.minimum(data.label(), 1))
    assert "the label tumour (value 2) is in none of the 2 labelled cases" in data.error()


def test_an_unreadable_label_does_not_make_a_label_missing(data):
    data.write_label("case0", np.minimum(data.label(), 1))
    (data.folder / "case1_label.nii.gz").write_bytes(b"")
    message = data.error()
    assert message.startswith("1 problem in")
    assert "case1_label.nii.gz cannot be read" in message


def test_the_same_voxels_in_two_cases_are_refused(data):
    array = nibabel.load(data.folder / "case0.nii.gz").get_fdata(dtype=np.float32)
    image = nibabel.Nifti1Image(array, affine_of(SPACING_MM))
    image.header["descrip"] = b"another header, the same voxels"
    nibabel.save(image, data.folder / "case5.nii.gz")
    message = data.error()
    assert "labelled case case0 and test case case5 hold the same voxels" in message


def test_channels_must_share_a_grid(data):
    for index, (case, image, *rest) in enumerate(data.rows):
        second = f"{case}_second.nii.gz"
        array = np.random.default_rng(index).random(SHAPE).astype(np.float32)
        spacing = (0.5, 1, 3) if case == "case3" else SPACING_MM
        nibabel.save(nibabel.Nifti1Image(array, affine_of(spacing)), data.folder / second)
        data.rows[index] = (case, f"{image};{second}", *rest)
    message = data.error()
    assert message.startswith("1 problem in")
    assert "case3_second.nii.gz has its voxels up to 7 mm" in message
    nibabel.save(
        nibabel.Nifti1Image(array, affine_of(SPACING_MM)), data.folder / "case3_second.nii.gz"
    )
    table = read_table(data.check() / "dataset.tsv")
    low, high = (float(value) for value in table["intensity_mean"][0].split(";"))
    assert low == pytest.approx(100, abs=2) and high == pytest.approx(0.5, abs=0.05)


def warnings_of(data: DataSet) -> str:
    """Return the warnings on the page, as text."""
    page = Page(data.check() / "dataset_report.html")
    return page.text.partition("Warnings")[2].partition("Summary by split")[0]


def test_a_labelled_image_of_one_slice_is_refused(data):
    voxels = np.random.default_rng(0).normal(100, 10, (*SHAPE[:2], 1)).astype(np.float32)
    label = np.zeros(voxels.shape, np.uint8)
    label[1:5, 2:8], label[7, 2:7] = 1, 2
    data.write_label("case0", label)
    nibabel.save(nibabel.Nifti1Image(voxels, affine_of(SPACING_MM)), data.folder / "case0.nii.gz")
    shape = " x ".join(map(str, voxels.shape))
    assert f"case case0: the image is a single slice, of {shape} voxels" in data.error()


def test_a_lone_slice_among_volumes_is_warned_of(data, capsys):
    voxels = np.random.default_rng(0).normal(100, 10, (*SHAPE[:2], 1)).astype(np.float32)
    image = nibabel.Nifti1Image(voxels, affine_of(SPACING_MM))
    nibabel.save(image, data.folder / "case2.nii.gz")
    data.check()
    # 10 voxels of 0.5 mm are the least extent of the others, a slice of 2 mm is not.
    assert "1 images are less than" not in capsys.readouterr().out
    image = nibabel.Nifti1Image(voxels, affine_of((0.5, 1, 1.2)))
    nibabel.save(image, data.folder / "case2.nii.gz")
    data.check()
    said = "1 images are less than a quarter as thick as every labelled one, such as case2 (1.2 mm)"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("spacing", [(0.0005, 0.001, 0.002), (50, 100, 200)])
def test_a_voxel_size_in_another_unit_is_refused(data, spacing):
    data.write_image("case2", spacing=spacing)
    said = data.error()
    assert (
        "case case2: the image has " in said and "labelled cases have voxels of 0.5x1x2 mm" in said
    )


def test_anisotropic_voxels_along_another_array_axis_are_no_error(data):
    for number in range(6):
        data.write_image(f"case{number}", spacing=(0.1, 0.1, 3))
        data.write_label(f"case{number}", spacing=(0.1, 0.1, 3))
    turned = nibabel.Nifti1Image(
        np.random.default_rng(9).normal(size=(40, 8, 40)).astype(np.float32),
        np.array([[0.1, 0, 0, 0], [0, 0, 0.1, 0], [0, 3, 0, 0], [0, 0, 0, 1]]),
    )
    nibabel.save(turned, data.folder / "case2.nii.gz")
    assert "Mixed orientations" in warnings_of(data)


def test_a_label_on_single_slices_is_warned_of(data):
    assert "single slices" not in warnings_of(data)
    label = np.zeros(SHAPE, np.uint8)
    label[3] = 1
    data.write_label("case1", label)
    # A lesion on one slice is none, nor is an organ that there are two of.
    assert "single slices" not in warnings_of(data)
    label[[4, 8, 9]] = 2
    data.write_label("case1", label)
    assert "single slices" not in warnings_of(data)
    label[[4, 9]] = 0
    data.write_label("case1", label)
    assert "1 labelled cases have a label on single slices" in warnings_of(data)


def test_a_channel_with_the_air_of_ct_should_be_called_ct(data, capsys):
    for case in range(6):
        data.write_image(f"case{case}", scale=-1000)
    for name, is_told in (("MRI", True), ("CT", False)):
        data.check("--channels", name)
        assert ("call it CT in `channels`" in capsys.readouterr().out) == is_told


def test_a_table_of_ct_and_other_images_is_warned_of(data, capsys):
    data.write_image("case4", scale=-1000)
    for name in ("MRI", "CT"):
        data.check("--channels", name)
        said = capsys.readouterr().out
        assert "in 1 cases (such as case4) and above it in 5 (such as case0)" in said
        assert "`channels`" not in said


def test_images_without_air_that_are_called_ct_are_warned_of(data, capsys):
    for name, is_told in (("CT", True), ("MRI", False), ("noNorm", False)):
        data.check("--channels", name)
        assert ("is called CT, but no case begins" in capsys.readouterr().out) == is_told


def test_mixed_orientations_are_warned_of(data):
    assert "orientations" not in warnings_of(data)
    data.write_image("case2", spacing=(-0.5, 1, 2))
    assert "5 RAS (such as case0), 1 LAS (such as case2)" in warnings_of(data)


def test_voxel_sizes_more_than_twice_apart_are_warned_of(data):
    data.write_image("case2", spacing=(0.5, 1, 4))
    assert "Voxel sizes" not in warnings_of(data)
    data.write_image("case2", spacing=(0.5, 1, 4.5))
    assert "inferior-superior range from 2 mm (case0) to 4.5 mm (case2)" in warnings_of(data)


def test_intensities_more_than_a_hundred_times_apart_are_warned_of(data):
    data.write_image("case2", scale=50)
    assert "Intensities" not in warnings_of(data)
    data.write_image("case2", scale=1000)
    assert "Intensities of channel 0" in warnings_of(data)


def test_an_image_without_orientation_and_a_label_without_foreground_are_warned_of(data):
    image = nibabel.load(data.folder / "case2.nii.gz")
    image = nibabel.Nifti1Image(image.get_fdata(dtype=np.float32), None)
    image.header.set_zooms(SPACING_MM)
    nibabel.save(image, data.folder / "case2.nii.gz")
    data.write_label("case1", np.zeros(SHAPE, np.uint8))
    warnings = warnings_of(data)
    assert "1 images say nothing about their orientation" in warnings and "case2" in warnings
    assert "1 cases have a label file without any foreground, such as case1" in warnings


@pytest.mark.skipif("COTRAIN_DATA" not in os.environ, reason="COTRAIN_DATA is not set")
@pytest.mark.parametrize(
    ("folder", "table", "labels"),
    [
        ("Task04_Hippocampus", "hippocampus_4.tsv", ["anterior=1", "posterior=2"]),
        ("LeftAtrium_1.25mm", "left_atrium_4.tsv", ["atrium=1"]),
    ],
)
def test_the_benchmark_data_are_sound(tmp_path, folder, table, labels):
    parser = argparse.ArgumentParser()
    data_check.add_arguments(parser)
    cases = Path(__file__).parents[1] / "config" / "cases" / table
    words = ["--cases", str(cases), "--data-folder", str(Path(os.environ["COTRAIN_DATA"], folder))]
    words += ["--labels", *labels, "--out-dir", str(tmp_path)]
    data_check.run(parser.parse_args(words))
    assert (read_table(tmp_path / "dataset.tsv")["split"] == "labelled").sum() == 4
