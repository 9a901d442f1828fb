"""The user's case table: in, a TSV or CSV of cases; out, a checked table with absolute paths.

Imported by the Snakefile, so no image is opened here and nothing heavier than pandas is imported.
"""

import difflib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from cotrain.errors import InputError
from cotrain.files import read_table

COLUMNS = ("case", "image", "label", "split")
SPLITS = ("labelled", "unlabelled", "test")
SUFFIXES = (".nii.gz", ".nii")
CASE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}"


def read_cases(
    table_path: str | Path, data_folder: str | Path | None, *, check_files: bool = True
) -> pd.DataFrame:
    """Return the case table with the columns case, image, label, split, all text, one row a case.

    `image` holds absolute paths, `;` between channels; `label` is an absolute path or ''. Relative
    paths start from `data_folder`, or from the table's own folder where that is None. The files
    are looked for, but not opened; `check_files=False` skips that.

    Raises InputError at the first thing that is wrong, naming the table, the row (the one under
    the headings is row 1), the case and what to do.
    """
    table = Path(table_path)
    folder = os.path.abspath(table.parent if data_folder is None else data_folder)
    cases = _read_text(table)
    _check_names(cases, table)
    _check_splits(cases, table)
    cases["image"] = [_absolute(image, folder) for image in cases["image"]]
    cases["label"] = [_absolute(label, folder) for label in cases["label"]]
    _check_images_and_labels(cases, table)
    _check_no_file_is_used_twice(cases, table)
    if check_files:
        check_files_exist(cases, table=table, data_folder=folder)
    return cases


def cases_of(cases: pd.DataFrame, split: str, *, transductive: bool) -> pd.DataFrame:
    """Return the columns case, image, label of a split's rows of a table from `read_cases`.

    In a transductive pool test images count as unlabelled ones, too, but without their labels:
    audits show true scores of unlabelled cases that have one.
    """
    rows = cases[cases["split"] == split]
    if split == "unlabelled" and transductive:
        test = cases[cases["split"] == "test"].assign(label="")
        rows = pd.concat([rows, test])
    return rows[["case", "image", "label"]].reset_index(drop=True)


def check_files_exist(cases: pd.DataFrame, *, table: str | Path, data_folder: str | Path) -> None:
    """Look for every image and label of a table that `read_cases` returned.

    Lists each folder once instead of asking for each file: 10,000 questions to a network file
    system take minutes. `table` and `data_folder` are only named in the message.
    Raises InputError with the number of missing files and the first three.
    """
    wanted = [path for image in cases["image"] for path in image.split(";")]
    wanted += [label for label in cases["label"] if label]
    names_in = defaultdict(list)
    for path in wanted:
        folder, name = os.path.split(path)
        names_in[folder].append(name)
    missing = []
    for folder, names in names_in.items():
        there = _files_in(folder)
        missing += [os.path.join(folder, name) for name in names if name not in there]
    if missing:
        raise InputError(
            f"{table}: {len(missing)} of {len(wanted)} files do not exist, or are folders, first "
            f"{', '.join(missing[:3])}; correct the paths in the table, or data_folder, which "
            f"relative paths start from ({data_folder})."
        )


def _read_text(table: Path) -> pd.DataFrame:
    """Return the four columns as stripped text; raises InputError where they are not there."""
    frame = read_table(table).rename(columns=str.strip)
    for column in COLUMNS:
        if column not in frame.columns:
            raise InputError(_missing_column(column, list(frame.columns), table))
    frame = frame[list(COLUMNS)]
    return frame.apply(lambda values: values.str.strip())


def _missing_column(column: str, found: list[str], table: Path) -> str:
    """Return the sentence about a missing column, with the heading that was probably meant."""
    near = difflib.get_close_matches(column, [name for name in found if name not in COLUMNS], n=1)
    if near:
        return f"{table} has no column `{column}` but has `{near[0]}`; rename that one."
    return (
        f"{table} has no column `{column}`, only {', '.join(found)}; add it (the columns are "
        f"{', '.join(COLUMNS)})."
    )


def _refuse(wrong: pd.DataFrame, table: Path, sentence: Callable[[pd.Series], str]) -> None:
    """Raise InputError about the first of the wrong rows, if there are any."""
    if wrong.empty:
        return
    row = wrong.iloc[0]
    others = f" (and so in {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
    raise InputError(f"{table}, row {row.name + 1}, case `{row['case']}`: {sentence(row)}{others}.")


