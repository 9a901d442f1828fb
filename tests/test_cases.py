"""The case table: what is accepted, and the sentence for each thing that is not."""

import argparse
import errno
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from cotrain import make_table
from cotrain.__main__ import main
from cotrain.cases import cases_of, labels_from, read_cases
from cotrain.errors import InputError
from cotrain.files import read_table

CONFIG_CASES = Path(__file__).parents[1] / "config" / "cases"
GOOD = [
    ("a", "a.nii.gz", "a_label.nii.gz", "labelled"),
    ("b", "b.nii.gz", "", "unlabelled"),
    ("c", "c.nii.gz", "c_label.nii.gz", "test"),
]


def write(folder: Path, rows: list[tuple], *, header: str = "case\timage\tlabel\tsplit") -> Path:
    """Write a table and an empty file for each path in it; return the table's path."""
    folder.mkdir(exist_ok=True)
    table = folder / "cases.tsv"
    table.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")
    for row in rows:
        for path in [*row[1].split(";"), *row[2:3]]:
            if path:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).touch()
    return table


def error_of(folder: Path, rows: list[tuple], **options) -> str:
    """Return the sentence that a table of these rows is refused with."""
    with pytest.raises(InputError) as caught:
        read_cases(write(folder, rows, **options), None)
    message = str(caught.value)
    assert "cases.tsv" in message
    assert message.endswith(".") and "\n" not in message
    return message


