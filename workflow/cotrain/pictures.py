"""Pictures of masks on images: in, NIfTI files and an audit table; out, a PNG or one HTML page.

Volumes are turned to the patient's axes first, so arrays here are `(X, Y, Z)` towards right, front
and head (RAS), and are shown as radiologists look at them, the patient's right on the left. Slice
numbers count from 1 along those axes. All views of a case have one scale in mm.
"""

import argparse
import base64
import html
import io
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import nibabel
import numpy as np
import pandas as pd

from cotrain.cases import labels_from
from cotrain.errors import InputError
from cotrain.files import read_table, write_atomically, write_text
from cotrain.nifti import check_image, check_same_grid, read_labels, spacing_mm
from cotrain.review import LOST, labels_lost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VIEWS = {"axial": 2, "coronal": 1, "sagittal": 0}
"""Name of a view → the axis it cuts."""
LABEL_COLOURS = ("#ff453a", "#32d74b", "#0a84ff", "#ffd60a", "#bf5af2", "#64d2ff")
TRUTH_COLOUR = "white"
MONTAGE_INCHES = 9.0
THUMBNAIL_INCHES, THUMBNAIL_DPI = 6.0, 90
AROUND_MASKS_MM = 20
"""How far around the masks the grey scale looks: air and bone would take most of a whole CT's."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 sans-serif; margin: 2em; color: #1c1c1e; }}
table {{ border-collapse: collapse; }}
th {{ position: sticky; top: 0; background: white; }}
th, td {{ text-align: left; padding: .4em .8em; border-bottom: 1px solid #d1d1d6; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
td.files {{ font: 12px monospace; overflow-wrap: anywhere; max-width: 24em; }}
tr.refused {{ background: #fdeceb; }}
img {{ display: block; }}
</style>
<h1>{title}</h1>
<p>{introduction}</p>
<table>
<tr>{headings}</tr>
{rows}
</table>
</html>
"""
HEADINGS = (
    "mask",
    "case",
    "confidence",
    "volume, ml",
    "accepted",
    "true Dice",
    "open in ITK-SNAP",
)


class Volume(NamedTuple):
    """An array `(X, Y, Z)` along the patient's axes (RAS) and its voxel's edges in mm."""

    array: np.ndarray
    spacing_mm: tuple[float, ...]


# ---------------------------------------------------------------------------------- reading


def along_patient_axes(array: np.ndarray, affine: np.ndarray) -> Volume:
    """Return `array`, on the grid of `affine`, with its axes flipped and swapped nearest to RAS."""
    turns = nibabel.io_orientation(affine)
    edges = np.empty(3)
    edges[turns[:, 0].astype(int)] = spacing_mm(affine)
    return Volume(nibabel.apply_orientation(array, turns), tuple(edges))


def read_image(path: str | Path) -> Volume:
    """Return an image; InputError where it is not sound."""
    array, affine, _ = check_image(path)
    return along_patient_axes(array, affine)


def read_mask(path: str | Path, *, image_path: str | Path) -> np.ndarray:
    """Return the label values `(X, Y, Z)` of a mask; InputError where it is not on its image."""
    check_same_grid(image_path, path)
    array, affine, _ = read_labels(path)
    return along_patient_axes(array, affine).array


# ---------------------------------------------------------------------------------- drawing


def best_slice(mask: np.ndarray, *, axis: int) -> int:
    """Return the index along `axis` with the most foreground; the middle of an empty mask."""
    others = tuple(other for other in range(mask.ndim) if other != axis)
    foreground = np.count_nonzero(mask, axis=others)
    return int(foreground.argmax()) if foreground.any() else mask.shape[axis] // 2


