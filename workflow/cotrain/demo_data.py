"""Brains to try the workflow on: in, numbers and a seed; out, a Decathlon folder and a case table.

Every subject is the ICBM152 2009 T1 template that nilearn ships, seen through a deformation, a
contrast, a bias field and noise of its own; nothing is downloaded. Labels are 1 striatum (caudate
and putamen) and 2 thalamus: cut from the template's grey matter map by geometry, because grey
against white matter is learnt from four subjects or from none, while telling these nuclei from the
cortex, which looks the same voxel by voxel, needs their surroundings.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
from scipy import ndimage

from cotrain.errors import InputError
from cotrain.files import write_atomically, write_json, write_table

LABELS = {"background": 0, "striatum": 1, "thalamus": 2}
# Raise it with every change that alters a voxel, so that folders of older making are recognised.
RECIPE = 1

FIELD_OF_VIEW_MM = (80.0, 96.0, 100.0)
FIELD_CENTRE_MM = (0.0, -6.0, 6.0)
IN_PLANE_SPACING_MM = 2.0
# The thicker one of them makes preprocessing resample some subjects, as with real scanners.
SLICE_SPACINGS_MM = (2.5, 2.5, 2.5, 3.0)


@dataclass(frozen=True)
class Template:
    """The template and the shares of its tissues, smoothed to the demo's voxel size.

    `t1` is `(X, Y, Z) float32`, brightest voxel 1; `tissues` is `(5, X, Y, Z) float32`, shares from
    0 to 1 in the order striatum, thalamus, other grey matter, white matter, fluid. Both have 1 mm
    voxels along the axes of the head (right, anterior, superior); voxel (0, 0, 0) lies at
    `origin_mm`.
    """

    t1: np.ndarray
    tissues: np.ndarray
    origin_mm: np.ndarray


@dataclass(frozen=True)
class Subject:
    """One subject: `image (X, Y, Z) int16`, `label (X, Y, Z) uint8`, both on `affine (4, 4)`."""

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


TEMPLATE_LEVELS = (0.7, 0.77, 0.65, 0.87, 0.34)
"""Mean brightness of each tissue in the template, in the order of `Template.tissues`."""


def deep_nuclei(
    *, grey: np.ndarray, white: np.ndarray, t1: np.ndarray, origin_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the striatum and the thalamus of the template as two `(X, Y, Z) bool` masks.

    Deep grey matter is what is grey rather than white or fluid inside an ellipsoid around the
    nuclei that ends short of the insula, without threads of less than 5 mm (an opening cuts the
    grey rims of the ventricles off); the plane 3 mm behind the anterior commissure parts it, and
    what lies lateral of 24 mm or above 15 mm belongs to putamen and caudate on both sides of it.
    """
    x, y, z = (
        origin + index
        for origin, index in zip(origin_mm, np.ogrid[tuple(map(slice, t1.shape))], strict=True)
    )
    ellipsoid = (x / 34) ** 2 + ((y + 4) / 38) ** 2 + ((z - 6) / 18) ** 2 < 1
    grey_inside = (grey > 0.4) & (grey > 0.8 * white) & (t1 > 0.6) & ellipsoid & (z > -6)
    opened = ndimage.binary_opening(grey_inside, iterations=2)
    parts, number_of_parts = ndimage.label(opened)
    volumes_mm3 = ndimage.sum_labels(opened, parts, np.arange(number_of_parts + 1))
    nuclei = ndimage.gaussian_filter((volumes_mm3[parts] > 1000).astype(np.float32), 1.5) > 0.5
    behind = (y < np.where(z > 15, -22, -3)) & (np.abs(x) < 24)
    return nuclei & ~behind & (np.abs(x) > 4), nuclei & behind


def load_template() -> Template:
    """Return the template that the installed nilearn package carries."""
    from nilearn.datasets import (
        load_mni152_gm_template,
        load_mni152_template,
        load_mni152_wm_template,
    )

    t1_image = load_mni152_template(resolution=1)
    origin_mm = t1_image.affine[:3, 3]
    t1 = t1_image.get_fdata(dtype=np.float32)
    grey = load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    striatum, thalamus = deep_nuclei(grey=grey, white=white, t1=t1, origin_mm=origin_mm)
    tissues = [
        striatum.astype(np.float32),
        thalamus.astype(np.float32),
        np.where(striatum | thalamus, 0, grey),
        np.where(striatum | thalamus, 0, white),
        np.where(t1 > 0, np.clip(1 - grey - white, 0, 1), 0) * ~(striatum | thalamus),
    ]
    # A Gaussian of a voxel's width stands for the averaging over a voxel (partial volume).
    sigma = IN_PLANE_SPACING_MM / 2.355
    return Template(
        t1=ndimage.gaussian_filter(t1, sigma),
        tissues=np.stack([ndimage.gaussian_filter(tissue, sigma) for tissue in tissues]),
        origin_mm=origin_mm,
    )