def test_paths_start_from_the_tables_folder(tmp_path):
    cases = read_cases(write(tmp_path, GOOD), None)
    assert list(cases.columns) == ["case", "image", "label", "split"]
    assert list(cases["image"]) == [str(tmp_path / f"{name}.nii.gz") for name in "abc"]
    assert list(cases["label"]) == [
        str(tmp_path / "a_label.nii.gz"), "", str(tmp_path / "c_label.nii.gz"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("split", "transductive", "listed"),
    [
        ("labelled", False, [("a", "a_label.nii.gz")]),
        ("unlabelled", False, [("b", "")]),
        ("test", False, [("c", "c_label.nii.gz")]),
        # The label of a test case would give its true score away.
        ("unlabelled", True, [("b", ""), ("c", "")]),
        ("test", True, [("c", "c_label.nii.gz")]),
    ],
)
def test_test_images_are_unlabelled_ones_too_where_the_pool_is_transductive(
    tmp_path, split, transductive, listed
):
    rows = cases_of(read_cases(write(tmp_path, GOOD), None), split, transductive=transductive)
    assert list(rows.columns) == ["case", "image", "label"]
    assert list(zip(rows["case"], rows["label"], strict=True)) == [
        (case, str(tmp_path / label) if label else "") for case, label in listed
    ]


def test_paths_start_from_the_data_folder_where_there_is_one(tmp_path):
    table = write(tmp_path, GOOD)
    data = tmp_path / "data"
    write(data, GOOD)
    cases = read_cases(table, data)
    assert cases["image"][0] == str(data / "a.nii.gz")


def test_absolute_paths_stay_as_they_are(tmp_path):
    rows = [(case, str(tmp_path / "far" / image), "", "unlabelled") for case, image, *_ in GOOD[1:]]
    cases = read_cases(write(tmp_path, [GOOD[0], *rows]), None)
    assert cases["image"][1] == str(tmp_path / "far" / "b.nii.gz")


def test_channels_are_joined_by_semicolons(tmp_path):
    rows = [
        ("a", "a_0.nii.gz; a_1.nii.gz", "a.nii.gz", "labelled"),
        ("b", "b_0.nii.gz;b_1.nii.gz", "", "unlabelled"),
    ]
    table = write(tmp_path, rows)
    (tmp_path / "a_1.nii.gz").touch()
    cases = read_cases(table, None)
    assert cases["image"][0] == f"{tmp_path}/a_0.nii.gz;{tmp_path}/a_1.nii.gz"


def test_a_csv_from_a_spreadsheet_is_read(tmp_path):
    write(tmp_path, GOOD)
    table = tmp_path / "cases.csv"
    rows = ["case, image ,label,split", *(",".join(row) + " " for row in GOOD)]
    table.write_text("\n".join(rows), encoding="utf-8-sig")
    assert list(read_cases(table, None)["split"]) == ["labelled", "unlabelled", "test"]


def test_an_unlabelled_or_test_case_may_have_a_label_or_none(tmp_path):
    rows = [
        *GOOD,
        ("d", "d.nii.gz", "d_label.nii.gz", "unlabelled"),
        ("e", "e.nii.gz", "", "test"),
    ]
    assert len(read_cases(write(tmp_path, rows), None)) == 5


def test_further_columns_are_left_out(tmp_path):
    rows = [(*row, "a remark") for row in GOOD]
    table = write(tmp_path, rows, header="case\timage\tlabel\tsplit\tremark")
    assert list(read_cases(table, None).columns) == ["case", "image", "label", "split"]


def test_a_misspelt_column_is_named_with_the_right_spelling(tmp_path):
    message = error_of(tmp_path, GOOD, header="case\timage\tlable\tsplit")
    assert "no column `label` but has `lable`" in message


def test_a_missing_column_is_named(tmp_path):
    message = error_of(tmp_path, [row[:3] for row in GOOD], header="case\timage\tlabel")
    assert "no column `split`, only case, image, label" in message


@pytest.mark.parametrize(
    ("name", "separator", "words"),
    [
        ("cases.tsv", ",", "has commas between its columns, wanted tabs"),
        ("cases.tsv", ";", "has semicolons between its columns, wanted tabs"),
        ("cases.csv", "\t", "has tabs between its columns, wanted commas"),
    ],
)
def test_the_wrong_separator_is_told_apart_from_a_missing_column(name, separator, words, tmp_path):
    table = tmp_path / name
    rows = [("case", "image", "label", "split"), *GOOD]
    table.write_text("\n".join(separator.join(row) for row in rows))
    with pytest.raises(InputError, match=f"{name} {words}; save it as"):
        read_cases(table, None)


def test_surplus_cells_do_not_shift_the_columns(tmp_path):
    assert "more cells than the 4 headings" in error_of(tmp_path, [(*row, "x") for row in GOOD])


def test_empty_rows_of_a_spreadsheet_are_none(tmp_path):
    rows = [("a", "a.nii", "", "unlabelled"), ("b", "b.nii", "c.nii", "labelled"), ("",) * 4]
    for name in "abc":
        (tmp_path / f"{name}.nii").touch()
    assert list(read_cases(write(tmp_path, rows), None)["case"]) == ["a", "b"]


def test_one_row_with_surplus_cells_is_refused(tmp_path):
    message = error_of(tmp_path, [GOOD[0], (*GOOD[1], "x")])
    assert "row 2: it has 5 cells, wanted 4 as in the heading; remove" in message


def test_a_table_with_blanks_for_tabs_is_told_so(tmp_path):
    table = tmp_path / "cases.tsv"
    table.write_text("\n".join("   ".join(row) for row in [("case", "image", "label"), *GOOD]))
    with pytest.raises(InputError, match=r"has blanks between its columns \(case   image   label"):
        read_cases(table, None)


def test_an_empty_table_is_refused(tmp_path):
    table = tmp_path / "cases.tsv"
    table.write_text("")
    with pytest.raises(InputError, match="not a table that can be read"):
        read_cases(table, None)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.tsv does not exist"):
        read_cases(tmp_path / "nowhere.tsv", None)


def test_a_case_in_two_splits_is_overlapping_splits(tmp_path):
    message = error_of(tmp_path, [*GOOD, ("b", "d.nii.gz", "", "test")])
    assert "row 4, case `b`: overlapping splits, the case is in unlabelled and test" in message


def test_a_case_listed_twice_is_refused(tmp_path):
    assert "case `b`: the case is listed twice" in error_of(tmp_path, [*GOOD, GOOD[1]])


@pytest.mark.parametrize("name", ["a/b", "case 1", "", ".hidden", "-x", "ä", "..", "a\\b"])
def test_a_case_name_must_be_a_file_name(tmp_path, name):
    message = error_of(tmp_path, [*GOOD, (name, "d.nii.gz", "", "test")])
    assert f"row 4, case `{name}`: a case name becomes a file name" in message


def test_letters_digits_and_three_signs_make_a_case_name(tmp_path):
    table = write(tmp_path, [*GOOD, ("Sub-01_ses.2", "d.nii.gz", "", "test")])
    assert len(read_cases(table, None)) == 4


def test_a_case_name_that_collides_with_an_nnunet_file_is_refused(tmp_path):
    assert "`_seg`" in error_of(tmp_path, [*GOOD, ("a_seg", "d.nii.gz", "", "test")])


def test_an_unknown_split_is_refused_with_the_nearest_one(tmp_path):
    message = error_of(tmp_path, [*GOOD, ("d", "d.nii.gz", "", "unlabeled")])
    assert "row 4, case `d`: the split is `unlabeled`" in message
    assert "did you mean `unlabelled`" in message


@pytest.mark.parametrize(("kept", "missing"), [(GOOD[1:], "labelled"), (GOOD[::2], "unlabelled")])
def test_both_kinds_of_training_cases_are_needed(tmp_path, kept, missing):
    assert f"has no {missing} case among its 2 rows" in error_of(tmp_path, kept)


def test_a_labelled_case_needs_a_label(tmp_path):
    rows = [*GOOD, ("d", "d.nii.gz", "", "labelled"), ("e", "e.nii.gz", "", "labelled")]
    message = error_of(tmp_path, rows)
    assert "row 4, case `d`: a labelled case has no label" in message
    assert "so in 1 more rows" in message


def test_every_case_needs_an_image(tmp_path):
    assert "the image is empty" in error_of(tmp_path, [*GOOD, ("d", "", "", "test")])


@pytest.mark.parametrize(
    ("image", "label"),
    [("d.nii.gz;", ""), ("d.nrrd", ""), ("d.nii.gz;d.png", ""), ("d.nii.gz", "d.mha;e.nii.gz")],
)
def test_only_nifti_files_are_accepted(tmp_path, image, label):
    message = error_of(tmp_path, [*GOOD, ("d", image, label, "test")])
    assert "row 4, case `d`" in message and "convert the file to NIfTI" in message


def test_every_case_needs_the_same_number_of_channels(tmp_path):
    message = error_of(tmp_path, [*GOOD, ("d", "d_0.nii.gz;d_1.nii.gz", "", "test")])
    assert "case `d`: the image has 2 channels and most other rows have 1" in message


def test_an_image_of_two_cases_is_refused(tmp_path):
    message = error_of(tmp_path, [*GOOD, ("d", "./x/../a.nii.gz", "", "test")])
    assert "a.nii.gz is the image of labelled case `a` and the image of test case `d`" in message


def test_an_image_as_its_own_label_is_refused(tmp_path):
    message = error_of(tmp_path, [*GOOD, ("d", "d.nii.gz", "d.nii.gz", "test")])
    assert "the image of test case `d` and the label of test case `d`" in message


def test_missing_files_are_counted_and_the_first_three_named(tmp_path):
    rows = [(f"case{n}", f"images/case{n}.nii.gz", "", "unlabelled") for n in range(5)]
    table = write(tmp_path, [GOOD[0], *rows])
    for n in range(1, 5):
        (tmp_path / "images" / f"case{n}.nii.gz").unlink()
    with pytest.raises(InputError) as caught:
        read_cases(table, None)
    message = str(caught.value)
    assert "4 of 7 files do not exist" in message
    assert "images/case3.nii.gz;" in message and "case4" not in message
    assert f"data_folder, which relative paths start from ({tmp_path})" in message
    assert len(read_cases(table, None, check_files=False)) == 6


def test_a_missing_folder_means_missing_files(tmp_path):
    table = write(tmp_path, GOOD)
    with pytest.raises(InputError, match="5 of 5 files do not exist"):
        read_cases(table, tmp_path / "nowhere")


def test_a_folder_is_not_an_image(tmp_path):
    table = write(tmp_path, GOOD)
    (tmp_path / "b.nii.gz").unlink()
    (tmp_path / "b.nii.gz").mkdir()
    with pytest.raises(InputError, match="1 of 5 files do not exist"):
        read_cases(table, None)


def test_ten_thousand_cases_are_checked_within_a_second(tmp_path):
    rows = [(f"case{n:05}", f"case{n:05}.nii.gz", "", "unlabelled") for n in range(10_000)]
    table = write(tmp_path, [GOOD[0], *rows])
    started = time.process_time()
    assert len(read_cases(table, None)) == 10_001
    assert time.process_time() - started < 1


def test_the_module_imports_nothing_heavy():
    code = (
        "import sys, cotrain.cases; print({'torch', 'nibabel', 'matplotlib', 'scipy'} & "
        "set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("table", "labelled", "unlabelled", "test"),
    [("hippocampus_4.tsv", 4, 96, 60), ("left_atrium_4.tsv", 4, 41, 15)],
)
def test_benchmark_tables_hold_the_fixed_splits(table, labelled, unlabelled, test):
    cases = read_cases(CONFIG_CASES / table, None, check_files=False)
    assert list(cases["split"]) == (
        ["labelled"] * labelled + ["unlabelled"] * unlabelled + ["test"] * test
    )
    assert list(cases["case"]) == sorted(cases["case"])
    assert (cases["label"] != "").all()


def make(folder: Path, *words: str) -> pd.DataFrame:
    """Run make-table on folder/images and folder/labels; return the table as it was written."""
    parser = argparse.ArgumentParser()
    make_table.add_arguments(parser)
    out = folder / "made.tsv"
    folders = ["--images", str(folder / "images"), "--labels", str(folder / "labels")]
    arguments = parser.parse_args([*folders, "--out", str(out), *words])
    make_table.run(arguments)
    return read_table(arguments.out)


def touch(folder: Path, *names: str) -> None:
    """Make empty NIfTI files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.nii.gz").touch()


def test_make_table_takes_cases_without_a_label_as_unlabelled(tmp_path, capsys):
    touch(tmp_path / "images", "a", "b", "c", "._a")
    touch(tmp_path / "labels", "c", "b", "._c")
    (tmp_path / "tests.txt").write_text("c\n")
    made = make(tmp_path, "--test-list", str(tmp_path / "tests.txt"))
    assert list(made["case"]) == ["a", "b", "c"]
    assert list(made["split"]) == ["unlabelled", "labelled", "test"]
    assert list(made["label"]) == ["", *(str(tmp_path / f"labels/{x}.nii.gz") for x in "bc")]
    assert "1 labelled, 1 unlabelled, 1 test" in capsys.readouterr().out


def test_make_table_writes_a_csv_where_its_name_says_so(tmp_path):
    touch(tmp_path / "images", "a", "b")
    touch(tmp_path / "labels", "a")
    out = tmp_path / "cases.csv"
    make(tmp_path, "--out", str(out))
    assert list(read_cases(out, None)["split"]) == ["labelled", "unlabelled"]


def test_a_cell_may_hold_a_separator_that_is_no_end_of_a_line(tmp_path):
    path = tmp_path / "review.tsv"
    path.write_text("case\tnote\none\tfirst\u2028second\x85third\ntwo\t\n")
    assert read_table(path)["note"].tolist() == ["first\u2028second\x85third", ""]


def test_a_quotation_mark_that_swallows_a_row_is_refused(tmp_path):
    path = tmp_path / "review.tsv"
    path.write_text('case\tverdict\tnote\nzero\taccept\t\none\texclude\t"off\ntwo\texclude\t"x"\n')
    with pytest.raises(InputError, match=r"review\.tsv, row 2: a cell goes on in the next line"):
        read_table(path)


def test_make_table_refuses_files_whose_names_cannot_name_a_case(tmp_path):
    touch(tmp_path / "images", "Patient 01", "M\u00fcller", "b")
    touch(tmp_path / "labels", "b")
    with pytest.raises(InputError, match=r"2 images cannot name a case, first .*Müller\.nii\.gz: "):
        make(tmp_path)
    assert not (tmp_path / "made.tsv").exists()


def test_make_table_refuses_a_name_that_a_table_would_take_for_a_comment(tmp_path):
    touch(tmp_path / "images", "#1", "b")
    touch(tmp_path / "labels", "b")
    with pytest.raises(InputError, match=r"#1\.nii\.gz begins with #, as a comment does"):
        make(tmp_path)


def test_make_table_says_what_it_leaves_out_and_what_looks_like_a_mask(tmp_path, capsys):
    touch(tmp_path / "images", "a", "b", "b_mask")
    (tmp_path / "images/c.nrrd").touch()
    touch(tmp_path / "labels", "a")
    make(tmp_path)
    said = capsys.readouterr().out
    assert (
        f"{tmp_path / 'images'}: 1 that do not end in .nii.gz or .nii are left out, such as" in said
    )
    assert "1 cases look like masks of others, such as b_mask of b" in said


def test_make_table_warns_of_test_cases_of_a_list_without_a_label(tmp_path, capsys):
    touch(tmp_path / "images", "a", "b", "c", "d")
    touch(tmp_path / "labels", "a", "b")
    (tmp_path / "tests.txt").write_bytes("\ufeffa\nc\n".encode())
    made = make(tmp_path, "--test-list", str(tmp_path / "tests.txt"))
    assert list(made["split"]) == ["test", "labelled", "test", "unlabelled"]
    assert "WARNING: 1 test cases have no label" in capsys.readouterr().out


def test_a_csv_with_semicolons_is_read(tmp_path):
    path = tmp_path / "cases.CSV"
    path.write_text("case;image;label\none;a.nii;\n")
    assert read_table(path).to_dict("records") == [{"case": "one", "image": "a.nii", "label": ""}]


def test_a_comment_behind_the_mark_of_a_spreadsheet_is_a_comment(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes("\ufeff# of the first scanner, all\ncase,image,label\none,a.nii,\n".encode())
    assert read_table(path).to_dict("records") == [{"case": "one", "image": "a.nii", "label": ""}]


def test_a_place_that_cannot_be_written_to_is_told(tmp_path, capsys, monkeypatch):
    def refuse(*words):
        raise PermissionError(errno.EACCES, "Permission denied", "scans/cases.tsv")

    monkeypatch.setattr(make_table, "run", refuse)
    words = ["make-table", "--images", "i", "--labels", "l", "--out", "o.tsv"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "cotrain make-table: scans/cases.tsv: Permission denied; ask for permission, or give "
        "another place.\n"
    )


def test_make_table_joins_channels_in_the_order_of_the_suffixes(tmp_path):
    touch(tmp_path / "images", "a_0001", "a_0000", "b_0000", "b_0001")
    touch(tmp_path / "labels", "a")
    words = ["--channel-suffix", "_0000,_0001", "--data-folder", str(tmp_path)]
    made = make(tmp_path, *words)
    assert list(made["case"]) == ["a", "b"]
    assert made["image"][0] == "images/a_0000.nii.gz;images/a_0001.nii.gz"
    assert made["label"][0] == "labels/a.nii.gz"


def test_make_table_splits_a_benchmark_by_sorted_name(tmp_path):
    touch(tmp_path / "images", *"gfedcba")
    touch(tmp_path / "labels", *"abcdefg")
    made = make(tmp_path, "--labelled", "2", "--unlabelled", "3", "--test", "1")
    assert dict(zip(made["case"], made["split"], strict=True)) == {
        "a": "labelled", "b": "labelled", "c": "unlabelled", "d": "unlabelled",
        "e": "unlabelled", "g": "test",
    }  # fmt: skip
    assert (made["label"] != "").all()


def test_make_table_refuses_more_cases_than_there_are(tmp_path):
    touch(tmp_path / "images", *"abc")
    touch(tmp_path / "labels", *"abc")
    with pytest.raises(InputError, match=r"3 labelled cases .* the folders have 2"):
        make(tmp_path, "--labelled", "3", "--test", "1")


def test_make_table_notices_nnunet_names(tmp_path):
    touch(tmp_path / "images", "a_0000", "b_0000")
    touch(tmp_path / "labels", "a")
    with pytest.raises(InputError, match="add --channel-suffix _0000"):
        make(tmp_path)


def test_make_table_takes_a_number_without_channel_0000_for_the_cases_own(tmp_path):
    touch(tmp_path / "images", "scan_0042", "scan_2024")
    touch(tmp_path / "labels", "scan_0042")
    assert list(make(tmp_path)["case"]) == ["scan_0042", "scan_2024"]


def test_make_table_says_how_to_name_masks_as_their_images(tmp_path):
    touch(tmp_path / "images", "a", "b", "c")
    masks = tmp_path / "labels"
    touch(masks, "a_seg", "b_seg")
    with pytest.raises(
        InputError, match="without `_seg`; in a copy of their folder: for f"
    ) as told:
        make(tmp_path)
    loop = str(told.value).partition("folder: ")[2].removesuffix(".")
    subprocess.run(["bash", "-c", loop], cwd=masks, check=True)
    assert list(make(tmp_path)["split"]) == ["labelled", "labelled", "unlabelled"]


def test_make_table_names_a_missing_channel(tmp_path):
    touch(tmp_path / "images", "a_0000", "a_0001", "b_0000")
    touch(tmp_path / "labels", "a")
    with pytest.raises(InputError, match="1 channels are missing, first b_0001"):
        make(tmp_path, "--channel-suffix", "_0000,_0001")


def test_make_table_names_a_label_without_an_image(tmp_path):
    touch(tmp_path / "images", "a", "b")
    touch(tmp_path / "labels", "a", "c")
    with pytest.raises(InputError, match=r"1 labels have no image .*/labels/c\.nii\.gz"):
        make(tmp_path)


def test_make_table_names_a_test_case_that_is_not_there(tmp_path):
    touch(tmp_path / "images", "a", "b")
    touch(tmp_path / "labels", "a")
    (tmp_path / "tests.txt").write_text("z\n")
    with pytest.raises(InputError, match="first `z`"):
        make(tmp_path, "--test-list", str(tmp_path / "tests.txt"))


# ----------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "words",
    [["liver"], ["liver=0"], ["liver=x"], ["=1"], ["a=1", "b=1"], ["a=1", "a=2"], ["a=256"]],
)
def test_labels_are_names_with_different_values(words):
    with pytest.raises(InputError, match="The label `"):
        labels_from(words)


def test_a_label_name_may_hold_an_equals_sign():
    assert labels_from(["stage=2=1", "b=2"]) == {"stage=2": 1, "b": 2}