def grey_range(image: Volume, masks: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the intensities shown as black and white, for all of these masks `(X, Y, Z)` alike.

    They are the 0.5th and 99.5th percentile in the box around all foreground and AROUND_MASKS_MM
    beyond it, of the whole image where all masks are empty.
    """
    foreground = np.any([mask > 0 for mask in masks], axis=0)
    box = []
    for axis, edge_mm in enumerate(image.spacing_mm):
        others = tuple(other for other in range(foreground.ndim) if other != axis)
        (found,) = np.nonzero(foreground.any(axis=others))
        around = round(AROUND_MASKS_MM / edge_mm)
        if found.size:
            box.append(slice(max(0, found[0] - around), found[-1] + around + 1))
    darkest, brightest = np.percentile(image.array[tuple(box)], (0.5, 99.5))
    return float(darkest), float(brightest)


def colour_of(value: int) -> str:
    """Return the colour in which a label of this value is drawn."""
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS)]


def montage(
    image: Volume,
    masks: Mapping[str, np.ndarray],
    *,
    labels: Mapping[str, int],
    title: str,
    truth: np.ndarray | None = None,
) -> "Figure":
    """Return one case's masks, a row each with its name, on three slices of the image.

    The slices are those with the most foreground in the last mask. Masks and `truth` are label
    values `(X, Y, Z)` on the image's grid, of which the legend has the names.
    """
    from matplotlib.lines import Line2D

    names = list(masks)
    widths, height = _columns_mm(image)
    inches_per_mm = MONTAGE_INCHES / sum(widths)
    figure, panels = _panels(
        rows=len(masks), widths=widths, inches=(MONTAGE_INCHES, height * inches_per_mm + 0.15)
    )
    slices = {view: best_slice(masks[names[-1]], axis=axis) for view, axis in VIEWS.items()}
    shown = [*masks.values(), *([] if truth is None else [truth])]
    greys = grey_range(image, shown)
    for name, row in zip(names, panels, strict=True):
        _draw_views(row, image, masks[name], truth=truth, slices=slices, greys=greys)
        row[0].set_ylabel(name, fontsize=12)
    for axes, (view, axis) in zip(panels[0], VIEWS.items(), strict=True):
        axes.set_title(f"{view}, slice {slices[view] + 1} of {image.array.shape[axis]}")
    lines = {name: colour_of(value) for name, value in labels.items()}
    if truth is not None:
        lines["truth"] = TRUTH_COLOUR
    figure.legend(
        [Line2D([], [], color=colour, linewidth=3) for colour in lines.values()],
        list(lines),
        loc="outside lower center",
        ncols=len(lines),
        facecolor="0.8",
    )
    figure.suptitle(f"{title} (the patient's right is marked R)", fontsize=12)
    return figure


def thumbnail(image: Volume, mask: np.ndarray, *, truth: np.ndarray | None = None) -> bytes:
    """Return three slices of a case with its mask's outline as the bytes of a PNG."""
    widths, height = _columns_mm(image)
    inches_per_mm = THUMBNAIL_INCHES / sum(widths)
    figure, panels = _panels(
        rows=1, widths=widths, inches=(THUMBNAIL_INCHES, height * inches_per_mm)
    )
    slices = {view: best_slice(mask, axis=axis) for view, axis in VIEWS.items()}
    greys = grey_range(image, [mask] if truth is None else [mask, truth])
    _draw_views(panels[0], image, mask, truth=truth, slices=slices, greys=greys)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=THUMBNAIL_DPI, transparent=True)
        return buffer.getvalue()


def _columns_mm(image: Volume) -> tuple[list[float], float]:
    """Return the three views' widths and the tallest one's height, in mm."""
    x, y, z = np.multiply(image.array.shape, image.spacing_mm)
    return [x, x, y], max(y, z)


