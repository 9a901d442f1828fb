"""A person's review of masks: in, a table of verdicts; out, its rows, which can be followed.

Imported by the Snakefile, so nothing heavier than pandas is imported here.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd

from cotrain.errors import InputError
from cotrain.files import read_table

COLUMNS = ["case", "round", "masks", "verdict", "mask"]
MASKS = ("pseudo_2d", "pseudo_3d", "teacher_2d", "teacher_3d")
VERDICTS = ("accept", "exclude", "replace")
EMPTY = "the mask is empty"
"""What an audit says of an empty mask that does not teach, as nobody accepted that very mask."""
OUTLIVED = "given on an earlier mask of this case, look again"
"""What an audit says of a verdict whose mask was made anew since."""

LOST = (
    "the label {} is in none of the masks that teach, and networks that are taught so unlearn it; "
    "look at the masks, and exclude them or train longer on labels before masks teach"
)
"""What is said of a label in `labels_lost`."""


def absent_labels(present: Collection[int], labels: Mapping[str, int]) -> str:
    """Return the names of labels whose value is not present in a mask, separated by `;`."""
    return ";".join(name for name, value in labels.items() if value and value not in present)


def labels_lost(audit: pd.DataFrame) -> list[str]:
    """Return the names of labels that are in none of an audit's masks that teach."""
    teach = audit[audit["accepted"] == "true"]
    absent = [set(names.split(";")) - {""} for names in teach.get("absent", [])]
    return sorted(set.intersection(*absent)) if absent else []


def masks_of(verdict: Mapping[str, str]) -> str:
    """Return the mask set that a verdict is about, as `round-01/pseudo_3d`."""
    return f"round-{verdict['round']:0>2}/{verdict['masks']}"


def read_review(path: Path | None, cases: Collection[str]) -> pd.DataFrame:
    """Return a person's verdicts with COLUMNS and others, all text; none where `path` is None.

    The column `mask` may be missing, where nothing is replaced.

    cases: the unlabelled ones. Raises InputError on a missing column, on a case, masks or verdict
    that there is not, or on a replacement without an existing mask file.
    """
    if path is None:
        return pd.DataFrame(columns=COLUMNS)
    review = read_table(path)
    if "mask" not in review:
        # Whoever only excludes and accepts has no use for it.
        review["mask"] = ""
    missing = [name for name in COLUMNS if name not in review]
    if missing:
        raise InputError(
            f"{path} lacks the columns {', '.join(missing)}; wanted {', '.join(COLUMNS)} (see "
            "results/README.md)."
        )
    for row in review.to_dict("records"):
        if row["case"] not in cases:
            raise InputError(
                f"{path} judges the case {row['case']!r}, which is not among the unlabelled "
                "cases; correct its name, or remove the row where the case has a label now or was "
                "taken out of the case table."
            )
        for column, known in (("masks", MASKS), ("verdict", VERDICTS)):
            if row[column] not in known:
                raise InputError(
                    f"{path}, case {row['case']}: the column `{column}` has {row[column]!r}, "
                    f"wanted one of {', '.join(known)}; correct it, or it would go unheard."
                )
        # Snakemake takes a missing input for one that is not needed any more.
        if row["verdict"] == "replace" and not os.path.isfile(row["mask"]):
            raise InputError(
                f"{path}, case {row['case']}: the corrected mask {row['mask']!r} does not exist in "
                f"{os.getcwd()}; give the path of a new file beside the original."
            )
    return review