def rotation(angles: np.ndarray) -> np.ndarray:
    """Return the `(3, 3)` rotation about x, then y, then z by `angles` in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    return (
        np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        @ np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    )


def smooth_field(
    generator: np.random.Generator, *, shape: tuple[int, ...], sigma_voxels: np.ndarray
) -> np.ndarray:
    """Return Gaussian-smoothed noise as `shape` float64, mean 0 and standard deviation 1."""
    field = ndimage.gaussian_filter(generator.standard_normal(shape), sigma_voxels)
    field -= field.mean()
    return field / field.std()


def make_subject(template: Template, *, seed: int, index: int) -> Subject:
    """Return subject `index` of the family `seed`; the same two numbers give the same bits."""
    generator = np.random.default_rng([RECIPE, seed, index])
    spacing_mm = np.array(
        [IN_PLANE_SPACING_MM, IN_PLANE_SPACING_MM, generator.choice(SLICE_SPACINGS_MM)]
    )
    shape = np.rint(FIELD_OF_VIEW_MM / spacing_mm).astype(int) + generator.integers(-3, 4, size=3)
    affine = _random_affine(generator, shape=shape, spacing_mm=spacing_mm)
    positions = _positions_in_template(
        generator, shape=shape, spacing_mm=spacing_mm, affine=affine
    ) - template.origin_mm.reshape(3, 1, 1, 1)
    t1 = ndimage.map_coordinates(template.t1, positions, order=1)
    tissues = np.stack(
        [ndimage.map_coordinates(tissue, positions, order=1) for tissue in template.tissues]
    )
    striatum, thalamus = tissues[0], tissues[1]
    label = np.stack([1 - striatum - thalamus, striatum, thalamus]).argmax(axis=0)
    image = _imaged(generator, t1=t1, tissues=tissues, spacing_mm=spacing_mm)
    return Subject(image=image, label=label.astype(np.uint8), affine=affine)


def _random_affine(
    generator: np.random.Generator, *, shape: np.ndarray, spacing_mm: np.ndarray
) -> np.ndarray:
    """Return a `(4, 4)` voxel-to-mm matrix: half of them oblique, half stored right to left."""
    is_oblique = generator.random() < 0.5
    is_flipped = generator.random() < 0.5
    angles = np.radians(generator.uniform(-15, 15, size=3)) * is_oblique
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * spacing_mm * [-1 if is_flipped else 1, 1, 1]
    centre_mm = FIELD_CENTRE_MM + generator.uniform(-5, 5, size=3)
    affine[:3, 3] = centre_mm - affine[:3, :3] @ ((shape - 1) / 2)
    return affine


def _positions_in_template(
    generator: np.random.Generator,
    *,
    shape: np.ndarray,
    spacing_mm: np.ndarray,
    affine: np.ndarray,
) -> np.ndarray:
    """Return where in the template, in mm, each voxel looks: `(3, X, Y, Z) float64`."""
    head = rotation(np.radians(generator.uniform(-6, 6, size=3))) * generator.uniform(
        0.88, 1.12, size=3
    )
    matrix = head @ affine[:3, :3]
    offset = head @ (affine[:3, 3] - FIELD_CENTRE_MM) + FIELD_CENTRE_MM
    i, j, k = np.ogrid[tuple(map(slice, shape))]
    positions = []
    for axis in range(3):
        # Written out, not as a matrix product: a BLAS may add in another order on more threads.
        position = matrix[axis, 0] * i + matrix[axis, 1] * j + matrix[axis, 2] * k + offset[axis]
        for amplitude_mm, sigma_mm in ((3.0, 14.0), (1.2, 6.0)):
            position = position + amplitude_mm * smooth_field(
                generator, shape=tuple(shape), sigma_voxels=sigma_mm / spacing_mm
            )
        positions.append(position)
    return np.stack(positions)


def _imaged(
    generator: np.random.Generator, *, t1: np.ndarray, tissues: np.ndarray, spacing_mm: np.ndarray
) -> np.ndarray:
    """Return what a scanner of its own would show of the tissues, `(X, Y, Z) int16`."""
    shape = t1.shape
    fluid, grey = generator.uniform(0.1, 0.5), generator.uniform(0.5, 0.75)
    white = grey + generator.uniform(0.1, 0.35)
    levels = [
        grey + (white - grey) * generator.uniform(-0.2, 0.4),
        grey + (white - grey) * generator.uniform(0.1, 0.6),
        grey,
        white,
        fluid,
    ]
    expected = sum(level * tissue for level, tissue in zip(TEMPLATE_LEVELS, tissues, strict=True))
    signal = generator.uniform(0.3, 1.0) * (t1 - expected)
    for level, tissue in zip(levels, tissues, strict=True):
        # Within a subject, too, a tissue is not equally bright everywhere.
        local = smooth_field(generator, shape=shape, sigma_voxels=15 / spacing_mm)
        signal += tissue * (level + 0.03 * local)
    signal = np.clip(signal, 0, None) ** generator.uniform(0.8, 1.3)
    bias = smooth_field(generator, shape=shape, sigma_voxels=22 / spacing_mm)
    signal *= np.exp(generator.uniform(0.05, 0.2) * bias)
    signal = ndimage.gaussian_filter(signal, generator.uniform(0.0, 0.5))
    noise = generator.uniform(0.01, 0.04) * generator.standard_normal((2, *shape))
    # A magnitude image: the noise of both channels of the receiver, so never below 0 (Rician).
    signal = np.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)
    return np.rint(signal * generator.uniform(300, 3000)).astype(np.int16)


def make_folder(folder: Path, *, labelled: int, unlabelled: int, test: int, seed: int) -> None:
    """Write imagesTr, labelsTr, cases.tsv and, last, dataset.json; an identical folder stays.

    Raises InputError for a number out of range, and for a folder that holds another data set: what
    is there is never replaced.
    """
    numbers = {"labelled": labelled, "unlabelled": unlabelled, "test": test}
    _check_numbers({**numbers, "seed": seed})
    splits = [split for split, number in numbers.items() for _ in range(number)]
    cases = [f"brain_{index:03d}" for index in range(len(splits))]
    rows = [
        {
            "case": case,
            "image": f"imagesTr/{case}.nii.gz",
            "label": f"labelsTr/{case}.nii.gz",
            "split": split,
        }
        for case, split in zip(cases, splits, strict=True)
    ]
    description = {
        "name": "Deep grey matter of made-up subjects",
        "description": "Striatum and thalamus in deformed, recoloured copies of one template",
        "reference": "ICBM152 2009 nonlinear template (Fonov et al. 2011), as nilearn ships it",
        "licence": "that of the ICBM152 2009 template",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for name, value in LABELS.items()},
        "numTraining": len(rows),
        "training": [{"image": row["image"], "label": row["label"]} for row in rows],
        "made_of": {"recipe": RECIPE, "seed": seed, **numbers},
    }
    if _is_made(folder, description=description, rows=rows):
        print(f"{folder} holds these subjects already.")
        return
    template = load_template()
    for index, row in enumerate(rows):
        subject = make_subject(template, seed=seed, index=index)
        for array, path in ((subject.image, row["image"]), (subject.label, row["label"])):
            with write_atomically(folder / path) as temporary:
                nibabel.save(nibabel.Nifti1Image(array, subject.affine), temporary)
    write_table(pd.DataFrame(rows), folder / "cases.tsv")
    # Last: a folder without it is one whose making was broken off.
    write_json(description, folder / "dataset.json")
    print(
        f"{len(rows)} subjects made in {folder}: {labelled} labelled, {unlabelled} unlabelled, "
        f"{test} for testing."
    )


def _check_numbers(numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        lowest = 1 if name == "labelled" else 0
        if number < lowest:
            raise InputError(f"--{name} is {number}; give a whole number of at least {lowest}.")


def _is_made(folder: Path, *, description: dict, rows: list[dict[str, str]]) -> bool:
    """Return whether `folder` holds these subjects whole; False where it has no dataset.json."""
    path = folder / "dataset.json"
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if found != description:
        raise InputError(
            f"{folder} holds a data set made otherwise than asked for; give another --folder, or "
            "delete it first."
        )
    files = ["cases.tsv", *(row[column] for row in rows for column in ("image", "label"))]
    return all((folder / file).is_file() for file in files)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain make-demo-data`."""
    parser.add_argument("--folder", type=Path, required=True, help="folder to make")
    parser.add_argument("--labelled", type=int, default=4, help="subjects (%(default)s)")
    parser.add_argument("--unlabelled", type=int, default=16, help="subjects (%(default)s)")
    parser.add_argument("--test", type=int, default=6, help="subjects (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other subjects (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain make-demo-data`."""
    make_folder(
        arguments.folder,
        labelled=arguments.labelled,
        unlabelled=arguments.unlabelled,
        test=arguments.test,
        seed=arguments.seed,
    )
