"""Scores a folder of masks: in, `<masks>/<case>.nii.gz` and a checked case table; out, a TSV.

The table written has the columns case, label, dice, jaccard, hd95_mm, asd_mm, hd95_voxel,
asd_voxel, one row per case and label, sorted by both. Everything is measured on the grid of the
true label file, never on a resampled one. Cases without a label file cannot be scored and have no
row; with none at all the table has its header only.
"""

import argparse
from pathlib import Path

import pandas as pd

from cotrain.cases import labels_from
from cotrain.errors import InputError
from cotrain.files import read_table, write_table
from cotrain.metrics import SCORES, score_case
from cotrain.nifti import check_same_grid, read_labels, spacing_mm

COLUMNS = ("case", "label", *SCORES)


def evaluate_masks(
    masks_folder: Path, cases: pd.DataFrame, *, labels: dict[str, int]
) -> pd.DataFrame:
    """Return the evaluation table of the masks of all `cases` that have a label file.

    `cases` is a checked case table (columns case, label). Raises InputError, naming the file,
    where a mask is missing, lies on another grid than its label, or holds an unknown value.
    """
    rows = []
    for case, label_path in zip(cases["case"], cases["label"], strict=True):
        if not label_path:
            continue
        mask_path = masks_folder / f"{case}.nii.gz"
        if not mask_path.is_file():
            raise InputError(
                f"The mask {mask_path} is missing, but case `{case}` has a label to score it by; "
                "infer the masks of this folder to the end first."
            )
        check_same_grid(label_path, mask_path)
        mask, _, _ = read_labels(mask_path)
        truth, affine, _ = read_labels(label_path)
        try:
            scored = score_case(mask, truth, labels=labels, spacing_mm=spacing_mm(affine))
        except InputError as error:
            raise InputError(f"{mask_path} against {label_path}: {error}") from error
        rows += [{"case": case} | row for row in scored]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["case", "label"], ignore_index=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cotrain evaluate`."""
    parser.add_argument(
        "--masks", type=Path, required=True, metavar="DIR", help="folder with <case>.nii.gz"
    )
    parser.add_argument(
        "--cases",
        type=Path,
        required=True,
        metavar="TABLE",
        help="checked case table; cases without a label are passed over",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        required=True,
        metavar="NAME=VALUE",
        help="foreground labels, as in anterior=1 posterior=2",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="TSV", help="table to write")


def run(arguments: argparse.Namespace) -> None:
    """Write the evaluation table and print one line with the mean Dice of each label."""
    labels = labels_from(arguments.labels)
    table = evaluate_masks(arguments.masks, read_table(arguments.cases), labels=labels)
    write_table(table.round(6), arguments.out)
    if table.empty:
        print(f"No case of {arguments.cases} has a label, so nothing was scored.")
        return
    means = table.groupby("label")["dice"].mean()
    listed = ", ".join(f"{name} {100 * means[name]:.1f} %" for name in labels)
    print(f"mean Dice over {table['case'].nunique()} cases: {listed}")