def _check_names(cases: pd.DataFrame, table: Path) -> None:
    """Refuse names that cannot be file names, and names that occur twice."""
    _refuse(
        cases[~cases["case"].str.fullmatch(CASE_NAME)],
        table,
        lambda row: (
            "a case name becomes a file name and may hold up to 150 letters, digits, `_`, `-` and "
            "`.`, a letter or digit first; rename the case (its files may keep their names)"
        ),
    )
    # nnU-Net keeps the label of case `a` as `a_seg.b2nd` beside its image `a.b2nd`
    _refuse(
        cases[cases["case"].str.endswith("_seg")],
        table,
        lambda row: "nnU-Net keeps names ending in `_seg` for its labels; rename the case",
    )

    def repeated(row: pd.Series) -> str:
        splits = cases.loc[cases["case"] == row["case"], "split"].unique()
        if len(splits) > 1:
            return (
                f"overlapping splits, the case is in {' and '.join(splits)}; leave it in one of "
                "them"
            )
        return "the case is listed twice; remove one of the rows or rename its case"

    _refuse(cases[cases["case"].duplicated()], table, repeated)


def _check_splits(cases: pd.DataFrame, table: Path) -> None:
    """Refuse unknown splits, and tables without a labelled or without an unlabelled case."""

    def unknown(row: pd.Series) -> str:
        near = difflib.get_close_matches(row["split"], SPLITS, n=1)
        remedy = f"did you mean `{near[0]}`" if near else "change it"
        return f"the split is `{row['split']}`, wanted {', '.join(SPLITS)}; {remedy}"

    _refuse(cases[~cases["split"].isin(SPLITS)], table, unknown)
    for split in ("labelled", "unlabelled"):
        if not (cases["split"] == split).any():
            raise InputError(
                f"{table} has no {split} case among its {len(cases)} rows, and co-training needs "
                f"at least one labelled and one unlabelled case; set the split of some rows to "
                f"{split}."
            )


def _check_images_and_labels(cases: pd.DataFrame, table: Path) -> None:
    """Refuse rows without an image, labelled rows without a label, and unequal channel counts."""
    _refuse(
        cases[cases["image"] == ""],
        table,
        lambda row: "the image is empty; give its path (`;` between channels) or remove the row",
    )
    _refuse(
        cases[(cases["split"] == "labelled") & (cases["label"] == "")],
        table,
        lambda row: "a labelled case has no label; give its path or make the case unlabelled",
    )

    paths = cases["image"] + cases["label"].map(lambda label: f";{label}" if label else "")
    others = paths.map(
        lambda joined: [path for path in joined.split(";") if not path.endswith(SUFFIXES)]
    )
    _refuse(
        cases[others.map(len) > 0],
        table,
        lambda row: (
            f"the path `{others[row.name][0]}` does not end in .nii.gz or .nii; convert the "
            "file to NIfTI, mend the path, or remove a `;` that is too many"
        ),
    )
    channels = cases["image"].str.count(";") + 1
    usual = channels.mode()[0]
    _refuse(
        cases[channels != usual],
        table,
        lambda row: (
            f"the image has {channels[row.name]} channels and most other rows have {usual}; give "
            "every case the same channels in the same order"
        ),
    )


def _check_no_file_is_used_twice(cases: pd.DataFrame, table: Path) -> None:
    """Refuse a file that is the image or label of two cases, or twice in one."""
    used_by: dict[str, str] = {}
    for case, image, label, split in cases.itertuples(index=False):
        files = [(path, "image") for path in image.split(";")]
        files += [(label, "label")] if label else []
        for path, role in files:
            use = f"the {role} of {split} case `{case}`"
            if path in used_by:
                raise InputError(
                    f"{table}: the file {path} is {used_by[path]} and {use}; give every case its "
                    "own files, or remove one of the rows."
                )
            used_by[path] = use


def _absolute(paths: str, folder: str) -> str:
    """Return `;`-joined paths as absolute ones; an empty cell stays empty."""
    if not paths:
        return ""
    return ";".join(
        os.path.normpath(os.path.join(folder, path.strip())) for path in paths.split(";")
    )


def _files_in(folder: str) -> set[str]:
    """Return the names of the files in a folder; a folder that does not exist has none."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except PermissionError:
        raise InputError(f"The folder {folder} cannot be read; ask for read permission.") from None


def labels_from(words: Iterable[str]) -> dict[str, int]:
    """Return label name → value from words such as `liver=1`; raises InputError on others."""
    labels: dict[str, int] = {}
    for word in words:
        name, _, value = word.rpartition("=")
        if not name or not value.isdecimal() or not 1 <= int(value) <= 255:
            raise InputError(
                f"The label `{word}` is not name=value with a value from 1 to 255; give labels as "
                "liver=1 tumour=2 and leave out the background."
            )
        if name in labels or int(value) in labels.values():
            raise InputError(f"The label `{word}` repeats a name or value; give each once.")
        labels[name] = int(value)
    return labels
