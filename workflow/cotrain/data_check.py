"""Command `check-data`: in, the user's case table; out, the list of a split, or a page on the data.

Every image and label is opened. All problems, of all splits, are collected and end in one error;
only sound data give `labelled.tsv`, `unlabelled.tsv` and `test.tsv`, each by a call of its own
(`--list`), so that a case added to one of them is news to nobody else, and a last one gives
`dataset.tsv` and `dataset_report.html`. What was found in sound files is kept in `work/`, and taken
from there as long as the files have the same size and time of change.
"""

import argparse
import hashlib
import html
import io
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cotrain.cases import SPLITS, cases_of, labels_from, read_cases
from cotrain.errors import InputError
from cotrain.files import write_json, write_table, write_text
from cotrain.nifti import (
    by,
    check_channels,
    check_image,
    check_same_grid,
    orientation,
    read_labels,
    spacing_mm,
    voxel_volume_ml,
)
from cotrain.pictures import along_patient_axes, colour_of, data_address, thumbnail
from cotrain.pool import side_by_side

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PROBLEMS_SHOWN = 20
MAX_UNKNOWN_VALUES = 5
"""In a label file: with more it is an image, or a file of many other labels."""
SECONDS_BETWEEN_SAVES = 60
EXTENT_RATIO = 4
"""A volume so much thinner than every labelled one is a localiser or a lone slice."""
MAX_LABELLED_PICTURES = 60
MAX_UNLABELLED_PICTURES = 6
MAX_SPACING_RATIO = 20
"""Voxels so many times as long as the labelled cases' cannot be meant."""
HIGHEST_AIR = -500
"""Air in CT is below it, and hardly anything in other images."""
SPACING_RATIO = 2
INTENSITY_RATIO = 100
INTENSITIES = ("min", "p00_5", "p50", "p99_5", "max", "mean")
SUMMARISED_INTENSITIES = {
    "p00_5": "0.5th percentile",
    "p50": "median",
    "p99_5": "99.5th percentile",
}
POOL_TRAIN_ONLY = "Pseudo-masks are made for the unlabelled cases only (pool: train_only)."
POOL_TRANSDUCTIVE = (
    "Pseudo-masks are made for the unlabelled and for the test cases (pool: transductive): the "
    "networks see test images, never their labels, so scores are not those of unseen cases."
)
SPLIT_COLOURS = {"labelled": "#0072b2", "unlabelled": "#e69f00", "test": "#777777"}


@dataclass
class Case:
    """What was found in the files of a case; where there are problems, what could be found."""

    name: str
    split: str
    problems: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    spacing_ras_mm: tuple[float, ...] = ()
    orientation: str = ""
    has_orientation_code: bool = True
    voxels_hash: str = ""
    intensities: list[dict[str, float]] = field(default_factory=list)
    volumes_ml: dict[str, float] | None = None
    unknown_values: dict[int, str] = field(default_factory=dict)
    has_single_slices: bool = False
    """Whether most slices of the label, along an axis, have none on the slice before or after."""
    picture: str | None = None
    """Three slices as a data address."""


def examined(task: tuple[dict[str, str], bool], *, labels: Mapping[str, int]) -> Case:
    """Open the files of a case; the task is a row of the case table and whether to draw it.

    Problems with a file become sentences in `Case.problems`; nothing is raised for them.
    """
    row, wants_picture = task
    case = Case(name=row["case"], split=row["split"])

    def tried(function: Callable[..., Any], *paths: str) -> Any:
        try:
            return function(*paths)
        except InputError as error:
            case.problems.append(f"case {case.name}: {error}")
            return None

    channels = row["image"].split(";")
    first = tried(check_image, channels[0])
    digest = hashlib.blake2b(digest_size=16)
    if first is not None:
        array, affine, header = first
        case.shape = array.shape
        case.spacing_mm = spacing_mm(affine)
        image = along_patient_axes(array, affine)
        case.spacing_ras_mm = image.spacing_mm
        case.orientation = orientation(affine)
        case.has_orientation_code = bool(header["sform_code"] > 0 or header["qform_code"] > 0)
        _add_channel(case, array, digest)
    for path in channels[1:]:
        channel = tried(check_image, path)
        if channel is not None:
            _add_channel(case, channel[0], digest)
            if first is not None:
                tried(check_channels, channels[0], path)
    values = None
    if row["label"]:
        label = tried(read_labels, row["label"])
        if label is not None:
            values, label_affine, _ = label
            _add_volumes(case, values, row["label"], voxel_volume_ml(label_affine), labels)
            if first is not None:
                tried(check_same_grid, channels[0], row["label"])
    if not case.problems:
        case.voxels_hash = digest.hexdigest()
        if wants_picture:
            shown = values if case.split == "labelled" else np.zeros(array.shape, np.uint8)
            case.picture = data_address(thumbnail(image, along_patient_axes(shown, affine).array))
    return case