def _panels(
    *, rows: int, widths: Sequence[float], inches: tuple[float, float]
) -> tuple["Figure", np.ndarray]:
    """Return a figure with `(rows, 3)` axes; `inches` is the width of all and height of a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(inches[0], rows * inches[1]), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    return figure, figure.subplots(rows, 3, squeeze=False, width_ratios=widths)


def _draw_views(
    row: Sequence["Axes"],
    image: Volume,
    mask: np.ndarray,
    *,
    truth: np.ndarray | None,
    slices: Mapping[str, int],
    greys: tuple[float, float],
) -> None:
    """Draw the three views of one mask into a row of axes; `greys` are as of `grey_range`."""
    darkest, brightest = greys
    for axes, (view, axis) in zip(row, VIEWS.items(), strict=True):
        across, up = (edge for other, edge in enumerate(image.spacing_mm) if other != axis)
        plane = np.take(image.array, slices[view], axis=axis)
        axes.imshow(
            plane.T,
            cmap="gray",
            vmin=darkest,
            vmax=brightest,
            origin="lower",
            extent=(0, plane.shape[0] * across, 0, plane.shape[1] * up),
        )
        labels = np.take(mask, slices[view], axis=axis)
        for value in np.unique(labels[labels > 0]):
            colour = colour_of(int(value))
            _outline(axes, labels == value, pixel_mm=(across, up), colour=colour, width=1.5)
        if truth is not None:
            labels = np.take(truth, slices[view], axis=axis)
            for value in np.unique(labels[labels > 0]):
                _outline(
                    axes, labels == value, pixel_mm=(across, up), colour=TRUTH_COLOUR, width=1.0
                )
        axes.set(xticks=[], yticks=[], frame_on=False)
        if view != "sagittal":
            axes.invert_xaxis()
            axes.text(
                0.02, 0.5, "R", color="white", fontsize=8, va="center", transform=axes.transAxes
            )


def _outline(
    axes: "Axes",
    region: np.ndarray,
    *,
    pixel_mm: tuple[float, float],
    colour: str,
    width: float,
) -> None:
    """Draw the outline of a boolean plane `(across, up)` whose pixels have edges `pixel_mm`."""
    from matplotlib.patheffects import withStroke

    # A rim of background closes the outline of a region that touches the image's edge.
    rimmed = np.pad(region, 1)
    across, up = (
        (np.arange(size) - 0.5) * edge for size, edge in zip(rimmed.shape, pixel_mm, strict=True)
    )
    view = axes.axis()
    drawn = axes.contour(across, up, rimmed.T, levels=[0.5], colors=[colour], linewidths=width)
    if colour == TRUTH_COLOUR:
        # Without a dark edge a white line is lost on bright tissue.
        drawn.set_path_effects([withStroke(linewidth=width + 0.8, foreground="black")])
    axes.axis(view)


# ------------------------------------------------------------------------------------- page


def look_here_first(audit: pd.DataFrame) -> pd.DataFrame:
    """Return an audit table sorted by confidence, lowest first, then by case."""
    return audit.assign(number=pd.to_numeric(audit["confidence"])).sort_values(
        ["number", "case"], ignore_index=True
    )


def overlay_page(
    audit: pd.DataFrame,
    *,
    thumbnails: Mapping[str, bytes],
    images: Mapping[str, str],
    folder: str | Path,
    title: str,
    labels: Mapping[str, int],
) -> str:
    """Return a page, complete in itself, with a row for each mask of an audit table, in its order.

    thumbnails: PNG bytes by case; a case without one is listed without a picture. images: path of
    each case's image. folder: where the page will lie; paths on it are relative to that. labels:
    their names, each written in its colour.
    """
    rows = []
    for mask in audit.to_dict("records"):
        case = mask["case"]
        accepted = "yes" if mask["accepted"] == "true" else "no"
        if mask["reason"]:
            accepted += f": {mask['reason']}"
        cells = [
            _cell(_picture(thumbnails[case], case) if case in thumbnails else "not drawn"),
            _cell(html.escape(case)),
            _cell(_percent(mask["confidence"]), kind="number"),
            _cell(f"{float(mask['volume_ml']):.1f}", kind="number"),
            _cell(html.escape(accepted)),
            _cell(_percent(mask["truth_dice"]), kind="number"),
            _cell(_files(mask["mask"], images[case], folder=folder), kind="files"),
        ]
        kind = "" if mask["accepted"] == "true" else ' class="refused"'
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    legend = ", ".join(
        f'<b style="color: {colour_of(value)}">{html.escape(name)}</b>'
        for name, value in labels.items()
    )
    introduction = (
        f"{(audit['accepted'] == 'true').sum()} of {len(audit)} masks teach, the least confident "
        "first: look there first (what a person put in their place comes last). In colour: "
        f"{legend}; white is the truth where it is known; rows of refused masks are tinted. "
        "Confidence and Dice are in %. Paths are relative to the folder of this page: call "
        "ITK-SNAP there. To throw a mask out or to replace it, write a row with its case, round "
        "and folder into the review table (results/README.md says how)."
    )
    for name in labels_lost(audit):
        introduction += f"<br><b>{html.escape(LOST.format(name))}</b>"
    if audit.empty:
        introduction = "No mask taught this network in this round."
    return PAGE.format(
        title=html.escape(title),
        introduction=introduction,
        headings="".join(f"<th>{heading}</th>" for heading in HEADINGS),
        rows="\n".join(rows),
    )


def _cell(content: str, *, kind: str = "") -> str:
    return f'<td class="{kind}">{content}</td>' if kind else f"<td>{content}</td>"


def _picture(png: bytes, case: str) -> str:
    width = round(THUMBNAIL_INCHES * THUMBNAIL_DPI)
    alternative = f"three slices of {html.escape(case)}"
    return f'<img width="{width}" alt="{alternative}" src="{data_address(png)}">'


def data_address(png: bytes) -> str:
    """Return a PNG as an address that holds it, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f}" if share else "not known"


