"""NIfTI images and labels on their own grid: in, a file; out, an array with its affine, and back.

Arrays are in nibabel's axis order, `(X, Y, Z)`; affines map voxel indices to mm in RAS+.
"""

import gzip
import os
import zlib
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from cotrain.errors import InputError
from cotrain.files import write_atomically

Header = nibabel.Nifti1Header | nibabel.Nifti2Header
TOLERANCE_VOXELS = 0.1
"""How far apart, in voxels, the corners of two grids may lie that count as one."""
READING_ERRORS = (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError)


def read_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray, Header]:
    """Return label values `(X, Y, Z)`, the affine `(4, 4)` float64 and the header of a file.

    The values are uint8, or int16 where they do not fit. Raises InputError where the file cannot
    be read, is not 3D, or holds a value that is no whole number of int16.
    """
    array, affine, header = _read(path)
    if array.dtype.kind == "f":
        whole = np.isfinite(array) & (array == np.rint(array))
        if not whole.all():
            raise InputError(
                f"{path} holds the label value {float(array[~whole][0])!r}, wanted whole numbers; "
                "make the mask again without interpolation (nearest neighbour) and without NaN, or "
                "save it as whole numbers where its header scales them (scl_slope)."
            )
    lowest, highest = array.min(), array.max()
    limits = np.iinfo(np.int16)
    if lowest < limits.min or highest > limits.max:
        raise InputError(
            f"{path} holds label values from {lowest:g} to {highest:g}, wanted at most "
            f"{limits.max}; renumber the labels."
        )
    small = lowest >= 0 and highest <= 255
    return array.astype(np.uint8 if small else np.int16), affine, header


def write_labels(array: np.ndarray, *, like: str | Path, path: str | Path) -> None:
    """Write label values, `(X, Y, Z)` uint8, on the grid of the image `like`, in one step.

    The header of `like` is kept bit for bit where it says where the voxels are: affines, their
    codes, voxel sizes and units. Scaling, intent, display range, and texts and header extensions
    (which can hold a patient's name) are cleared. Raises InputError where the shape is not that of
    `like`.
    """
    reference = _open(like)
    if array.shape != reference.shape:
        raise InputError(
            f"Labels of shape {by(array.shape)} cannot be written on the grid of {like}, which "
            f"is {by(reference.shape)}; resample them to that grid first."
        )
    header = reference.header.copy()
    header.extensions.clear()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(None, None)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    for text in ("descrip", "db_name", "aux_file"):
        if text in header:  # NIfTI-2 has no db_name
            header[text] = b""
    header["vox_offset"] = 0  # nibabel puts the voxels right behind a header without extensions
    with write_atomically(path) as temporary:
        type(reference)(array, reference.affine, header).to_filename(temporary)


def check_image(path: str | Path) -> tuple[np.ndarray, np.ndarray, Header]:
    """Return the intensities `(X, Y, Z)` float32, the affine and the header of a sound image.

    Raises InputError where the file cannot be read to its end, is not 3D, is constant, has NaN or
    infinite voxels, or has a geometry that readers disagree about.
    """
    array, affine, header = _read(path)
    _check_geometry(path, affine, header)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    broken = int(array.size - np.count_nonzero(np.isfinite(array)))
    if broken:
        raise InputError(
            f"{path} has {broken} voxels of {array.size} that are NaN or infinite; replace them, "
            "for example by the background's intensity."
        )
    if array.min() == array.max():
        raise InputError(
            f"{path} has the value {array.flat[0]:g} in every voxel; export the image again or "
            "remove the case."
        )
    return array, affine, header


def check_same_grid(path_a: str | Path, path_b: str | Path) -> None:
    """Compare where two files have their voxels, reading only the headers.

    Raises InputError where the shapes differ, or where a corner of b's grid is further from the
    same corner of a's than TOLERANCE_VOXELS times a's smallest voxel edge.
    """
    a, b = _open(path_a), _open(path_b)
    if a.shape != b.shape:
        raise InputError(
            f"{path_b} has the shape {by(b.shape)} and {path_a} has {by(a.shape)}; resample one "
            "of them to the other's grid, or pair each file with its own."
        )
    corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in a.shape))])
    apart_mm = np.linalg.norm(corners @ (b.affine - a.affine).T, axis=1).max()
    tolerance_mm = TOLERANCE_VOXELS * min(spacing_mm(a.affine))
    if not apart_mm <= tolerance_mm:
        raise InputError(
            f"{path_b} has its voxels up to {apart_mm:.3g} mm from those of {path_a} (affines "
            f"differ; {tolerance_mm:.3g} mm would pass); resample one of them to the other's grid, "
            "or copy the right affine if only the header is wrong."
        )