def _first_and_more(cases: Sequence[Case]) -> str:
    """Return the name of the first case that has a problem, and how many more there are."""
    others = f" (and {len(cases) - 1} more cases)" if len(cases) > 1 else ""
    return f"case {cases[0].name}{others}"


def problems_of(cases: Sequence[Case], labels: Mapping[str, int]) -> list[str]:
    """Return every problem as a sentence: those of the whole set first, as they explain others."""
    problems = []
    known = ", ".join(["background=0", *(f"{name}={value}" for name, value in labels.items())])
    many = [case for case in cases if len(case.unknown_values) > MAX_UNKNOWN_VALUES]
    if many:
        values = many[0].unknown_values
        some = ", ".join(map(str, sorted(values)[:3]))
        problems.append(
            f"{_first_and_more(many)}: {next(iter(values.values()))} holds {len(values)} "
            f"values that are not among the labels {known}, such as {some}; give the label's path "
            "if it is an image, and else renumber the labels 1, 2, 3 ... without gaps and name "
            "them in the settings, or merge or remove them."
        )
    few = [case for case in cases if len(case.unknown_values) <= MAX_UNKNOWN_VALUES]
    for value in sorted({value for case in few for value in case.unknown_values}):
        holders = [case for case in few if value in case.unknown_values]
        remedy = (
            "add it to the settings, or correct the file"
            if value == len(labels) + 1
            else "renumber it in the file (values are 1, 2, 3 ... without gaps), or remove it"
        )
        problems.append(
            f"{_first_and_more(holders)}: {holders[0].unknown_values[value]} holds the label "
            f"value {value}, and the known labels are {known}; {remedy}."
        )
    labelled = [case for case in cases if case.split == "labelled"]
    flat = [case for case in labelled if case.shape and min(case.shape) == 1]
    if flat:
        problems.append(
            f"{_first_and_more(flat)}: the image is a single slice, of "
            f"{' x '.join(map(str, flat[0].shape))} voxels; give volumes, which nnU-Net plans 3D "
            "patches by."
        )
    # a label file that could not be read may hold the label that seems to be missing
    if all(case.volumes_ml is not None for case in labelled):
        for name, value in labels.items():
            if not any(case.volumes_ml[name] > 0 for case in labelled):
                problems.append(
                    f"the label {name} (value {value}) is in none of the {len(labelled)} labelled "
                    "cases; remove it from the settings, or label a case that has it."
                )
    seen: dict[str, Case] = {}
    for case in cases:
        twin = seen.setdefault(case.voxels_hash, case) if case.voxels_hash else case
        if twin is not case:
            problems.append(
                f"{twin.split} case {twin.name} and {case.split} case {case.name} hold the same "
                "voxels; remove one of them from the table."
            )
    problems += [problem for case in cases for problem in case.problems]
    return problems + _problems_of_sizes([case for case in cases if case.shape])


def _problems_of_sizes(cases: Sequence[Case]) -> list[str]:
    """Return sentences on images of which nothing is left at the labelled ones' voxel size.

    Or which have voxels so large that they cannot be meant, as where a header is in another unit.
    """
    labelled = [case for case in cases if case.split == "labelled"]
    if not labelled:
        return []
    usual = np.median([case.spacing_mm for case in labelled], axis=0)
    usual_ras = np.median([case.spacing_ras_mm for case in labelled], axis=0)
    sentences = (
        problem_of_size(case, usual, times_as_long=(case.spacing_ras_mm / usual_ras).max())
        for case in cases
    )
    return [sentence for sentence in sentences if sentence]