def _files(mask: str, image: str, *, folder: str | Path) -> str:
    """Return a link to the mask and the command that opens it on its image."""
    mask, image = (os.path.relpath(path, folder) for path in (mask, image))
    command = html.escape(f"itksnap -g {shlex.quote(image)} -s {shlex.quote(mask)}")
    return f'<a href="{html.escape(quote(mask))}">{html.escape(mask)}</a><br>{command}'


# --------------------------------------------------------------------------------- commands


def add_montage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cotrain montage`."""
    parser.add_argument(
        "--image", type=Path, required=True, metavar="FILE", help="the case's NIfTI"
    )
    parser.add_argument("--truth", type=Path, metavar="FILE", help="its label, drawn in white")
    parser.add_argument(
        "--masks",
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="masks in the order of the rows; the last one decides which slices are shown",
    )
    _add_labels(parser)
    parser.add_argument("--title", default="", metavar="TEXT", help="such as the case's name")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")


def run_montage(arguments: argparse.Namespace) -> None:
    """Write the montage of one case."""
    masks = {}
    for pair in arguments.masks:
        name, _, path = pair.partition("=")
        if not name or not path or name in masks:
            raise InputError(
                f"The mask '{pair}' is not of the form name=file, with a name of its own, as in "
                "'2D round 0=mask.nii.gz'."
            )
        masks[name] = read_mask(path, image_path=arguments.image)
    truth = None
    if arguments.truth:
        truth = read_mask(arguments.truth, image_path=arguments.image)
    figure = montage(
        read_image(arguments.image),
        masks,
        labels=labels_from(arguments.labels),
        title=arguments.title,
        truth=truth,
    )
    with write_atomically(arguments.out) as temporary:
        figure.savefig(temporary, dpi=130)
    print(f"{len(masks)} masks drawn in {arguments.out}")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels", nargs="+", required=True, metavar="NAME=VALUE", help="labels, for the legend"
    )


def add_overlays_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cotrain overlays`."""
    parser.add_argument("--audit", type=Path, required=True, metavar="TSV", help="audit table")
    parser.add_argument(
        "--cases", type=Path, required=True, metavar="TABLE", help="checked table of its cases"
    )
    _add_labels(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="page to write")
    parser.add_argument(
        "--max-cases",
        type=int,
        default=40,
        metavar="N",
        help="cases with a picture, the least confident first (default 40)",
    )


def run_overlays(arguments: argparse.Namespace) -> None:
    """Write the page of an audit table's masks; of several channels, the first is shown."""
    audit = look_here_first(read_table(arguments.audit))
    cases = read_table(arguments.cases).set_index("case")
    unknown = sorted(set(audit["case"]) - set(cases.index))
    if unknown:
        raise InputError(
            f"Case `{unknown[0]}` of {arguments.audit} is not in {arguments.cases}; give the table "
            "of the cases that were audited."
        )
    images = {case: cases.loc[case, "image"].split(";")[0] for case in audit["case"]}
    thumbnails = {}
    for case, mask_path in (
        audit[["case", "mask"]].head(arguments.max_cases).itertuples(index=False)
    ):
        truth_path = cases.loc[case, "label"]
        truth = read_mask(truth_path, image_path=images[case]) if truth_path else None
        mask = read_mask(mask_path, image_path=images[case])
        thumbnails[case] = thumbnail(read_image(images[case]), mask, truth=truth)
    page = overlay_page(
        audit,
        thumbnails=thumbnails,
        images=images,
        folder=arguments.out.parent,
        title=f"Masks of {arguments.audit.parent.parent.name}, {arguments.audit.stem}",
        labels=labels_from(arguments.labels),
    )
    write_text(page, arguments.out)
    print(f"{len(thumbnails)} of {len(audit)} masks drawn in {arguments.out}")