def check_channels(path_a: str | Path, path_b: str | Path) -> None:
    """Raise InputError where two channels have not the same grid, or not to nnU-Net's reader.

    It compares the headers' voxel sizes by numpy's `allclose`, more closely than `check_same_grid`.
    """
    check_same_grid(path_a, path_b)
    a, b = (_open(path).header.get_zooms() for path in (path_a, path_b))
    if not np.allclose(a, b):
        raise InputError(
            f"{path_b} has voxels of {by(b)} mm and {path_a} of {by(a)} mm, and nnU-Net's reader "
            "refuses channels that differ at all; copy the header of the one to the other."
        )


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Return the voxel's edge lengths in mm, in the order of the array's axes."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def orientation(affine: np.ndarray) -> str:
    """Return the anatomical directions the array's axes run towards, such as `RAS` or `LPI`."""
    return "".join(nibabel.aff2axcodes(affine))


def orientation_of(path: str | Path) -> str:
    """Return the orientation of a file's array, reading only its header."""
    return orientation(_open(path).affine)


def voxel_volume_ml(affine: np.ndarray) -> float:
    """Return a voxel's volume in ml (1 ml = 1000 mm³), also for oblique and sheared grids."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def _open(path: str | Path) -> nibabel.Nifti1Image | nibabel.Nifti2Image:
    """Return a 3D NIfTI file of numbers with its header read; raises InputError otherwise."""
    try:
        image = nibabel.load(path)
    except READING_ERRORS as error:
        raise InputError(_unreadable(path, error)) from None
    if not isinstance(image, nibabel.Nifti1Image | nibabel.Nifti2Image):
        raise InputError(f"{path} is not a NIfTI file; convert it to .nii.gz.")
    if len(image.shape) != 3 or 0 in image.shape:
        raise InputError(
            f"{path} has the shape {by(image.shape)}, wanted three axes of at least one voxel; "
            "write one 3D file for each channel or time point, and a mask as one 3D file with a "
            "value for each label (nibabel.squeeze_image removes further axes of 1)."
        )
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path} holds {image.get_data_dtype()} voxels (colour or complex), wanted one number "
            "a voxel; convert it to integers or floats."
        )
    return image


def _read(path: str | Path) -> tuple[np.ndarray, np.ndarray, Header]:
    """Return the voxels `(X, Y, Z)` in the file's number type, the affine and the header."""
    image = _open(path)
    try:
        if not str(path).endswith(".gz"):
            return np.asanyarray(image.dataobj), image.affine, image.header
        # nibabel stops at the last voxel and never sees gzip's checksum: a flipped bit would be
        # read as a voxel, so the stream is read to its end here
        with gzip.open(path) as stream:
            array = np.asanyarray(type(image).from_stream(stream).dataobj)
            stream.read()
    except READING_ERRORS as error:
        raise InputError(_unreadable(path, error)) from None
    return array, image.affine, image.header


def _check_geometry(path: str | Path, affine: np.ndarray, header: Header) -> None:
    """Refuse grids that nibabel and ITK (ITK-SNAP, SimpleITK) read differently or not at all."""
    if not np.isfinite(affine).all() or voxel_volume_ml(affine) == 0:
        raise InputError(
            f"{path} has an affine that gives its voxels no volume; export the image again."
        )
    by_affine = np.array(spacing_mm(affine))
    by_header = np.array(header.get_zooms(), dtype=float)
    if not np.allclose(by_affine, by_header, rtol=0.01, atol=0):
        raise InputError(
            f"{path} says two voxel sizes, {by(by_header)} mm in pixdim and "
            f"{by(by_affine)} mm in its affine, and readers differ in which they believe; "
            "correct the wrong one."
        )
    axes = affine[:3, :3] / by_affine
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    # measured with SimpleITK 2.5: without a qform to fall back on, it refuses cosines from 2e-4
    if cosine > (1e-2 if header["qform_code"] > 0 else 1e-4):
        raise InputError(
            f"{path} has a sheared grid, its axes are {np.degrees(np.arccos(cosine)):.2f} degrees "
            "apart instead of 90, which ITK and its viewers refuse; resample it to a grid with "
            "right angles."
        )


def _unreadable(path: str | Path, error: Exception) -> str:
    """Return the sentence about a file that cannot be read."""
    if os.path.exists(path) and not os.access(path, os.R_OK):
        return f"{path} cannot be read; ask for read permission."
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{path} cannot be read as NIfTI ({reason}); copy or export the file again."


def by(numbers: Iterable[float]) -> str:
    """Return a shape or voxel sizes as `1x1x2.5`."""
    return "x".join(f"{number:.6g}" for number in numbers)