def problem_of_size(case: Case, usual: np.ndarray, *, times_as_long: float) -> str | None:
    """Return a sentence where nothing is left of an image, or its voxel size cannot be meant.

    usual: voxel size of labelled cases in mm, along the array's axes as the case's own is.
    times_as_long: the case's voxels as a multiple of the labelled cases', where it is largest.
    """
    # nnU-Net rounds a half to nothing.
    is_nothing = (case.shape * (case.spacing_mm / usual)).min() <= 0.5
    if not is_nothing and times_as_long <= MAX_SPACING_RATIO:
        return None
    so = "so that nothing is left of it at their voxel size; " if is_nothing else ""
    return (
        f"case {case.name}: the image has {by(case.shape)} voxels of {by(case.spacing_mm)} mm, and "
        f"labelled cases have voxels of {by(usual)} mm (median), {so}leave the case out, or "
        "correct the voxel size in its header if it is wrong."
    )


def warnings_of(cases: Sequence[Case], channels: Sequence[str] = ()) -> list[str]:
    """Return sentences about what is allowed in a data set but often a mistake.

    channels: their names in the settings, where known.
    """
    warnings = []
    for number, name in enumerate(channels):
        if name.casefold() == "nonorm":
            continue
        begin = {case.name: case.intensities[number]["p00_5"] for case in cases}
        as_ct = [case for case, low in begin.items() if low < HIGHEST_AIR]
        others = [case for case, low in begin.items() if low >= HIGHEST_AIR]
        if as_ct and others:
            warnings.append(
                f"Channel {number} ({name}) begins as CT does, below {HIGHEST_AIR}, in "
                f"{len(as_ct)} cases (such as {as_ct[0]}) and above it in {len(others)} (such as "
                f"{others[0]}): 0.5th percentiles. Unless those are CT without air around the "
                "body, leave one kind of image out."
            )
        elif as_ct and name.casefold() != "ct":
            warnings.append(
                f"Channel {number} is called {name}, but begins below {HIGHEST_AIR} (0.5th "
                "percentile), as CT does; if it is CT, call it CT in `channels`, so that nnU-Net "
                "normalises the intensities of all images in the same way."
            )
        elif others and name.casefold() == "ct":
            low = min(begin.values())
            warnings.append(
                f"Channel {number} is called CT, but no case begins below {low:.0f} (0.5th "
                "percentile), where air is; unless it is CT without air around the body, give it "
                "another name in `channels`: nnU-Net normalises CT by the labelled cases' "
                "intensities."
            )
    orientations = Counter(case.orientation for case in cases)
    if len(orientations) > 1:
        found = ", ".join(
            f"{count} {name} (such as {_first_of(cases, name)})"
            for name, count in orientations.most_common()
        )
        warnings.append(
            f"Mixed orientations: {found}. Networks see arrays as they are stored, so anatomy is "
            "mirrored or turned between these cases; reorient all images and labels to one, e.g. "
            "with nibabel.as_closest_canonical."
        )
    without = [case.name for case in cases if not case.has_orientation_code]
    if without:
        warnings.append(
            f"{len(without)} images say nothing about their orientation (sform and qform code 0), "
            f"such as {without[0]}; check by eye that left and right are as in the others."
        )
    for axis, name in enumerate(("left-right", "posterior-anterior", "inferior-superior")):
        low, high = _extremes(cases, lambda case, axis=axis: case.spacing_ras_mm[axis])
        if high.spacing_ras_mm[axis] > SPACING_RATIO * low.spacing_ras_mm[axis]:
            warnings.append(
                f"Voxel sizes {name} range from {low.spacing_ras_mm[axis]:.3g} mm ({low.name}) to "
                f"{high.spacing_ras_mm[axis]:.3g} mm ({high.name}); all cases are resampled to "
                "one size, which makes up or throws away detail in some."
            )
    for channel in range(len(cases[0].intensities)):
        low, high = _extremes(cases, lambda case, channel=channel: _range(case, channel))
        if _range(high, channel) > INTENSITY_RATIO * _range(low, channel):
            warnings.append(
                f"Intensities of channel {channel} span {_range(low, channel):.3g} in {low.name} "
                f"and {_range(high, channel):.3g} in {high.name} (0.5th to 99.5th percentile); "
                "harmless where each image is z-scored by itself (MRI), a wrong unit in CT."
            )
    extents = {
        case.name: min(size * mm for size, mm in zip(case.shape, case.spacing_mm, strict=True))
        for case in cases
    }
    least = min(extents[case.name] for case in cases if case.split == "labelled") / EXTENT_RATIO
    thin = [case.name for case in cases if extents[case.name] < least]
    if thin:
        warnings.append(
            f"{len(thin)} images are less than a quarter as thick as every labelled one, such as "
            f"{thin[0]} ({extents[thin[0]]:.3g} mm); take localisers and lone slices out of the "
            "case table."
        )
    empty = [case.name for case in cases if case.volumes_ml and not any(case.volumes_ml.values())]
    if empty:
        warnings.append(
            f"{len(empty)} cases have a label file without any foreground, such as {empty[0]}; "
            "check that this is meant."
        )
    sparse = [case.name for case in cases if case.has_single_slices and case.split == "labelled"]
    if sparse:
        warnings.append(
            f"{len(sparse)} labelled cases have a label on single slices, with none on the slices "
            f"beside them, such as {sparse[0]}; check that no slice was left out, because what is "
            "left out is taught as background."
        )
    unscored = [case.name for case in cases if case.split == "test" and case.volumes_ml is None]
    if unscored:
        warnings.append(
            f"{len(unscored)} test cases have no label and cannot be scored, such as {unscored[0]}."
        )
    return warnings


