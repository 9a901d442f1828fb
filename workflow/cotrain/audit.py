"""The audit of a mask set: in, masks, manifests and a person's verdicts; out, what may be learnt.

The audit stands in the stream: a network trains from this table, so that nothing learns from an
unaudited mask. A mask that was edited in place is refused by its hash.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
from medpy.metric.binary import dc

from cotrain.cases import labels_from
from cotrain.errors import InputError
from cotrain.files import read_table, sha256_of, write_json, write_table
from cotrain.nifti import check_same_grid, read_labels, voxel_volume_ml
from cotrain.nnunet import Planned
from cotrain.review import (
    EMPTY,
    LOST,
    OUTLIVED,
    absent_labels,
    labels_lost,
    masks_of,
    read_review,
)
from cotrain.shards import manifests_of

COLUMNS = [
    "case",
    "mask",
    "soft",
    "soft_sha256",
    "accepted",
    "reason",
    "confidence",
    "volume_ml",
    "absent",
    "truth_dice",
]


def verdict_on(case: str, sources: list[str], review: pd.DataFrame) -> dict | None:
    """Return the verdict that decides for a case, or None where nobody judged it.

    sources: the mask sets its teaching mask was made from, as `round-01/pseudo_3d`, and in the end
    the one that teaches. The last verdict on a mask counts. Whoever threw out or replaced the one
    that teaches decides; else, over them all, exclude wins, then replace: a mean with a mask that a
    person threw out is not taught.
    """
    rows = [row for row in review.to_dict("records") if row["case"] == case]
    # Of each mask the last one, in the order of the sources.
    last = {masks_of(row): row for row in rows}
    of_teaching = last.get(sources[-1])
    if of_teaching is not None and of_teaching["verdict"] != "accept":
        return of_teaching
    found = [last[source] for source in sources if source in last]
    for verdict in ("exclude", "replace", "accept"):
        for row in found:
            if row["verdict"] == verdict:
                return row
    return None


def masks_judged(
    review: pd.DataFrame, masks: dict[str, dict[str, str]], before: dict[str, dict]
) -> dict[str, str]:
    """Return the SHA-256 of the mask that each verdict was given on, by the verdict's text.

    masks: mask set as `round-01/pseudo_3d` → case → SHA-256 of the mask now. before: what the last
    audit noted, such `masks` and `verdicts` as are returned here. A verdict not noted there was
    given on what the last audit showed: the masks may have been made anew since, by the command
    that read the verdict.
    """
    judged = {}
    for row in review.to_dict("records"):
        now = masks.get(masks_of(row), {}).get(row["case"])
        if now is not None:
            seen = before["masks"].get(masks_of(row), {}).get(row["case"], now)
            judged[as_text(row)] = before["verdicts"].get(as_text(row), seen)
    return judged


def set_in(folder: Path) -> str:
    """Return the mask set in a folder, named as `masks_of` names that of a verdict."""
    return "/".join(folder.parts[-2:])


def as_text(verdict: dict) -> str:
    """Return all cells of a verdict: with another date it is another one."""
    return "\t".join(verdict.values())


def told_of_replacement(mask: Path, image: str, labels: dict[str, int]) -> dict[str, str]:
    """Return what an audit tells of a mask that a person put in another's place.

    Raises InputError where it is not on the image's grid or holds a value that is no label.
    """
    check_same_grid(image, mask)
    values, affine, _ = read_labels(mask)
    present = set(np.unique(values).tolist())
    unknown = present - {0, *labels.values()}
    if unknown:
        raise InputError(
            f"The corrected mask {mask} holds the values {sorted(unknown)}, wanted 0 for the "
            f"background and {sorted(labels.values())} for the labels; correct it."
        )
    volume_ml = np.count_nonzero(values) * voxel_volume_ml(affine)
    return {
        "confidence": "1.0000",
        "volume_ml": f"{volume_ml:.6g}",
        "absent": absent_labels(present, labels),
    }


def soft_of_replacement(mask: Path, row: dict, planned: Planned, path: Path) -> None:
    """Write a person's corrected mask as a certain soft mask on the preprocessed grid.

    mask: labels on the image's own grid; row: the case's row in the table of cases. nnU-Net's
    preprocessing takes it there as it takes true labels.
    """
    # Heavy imports, and a corrected mask is the exception.
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    from cotrain.masks import write_soft

    images = row["image"].split(";")
    _, labels, _ = DefaultPreprocessor(verbose=False).run_case(
        images, str(mask), planned.manager, planned.configuration("3d"), planned.dataset
    )
    one_hot = np.stack([labels[0] == value for value in range(1, planned.class_count)])
    write_soft(
        one_hot.astype(np.uint8) * 255, path, patch_size=planned.configuration("3d").patch_size
    )


def true_dice(mask: np.ndarray, truth: np.ndarray, labels: dict[str, int]) -> float:
    """Return the Dice of a mask averaged over labels; a label absent from both counts 1.

    mask, truth: `(X, Y, Z)` label values on one grid.
    """
    scores = []
    for value in labels.values():
        ours, theirs = mask == value, truth == value
        scores.append(dc(ours, theirs) if ours.any() or theirs.any() else 1.0)
    return float(np.mean(scores))


def check_unedited(masks: Path, made: dict) -> Path:
    """Return a case's mask file; raises InputError where it is not the one that was made.

    made: the case's row in a manifest of the mask set `masks`.
    """
    mask = masks / made["mask"]
    if not mask.is_file() or sha256_of(mask) != made["mask_sha256"]:
        raise InputError(
            f"{mask} is missing or was edited in place; put the original back (or delete "
            f"{masks / 'manifest-*.tsv'}, and the same command makes this mask again), save the "
            "corrected mask as a new file and register it in review.tsv with the verdict replace."
        )
    return mask


def audit_row(
    made: dict, row: dict, verdict: dict | None, masks: Path, labels: dict[str, int]
) -> dict:
    """Return the audit table's row of one case.

    made: its manifest row; row: its row in the table of unlabelled cases. Raises InputError where
    the mask on disk is not the one that was made, or a replacement does not fit.
    """
    mask = check_unedited(masks, made)
    accepted, reason = True, ""
    is_empty = float(made["volume_ml"]) == 0
    if verdict is not None:
        accepted, reason = verdict["verdict"] != "exclude", verdict["verdict"]
        if verdict.get("by"):
            reason += f" by {verdict['by']}"
        if verdict.get("date"):
            reason += f" {verdict['date']}"
        if verdict["verdict"] == "replace":
            mask = Path(verdict["mask"])
            made = {**made, **told_of_replacement(mask, row["image"].split(";")[0], labels)}
            if float(made["volume_ml"]) == 0:
                # Of a structure that may be missing, but also what a viewer saves by mistake.
                reason += "; the corrected mask is empty, and teaches that nothing is there"
        elif is_empty and accepted and masks_of(verdict) != set_in(masks):
            # Who accepts one of its sources has not seen that the mean is empty.
            accepted, reason = False, f"{EMPTY} ({reason}: one of its sources)"
    elif is_empty:
        accepted, reason = False, EMPTY
    truth_dice = ""
    if row["label"]:
        truth_dice = f"{true_dice(read_labels(mask)[0], read_labels(row['label'])[0], labels):.4f}"
    return {
        "case": made["case"],
        "mask": str(mask),
        "soft": str(masks / made["soft"]),
        "soft_sha256": made["soft_sha256"],
        "accepted": "true" if accepted else "false",
        "reason": reason,
        "confidence": made["confidence"],
        "volume_ml": made["volume_ml"],
        "absent": made.get("absent", ""),
        "truth_dice": truth_dice,
    }


def accepted_in(audit: Path) -> pd.DataFrame:
    """Return the rows of an audit table whose masks teach."""
    table = read_table(audit)
    return table[table["accepted"] == "true"]


def learnt_from(audit: Path) -> str:
    """Return a hash of what a training learns from an audit table: the accepted soft masks.

    Who judged a mask, when and why may change without a word to the network.
    """
    learnt = accepted_in(audit)[["case", "soft_sha256"]]
    return hashlib.sha256(learnt.to_csv(sep="\t", index=False).encode()).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain audit`."""
    parser.add_argument("--masks", type=Path, required=True, help="the mask set that teaches")
    parser.add_argument("--manifests", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--source-masks",
        type=Path,
        nargs="+",
        required=True,
        help="the pseudo-mask sets it was made from, each ending in round-RR/pseudo_2d or _3d",
    )
    parser.add_argument("--cases", type=Path, required=True, help="table of unlabelled cases")
    parser.add_argument("--labels", nargs="+", required=True, metavar="NAME=VALUE")
    parser.add_argument("--preprocessed", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--review", type=Path, help="a person's verdicts")
    parser.add_argument("--out", type=Path, required=True, help="the audit table")


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain audit`."""
    labels = labels_from(arguments.labels)
    # Of older code, some lack a column.
    manifest = pd.concat([read_table(each) for each in arguments.manifests]).fillna("")
    sets = {arguments.masks: manifest.to_dict("records")}
    for folder in set(arguments.source_masks) - {arguments.masks}:
        tables = map(read_table, manifests_of(folder))
        sets[folder] = [made for table in tables for made in table.to_dict("records")]
        for made in sets[folder]:
            check_unedited(folder, made)
    masks = {
        set_in(folder): {made["case"]: made["mask_sha256"] for made in rows}
        for folder, rows in sets.items()
    }
    rows = {row["case"]: row for row in read_table(arguments.cases).to_dict("records")}
    review = read_review(arguments.review, set(rows))
    # Not declared, so that it outlives the table.
    note = arguments.out.with_suffix(".judged.json")
    before = json.loads(note.read_text()) if note.is_file() else {"masks": {}, "verdicts": {}}
    judged = masks_judged(review, masks, before)
    sources = [set_in(folder) for folder in (*arguments.source_masks, arguments.masks)]
    table = []
    for made in manifest.sort_values("case").to_dict("records"):
        verdict = verdict_on(made["case"], sources, review)
        audited = audit_row(made, rows[made["case"]], verdict, arguments.masks, labels)
        if verdict is not None and verdict["verdict"] == "replace":
            soft = arguments.out.parent / f"replaced_{arguments.out.stem}" / made["soft"]
            soft_of_replacement(
                Path(verdict["mask"]),
                rows[made["case"]],
                Planned.read(arguments.preprocessed),
                soft,
            )
            audited |= {"soft": str(soft), "soft_sha256": sha256_of(soft)}
        # A person's own mask, above, is as right as before.
        elif (
            verdict is not None
            and judged[as_text(verdict)] != masks[masks_of(verdict)][made["case"]]
        ):
            audited["reason"] += f"; {OUTLIVED}"
            if audited["accepted"] == "true" and float(audited["volume_ml"]) == 0:
                # Who accepted the one before has not seen that this one is empty.
                audited |= {"accepted": "false", "reason": f"{EMPTY} ({audited['reason']})"}
            print(f"{made['case']}: {audited['reason']}.")
        table.append(audited)
    frame = pd.DataFrame(table, columns=COLUMNS)
    write_json({"masks": masks, "verdicts": judged}, note)
    write_table(frame, arguments.out)
    known = pd.to_numeric(frame["truth_dice"]).dropna()
    print(
        f"{(frame['accepted'] == 'true').sum()} of {len(frame)} masks accepted; mean confidence "
        f"{pd.to_numeric(frame['confidence']).mean():.3f}"
        + (f"; true Dice {known.mean():.4f} over {len(known)} cases" if len(known) else "")
        + "."
    )
    for name in labels_lost(frame):
        print(f"WARNING: {LOST.format(name)}")