def dataset_table(cases: Sequence[Case], labels: Mapping[str, int]) -> pd.DataFrame:
    """Return one row a case, all text: geometry, intensities (`;` between channels), volumes."""
    rows = []
    for case in cases:
        row = {
            "case": case.name,
            "split": case.split,
            "shape": by(case.shape),
            "spacing_mm": by(case.spacing_mm),
            "orientation": case.orientation,
        }
        for name in INTENSITIES:
            row[f"intensity_{name}"] = ";".join(f"{each[name]:.6g}" for each in case.intensities)
        for name in labels:
            row[f"volume_ml_{name}"] = (
                "" if case.volumes_ml is None else f"{case.volumes_ml[name]:.6g}"
            )
        rows.append(row)
    return pd.DataFrame(rows)


def summary_table(cases: Sequence[Case], labels: Mapping[str, int]) -> pd.DataFrame:
    """Return one column a split, one row a property, all text: `median (min to max)`."""
    columns = {}
    for split in SPLITS:
        own = [case for case in cases if case.split == split]
        with_label = [case for case in own if case.volumes_ml is not None]
        column = {"cases": str(len(own)), "with a label file": str(len(with_label))}
        for axis, name in enumerate("XYZ"):
            column[f"voxels along {name}"] = _spread(case.shape[axis] for case in own)
        for axis, name in enumerate("XYZ"):
            column[f"voxel size {name} (mm)"] = _spread(case.spacing_mm[axis] for case in own)
        column["orientation"] = ", ".join(
            f"{name} ({count})" for name, count in Counter(c.orientation for c in own).most_common()
        )
        for channel in range(len(cases[0].intensities)):
            for name, words in SUMMARISED_INTENSITIES.items():
                column[f"channel {channel}, {words}"] = _spread(
                    case.intensities[channel][name] for case in own
                )
        for name in labels:
            column[f"{name} (ml)"] = _spread(case.volumes_ml[name] for case in with_label)
        columns[split] = column
    return pd.DataFrame(columns)


def report_page(
    cases: Sequence[Case],
    labels: Mapping[str, int],
    warnings: Sequence[str],
    *,
    title: str,
    transductive: bool,
) -> str:
    """Return the page about a data set: HTML with its style and pictures inside."""
    pool = POOL_TRANSDUCTIVE if transductive else POOL_TRAIN_ONLY
    colours = {name: colour_of(value) for name, value in labels.items()}
    legend = " ".join(
        f'<span class="key" style="background:{colour}"></span>{html.escape(name)}'
        for name, colour in colours.items()
    )
    noted = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings)
    drawn = {
        split: [case for case in cases if case.split == split and case.picture] for split in SPLITS
    }
    n_labelled = sum(case.split == "labelled" for case in cases)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
  padding: 0 1em; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.15em; margin-top: 2em; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .2em .8em; text-align: right; }}
tbody th {{ text-align: left; font-weight: normal; }}
tbody tr:nth-child(odd) {{ background: #f4f4f4; }}
.warnings {{ background: #fff6dd; border-left: 4px solid #e69f00; padding: .5em 1em .5em 2em; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 12px; }}
figure {{ margin: 0; }} figcaption {{ font-size: .8em; color: #555; overflow-wrap: anywhere; }}
.tiles img {{ width: 100%; background: #000; }} .plot {{ max-width: 100%; }}
.key {{ display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; }}
.note {{ color: #555; }}
</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{len(cases)} cases were opened and are sound. Every case's numbers are in dataset.tsv.
{pool}</p>
<h2>Warnings</h2>
{f'<ul class="warnings">{noted}</ul>' if warnings else "<p>None.</p>"}
<h2>Summary by split</h2>
<p class="note">Median (smallest to largest).</p>
{summary_table(cases, labels).to_html(border=0)}
<h2>Label volumes</h2>
<img class="plot" alt="histogram of label volumes" src="{_png(_volume_plot(cases, labels))}">
<h2>Intensities</h2>
<p class="note">A line a case from the 0.5th to the 99.5th percentile, a dot at the median.</p>
<img class="plot" alt="intensity range of each case" src="{_png(_intensity_plot(cases))}">
<h2>Labelled cases</h2>
<p class="note">The slices with the most foreground in the three directions; the patient's right is
marked R ({len(drawn["labelled"])} of {n_labelled} cases). {legend}</p>
<div class="tiles">{"".join(map(_tile, drawn["labelled"]))}</div>
<h2>Some unlabelled cases</h2>
<p class="note">The middle slices. Test cases are not shown.</p>
<div class="tiles">{"".join(map(_tile, drawn["unlabelled"]))}</div>
</body>
</html>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check-data`."""
    parser.add_argument("--cases", type=Path, required=True, help="the user's case table")
    parser.add_argument(
        "--data-folder",
        type=Path,
        metavar="DIR",
        help="where relative paths in the table start; without it, the table's own folder",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        required=True,
        metavar="NAME=VALUE",
        help="every label in the files, without the background 0",
    )
    parser.add_argument(
        "--channels", nargs="+", default=[], metavar="NAME", help="the channels' names, to look at"
    )
    parser.add_argument(
        "--transductive",
        action="store_true",
        help="count test images, without their labels, as unlabelled ones, too, and say so",
    )
    parser.add_argument(
        "--list",
        choices=SPLITS,
        help="write the list of this split; without it, the table of all cases and the page",
    )
    parser.add_argument(
        "--fingerprint",
        default="",
        help="written into the list as a comment: a list of other files is another list",
    )
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for tables and page")
    parser.add_argument("--jobs", type=int, default=1, help="cases opened side by side")


def run(arguments: argparse.Namespace) -> None:
    """Check a data set and write what is asked for; raises InputError with all problems."""
    labels = labels_from(arguments.labels)
    table = read_cases(arguments.cases, arguments.data_folder)
    out_dir = arguments.out_dir
    cases = _known_or_examined(table, labels, out_dir / "work" / "found.json", jobs=arguments.jobs)
    refuse(problems_of(cases, labels), where=f"the data of {arguments.cases}")
    if arguments.channels and len(arguments.channels) != len(cases[0].intensities):
        raise InputError(
            f"--channels names {len(arguments.channels)} channels, and the images have "
            f"{len(cases[0].intensities)}; name each once."
        )
    warnings = warnings_of(cases, arguments.channels)
    for warning in warnings:
        print(f"warning: {warning}")
    if arguments.list:
        rows = cases_of(table, arguments.list, transductive=arguments.transductive)
        path = out_dir / f"{arguments.list}.tsv"
        # What follows is made anew where a list is another one, also if a file was corrected.
        comment = f"# files: {arguments.fingerprint}\n" if arguments.fingerprint else ""
        write_text(comment + rows.to_csv(sep="\t", index=False), path)
        print(f"{len(cases)} cases are sound, warnings: {len(warnings)}; {len(rows)} are in {path}")
        return
    write_table(dataset_table(cases, labels), out_dir / "dataset.tsv")
    page = report_page(
        cases,
        labels,
        warnings,
        title=f"Data of {arguments.cases.name}",
        transductive=arguments.transductive,
    )
    write_text(page, out_dir / "dataset_report.html")
    counts = ", ".join(f"{(table['split'] == split).sum()} {split}" for split in SPLITS)
    print(f"{counts}: all sound, warnings: {len(warnings)}; see {out_dir / 'dataset_report.html'}")


def _known_or_examined(
    table: pd.DataFrame, labels: Mapping[str, int], kept: Path, *, jobs: int
) -> list[Case]:
    """Return every case of the table, in its order; open only what is not in the file `kept`."""
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    tasks = _tasks_of(table)
    stamps = [_stamp(*task, labels) for task in tasks]
    new = [
        task
        for task, stamp in zip(tasks, stamps, strict=True)
        if known.get(task[0]["case"], {}).get("stamp") != stamp
    ]
    stamp_of = {row["case"]: stamp for (row, _), stamp in zip(tasks, stamps, strict=True)}
    sound = {name: found for name, found in known.items() if found["stamp"] == stamp_of.get(name)}
    cases = {name: Case(**found["found"]) for name, found in sound.items()}
    saved = time.monotonic()
    for case in all_examined(new, labels, jobs=jobs):
        cases[case.name] = case
        # Problems are looked at again each time: their sentences are those of today's files.
        if not case.problems and not case.unknown_values:
            sound[case.name] = {"stamp": stamp_of[case.name], "found": asdict(case)}
        # Thousands of cases take hours; what a killed check has opened is not opened again.
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            write_json(sound, kept)
            saved = time.monotonic()
    if new:
        write_json(sound, kept)
    return [cases[row["case"]] for row, _ in tasks]


def _stamp(row: dict[str, str], wants_picture: bool, labels: Mapping[str, int]) -> str:
    """Return a text that is another one where anything is that `examined` depends on."""
    paths = [*row["image"].split(";"), *([row["label"]] if row["label"] else [])]
    files = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]
    kinds = [each.name for each in fields(Case)]
    return json.dumps([row["split"], wants_picture, dict(labels), files, kinds])


def refuse(problems: Sequence[str], *, where: str) -> None:
    """Raise InputError with the problems of some data, where there are any."""
    if not problems:
        return
    shown = problems[:MAX_PROBLEMS_SHOWN]
    more = f"\n  ... and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    raise InputError(
        f"{len(problems)} problem{'s' * (len(problems) > 1)} in {where}; mend and run again:"
        + "".join(f"\n  - {problem}" for problem in shown)
        + more
    )


def _tasks_of(table: pd.DataFrame) -> list[tuple[dict[str, str], bool]]:
    """Return each row of the table, in its order, and whether to draw it."""
    room = {"labelled": MAX_LABELLED_PICTURES, "unlabelled": MAX_UNLABELLED_PICTURES, "test": 0}
    number_in_split = table.groupby("split").cumcount()
    wants_picture = number_in_split < table["split"].map(room)
    return list(zip(table.to_dict("records"), map(bool, wants_picture), strict=True))


def all_examined(
    tasks: Sequence[tuple[dict[str, str], bool]], labels: Mapping[str, int], *, jobs: int
) -> Iterator[Case]:
    """Yield the cases of all tasks in their order, keeping a progress line on stderr."""
    examine = partial(examined, labels=labels)
    if jobs == 1:
        yield from _with_progress(map(examine, tasks), len(tasks))
        return
    yield from _with_progress(side_by_side(examine, tasks, jobs=jobs, chunksize=4), len(tasks))


def _with_progress(cases: Iterable[Case], total: int) -> Iterator[Case]:
    """Pass cases through; say on stderr, about every tenth, how many are done and what is left."""
    started = time.monotonic()
    faulty = 0
    step = math.ceil(total / 10)
    for done, case in enumerate(cases, start=1):
        faulty += bool(case.problems or case.unknown_values)
        if done % step == 0 or done == total:
            left = (time.monotonic() - started) / done * (total - done)
            print(
                f"checked {done}/{total} cases, {faulty} with problems, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
        yield case


def _add_channel(case: Case, array: np.ndarray, digest: "hashlib._Hash") -> None:
    """Add a channel's intensities to a case and its voxels to the digest."""
    # nibabel's arrays are in Fortran order; any other order than theirs costs a slow copy
    low, middle, high = np.percentile(array.ravel(order="K"), (0.5, 50, 99.5))
    found = (array.min(), low, middle, high, array.max(), array.mean(dtype=np.float64))
    case.intensities.append(dict(zip(INTENSITIES, map(float, found), strict=True)))
    digest.update(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array.T))


def _add_volumes(
    case: Case, values: np.ndarray, path: str, voxel_ml: float, labels: Mapping[str, int]
) -> None:
    """Add the labels' volumes to a case, and the values that belong to no label."""
    counts = zip(*np.unique(values.ravel(order="K"), return_counts=True), strict=True)
    found = {int(value): int(count) for value, count in counts}
    case.volumes_ml = {name: found.pop(value, 0) * voxel_ml for name, value in labels.items()}
    case.unknown_values = {value: path for value in found if value != 0}
    case.has_single_slices = any(
        _are_mostly_single(values.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))
    )


def _are_mostly_single(has_label: np.ndarray) -> bool:
    """Return whether of two or more slices with a label most have no neighbour with it."""
    beside = np.pad(has_label, 1)
    single = has_label & ~beside[:-2] & ~beside[2:]
    return has_label.sum() >= 2 and 2 * single.sum() > has_label.sum()


def _tile(case: Case) -> str:
    """Return the figure element of a case that was drawn."""
    caption = html.escape(case.name)
    return (
        f'<figure><img alt="three slices of {caption}" src="{case.picture}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _volume_plot(cases: Sequence[Case], labels: Mapping[str, int]) -> "Figure":
    """Return a histogram of each label's volume, the splits stacked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * min(len(labels), 3), 2.8 * math.ceil(len(labels) / 3)), dpi=100)
    grid = figure.subplots(math.ceil(len(labels) / 3), min(len(labels), 3), squeeze=False)
    for axes in grid.flat[len(labels) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, labels, strict=False):
        volumes = {
            split: [c.volumes_ml[name] for c in cases if c.split == split and c.volumes_ml]
            for split in SPLITS
        }
        shown = [split for split in SPLITS if volumes[split]]
        axes.hist(
            [volumes[split] for split in shown], bins=20, stacked=True, label=shown,
            color=[SPLIT_COLOURS[split] for split in shown],
        )  # fmt: skip
        axes.set(title=name, xlabel="volume (ml)", ylabel="cases")
    grid.flat[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _intensity_plot(cases: Sequence[Case]) -> "Figure":
    """Return each case's intensity range as a line, a panel a channel."""
    from matplotlib.figure import Figure

    channels = len(cases[0].intensities)
    figure = Figure(figsize=(10, 2.8 * channels), dpi=100)
    for channel, axes in enumerate(figure.subplots(channels, 1, squeeze=False).flat):
        place = 0
        for split in SPLITS:
            own = [case.intensities[channel] for case in cases if case.split == split]
            places = np.arange(place, place + len(own))
            place += len(own)
            colour = SPLIT_COLOURS[split]
            axes.vlines(places, [c["p00_5"] for c in own], [c["p99_5"] for c in own], colour)
            axes.plot(places, [c["p50"] for c in own], ".", color=colour, label=split, ms=4)
        ranges = [_range(case, channel) for case in cases]
        if max(ranges) > INTENSITY_RATIO * min(ranges):
            axes.set_yscale("symlog", linthresh=max(np.median(ranges) / INTENSITY_RATIO, 1e-6))
        axes.set(xlabel="case, in the order of the table by split", ylabel=f"channel {channel}")
    figure.axes[0].legend(frameon=False, fontsize=8, ncols=3)
    figure.tight_layout()
    return figure


def _png(figure: "Figure") -> str:
    """Return a figure as a data address, so that the page needs no other file."""
    stored = io.BytesIO()
    figure.savefig(stored, format="png")
    return data_address(stored.getvalue())


def _range(case: Case, channel: int) -> float:
    """Return the distance between the 0.5th and 99.5th percentile of a channel's intensities."""
    return case.intensities[channel]["p99_5"] - case.intensities[channel]["p00_5"]


def _extremes(cases: Sequence[Case], key: Callable[[Case], float]) -> tuple[Case, Case]:
    """Return the cases with the smallest and the largest value."""
    return min(cases, key=key), max(cases, key=key)


def _first_of(cases: Sequence[Case], orientation_name: str) -> str:
    """Return the name of the first case with an orientation."""
    return next(case.name for case in cases if case.orientation == orientation_name)


def _spread(values: Iterable[float]) -> str:
    """Return `median (min to max)`, one number if all are equal, or a dash if there are none."""
    values = np.array(list(values), dtype=float)
    if not values.size:
        return "–"
    if np.ptp(values) <= 1e-4 * abs(values[0]):
        return f"{values[0]:.4g}"
    return f"{np.median(values):.4g} ({values.min():.4g} to {values.max():.4g})"
