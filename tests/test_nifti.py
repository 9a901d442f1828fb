"""NIfTI files: labels keep an image's grid to the last bit, and broken files are named."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from cotrain.errors import InputError
from cotrain.nifti import (
    check_channels,
    check_image,
    check_same_grid,
    orientation,
    read_labels,
    spacing_mm,
    voxel_volume_ml,
    write_labels,
)

SHAPE = (4, 5, 6)


def affine_of(spacing: tuple, *, turn_degrees: float = 0, flip: tuple = (1, 1, 1)) -> np.ndarray:
    """Return an affine with these voxel sizes, turned about z, its axes flipped where -1."""
    angle = np.radians(turn_degrees)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.multiply(spacing, flip))
    affine[:3, 3] = (-12.5, 40.25, 7.125)
    return affine


AFFINES = {
    "anisotropic": affine_of((0.5, 0.75, 3)),
    "oblique": affine_of((0.7, 1.1, 2.3), turn_degrees=17),
    "flipped": affine_of((1, 1.5, 2), flip=(-1, 1, -1)),
    "permuted": affine_of((0.9, 1.3, 4))[:, [2, 0, 1, 3]],
}


def write_image(
    path: Path, affine: np.ndarray, *, codes: tuple = (1, 1), array: np.ndarray | None = None
) -> Path:
    """Write an int16 image that fills the header fields which labels must not inherit."""
    if array is None:
        array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_intent("t test", (7,), name="t values")
    image.header.set_slope_inter(2, -1)
    image.header["cal_max"] = 500
    for field in ("descrip", "db_name", "aux_file"):
        image.header[field] = b"PATIENT^NAME"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"patient's name"))
    nibabel.save(image, path)
    return path


def some_labels() -> np.ndarray:
    """Return labels `(4, 5, 6)` uint8 that no flip or permutation leaves the same."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2, 0:4] = 1
    labels[3, 4, 5] = 255
    return labels


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 1), (0, 0), (4, 2)])
def test_labels_keep_the_images_grid_and_their_values(tmp_path, name, codes):
    image = write_image(tmp_path / "image.nii.gz", AFFINES[name], codes=codes)
    write_labels(some_labels(), like=image, path=tmp_path / "labels.nii.gz")
    labels, affine, header = read_labels(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(labels, some_labels())
    reference = nibabel.load(image)
    np.testing.assert_array_equal(affine, reference.affine)
    for key in (
        "sform_code",
        "qform_code",
        "pixdim",
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "qoffset_x",
        "qoffset_y",
        "qoffset_z",
        "xyzt_units",
    ):
        np.testing.assert_array_equal(header[key], reference.header[key], err_msg=key)  # fmt: skip
    check_same_grid(image, tmp_path / "labels.nii.gz")


@pytest.mark.parametrize("name", AFFINES)
def test_an_affine_is_kept_to_float32_precision(tmp_path, name):
    image = write_image(tmp_path / "image.nii", AFFINES[name], codes=(1, 0))
    write_labels(some_labels(), like=image, path=tmp_path / "labels.nii")
    _, affine, _ = read_labels(tmp_path / "labels.nii")
    np.testing.assert_array_equal(affine, AFFINES[name].astype(np.float32))


@pytest.mark.parametrize("name", AFFINES)
def test_itk_sees_labels_where_it_sees_the_image(tmp_path, name):
    sitk = pytest.importorskip("SimpleITK")
    image = write_image(tmp_path / "image.nii.gz", AFFINES[name])
    write_labels(some_labels(), like=image, path=tmp_path / "labels.nii.gz")
    seen, labels = (sitk.ReadImage(str(tmp_path / f"{x}.nii.gz")) for x in ("image", "labels"))
    assert labels.GetSpacing() == seen.GetSpacing()
    assert labels.GetOrigin() == seen.GetOrigin()
    assert labels.GetDirection() == seen.GetDirection()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(labels).T, some_labels())


def test_labels_inherit_nothing_else_from_the_image(tmp_path):
    image = write_image(tmp_path / "image.nii.gz", AFFINES["oblique"])
    write_labels(some_labels(), like=image, path=tmp_path / "labels.nii.gz")
    header = nibabel.load(tmp_path / "labels.nii.gz").header
    assert header.get_data_dtype() == np.uint8
    assert header.get_slope_inter() == (None, None)
    assert header.get_intent() == ("none", (), "")
    assert header["cal_max"] == 0
    assert not header.extensions
    content = gzip.decompress((tmp_path / "labels.nii.gz").read_bytes())
    assert b"patient" not in content.lower()
    assert len(content) == 352 + some_labels().size


def test_the_same_labels_are_the_same_bytes(tmp_path):
    image = write_image(tmp_path / "image.nii.gz", AFFINES["flipped"])
    for name in ("one.nii.gz", "two.nii.gz"):
        write_labels(some_labels(), like=image, path=tmp_path / name)
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_a_nifti_2_image_gets_nifti_2_labels(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    nibabel.save(nibabel.Nifti2Image(array, AFFINES["oblique"]), tmp_path / "image.nii.gz")
    write_labels(some_labels(), like=tmp_path / "image.nii.gz", path=tmp_path / "labels.nii.gz")
    labels, affine, _ = read_labels(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(labels, some_labels())
    np.testing.assert_array_equal(affine, AFFINES["oblique"])


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path, monkeypatch):
    path = tmp_path / "image.nii.gz"
    path.touch()
    monkeypatch.setattr("cotrain.nifti.os.access", lambda *words: False)
    with pytest.raises(InputError, match=r"image\.nii\.gz cannot be read; ask for read permission"):
        check_image(path)


def test_labels_of_another_shape_are_not_written(tmp_path):
    image = write_image(tmp_path / "image.nii.gz", np.eye(4))
    with pytest.raises(InputError, match=r"4x5x5 cannot be written .* which is 4x5x6"):
        write_labels(some_labels()[..., 1:], like=image, path=tmp_path / "labels.nii.gz")
    assert not (tmp_path / "labels.nii.gz").exists()


def save_labels(path: Path, array: np.ndarray) -> Path:
    """Write an array as it is."""
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


def test_whole_numbers_stored_as_floats_are_labels(tmp_path):
    path = save_labels(tmp_path / "labels.nii.gz", some_labels().astype(np.float32))
    labels, _, _ = read_labels(path)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, some_labels())


def test_labels_beyond_uint8_are_read_as_int16(tmp_path):
    array = np.zeros(SHAPE, np.int32)
    array[0, 0, 0], array[0, 0, 1] = 1024, -1
    labels, _, _ = read_labels(save_labels(tmp_path / "labels.nii.gz", array))
    assert labels.dtype == np.int16
    np.testing.assert_array_equal(labels, array)


@pytest.mark.parametrize(
    ("value", "said"), [(1.5, "label value 1.5"), (np.nan, "label value nan"), (40_000, "at most")]
)
def test_values_that_are_no_labels_are_refused(tmp_path, value, said):
    array = np.zeros(SHAPE, np.float32)
    array[1, 2, 3] = value
    with pytest.raises(InputError, match=rf"labels\.nii\.gz holds .*{said}"):
        read_labels(save_labels(tmp_path / "labels.nii.gz", array))


def test_grids_of_other_shape_are_told_apart(tmp_path):
    a = write_image(tmp_path / "a.nii.gz", np.eye(4))
    b = write_image(tmp_path / "b.nii.gz", np.eye(4), array=np.ones((4, 5, 7), np.int16))
    with pytest.raises(InputError, match=r"b\.nii\.gz has the shape 4x5x7 .* has 4x5x6; resample"):
        check_same_grid(a, b)


def test_a_shifted_grid_is_told_with_the_shift_in_mm(tmp_path):
    shifted = np.diag([0.5, 2, 3, 1.0])
    a = write_image(tmp_path / "a.nii.gz", shifted)
    shifted[2, 3] = 2.5
    b = write_image(tmp_path / "b.nii.gz", shifted)
    with pytest.raises(InputError, match=r"up to 2.5 mm from .* 0.05 mm would pass"):
        check_same_grid(a, b)


def test_a_wrong_voxel_size_is_told_at_the_far_corner(tmp_path):
    a = write_image(tmp_path / "a.nii.gz", np.diag([1, 1, 1, 1.0]))
    b = write_image(tmp_path / "b.nii.gz", np.diag([1, 1, 1.25, 1.0]))
    with pytest.raises(InputError, match=r"up to 1\.25 mm"):  # 5 steps along z, 0.25 mm each
        check_same_grid(a, b)


def test_a_flipped_grid_is_not_the_same(tmp_path):
    a = write_image(tmp_path / "a.nii.gz", np.diag([1, 1, 1, 1.0]))
    b = write_image(tmp_path / "b.nii.gz", np.diag([-1, 1, 1, 1.0]))
    with pytest.raises(InputError, match="up to 6 mm"):
        check_same_grid(a, b)


def test_a_rounded_affine_is_the_same_grid(tmp_path):
    affine = AFFINES["oblique"]
    a = write_image(tmp_path / "a.nii.gz", affine)
    b = write_image(tmp_path / "b.nii.gz", affine.round(4))
    check_same_grid(a, b)


def test_channels_whose_sizes_differ_at_all_are_refused(tmp_path):
    sizes = [0.488281, 0.4883, 0.488281 + 1e-7]
    a, b, c = (
        write_image(tmp_path / f"{name}.nii.gz", np.diag([size, 1, 1, 1.0]))
        for name, size in zip("abc", sizes, strict=True)
    )
    check_same_grid(a, b)
    check_channels(a, c)
    sentence = r"b\.nii\.gz has voxels of 0\.4883x1x1 mm and .* of 0\.488281x1x1 mm"
    with pytest.raises(InputError, match=sentence):
        check_channels(a, b)


def test_a_label_that_is_nearly_whole_is_told_with_all_its_digits(tmp_path):
    labels = np.zeros((4, 5, 6), np.float64)
    labels[0] = 1 + 1e-7
    path = write_image(tmp_path / "label.nii.gz", np.eye(4), array=labels)
    with pytest.raises(InputError, match=r"label value 1\.000000\d+, .* \(scl_slope\)"):
        read_labels(path)


def test_geometry_by_hand():
    assert spacing_mm(AFFINES["oblique"]) == pytest.approx((0.7, 1.1, 2.3))
    assert voxel_volume_ml(AFFINES["oblique"]) == pytest.approx(0.7 * 1.1 * 2.3 / 1000)
    assert voxel_volume_ml(np.diag([-2, 5, 10, 1])) == pytest.approx(0.1)
    assert spacing_mm(AFFINES["permuted"]) == pytest.approx((4, 0.9, 1.3))
    assert [orientation(AFFINES[name]) for name in AFFINES] == ["RAS", "RAS", "LAI", "SRA"]


def test_an_image_is_returned_as_scaled_float32(tmp_path):
    path = write_image(tmp_path / "image.nii.gz", AFFINES["oblique"])
    array, affine, header = check_image(path)
    assert array.dtype == np.float32
    stored = nibabel.load(path)
    np.testing.assert_array_equal(array, stored.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(affine, stored.affine)
    assert header["qform_code"] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_without_a_value_are_refused(tmp_path, value):
    array = np.arange(120, dtype=np.float32).reshape(SHAPE)
    array[0, 1:3, 0] = value
    with pytest.raises(InputError, match=r"a\.nii\.gz has 2 voxels of 120 that are NaN or inf"):
        check_image(save_labels(tmp_path / "a.nii.gz", array))


def test_a_constant_image_is_refused(tmp_path):
    with pytest.raises(InputError, match="the value 7 in every voxel"):
        check_image(save_labels(tmp_path / "a.nii.gz", np.full(SHAPE, 7, np.int16)))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2), (4, 5, 6, 1)])
def test_an_image_must_have_three_axes(tmp_path, shape):
    path = save_labels(
        tmp_path / "a.nii.gz", np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    )
    with pytest.raises(InputError, match="wanted three axes"):
        check_image(path)


def test_colour_images_are_refused(tmp_path):
    array = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(InputError, match="wanted one number a voxel"):
        check_image(save_labels(tmp_path / "a.nii.gz", array))


def test_two_voxel_sizes_in_one_header_are_refused(tmp_path):
    image = nibabel.Nifti1Image(np.arange(120, dtype=np.int16).reshape(SHAPE), np.eye(4))
    image.header["pixdim"][1:4] = (1, 1, 2.5)
    nibabel.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"1x1x2.5 mm in pixdim and 1x1x1 mm in its affine"):
        check_image(tmp_path / "a.nii.gz")


@pytest.mark.parametrize(("shear", "codes"), [(0.001, (1, 0)), (0.1, (1, 1))])
def test_a_sheared_grid_is_refused(tmp_path, shear, codes):
    affine = np.eye(4)
    affine[0, 1] = shear
    path = write_image(tmp_path / "a.nii.gz", affine, codes=codes)
    with pytest.raises(InputError, match="sheared grid"):
        check_image(path)


def broken(path: Path, content: bytes) -> Path:
    """Write bytes as they are."""
    path.write_bytes(content)
    return path


def test_broken_files_are_named(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 900, (20, 20, 20)).astype(np.int16)
    good = save_labels(tmp_path / "good.nii.gz", array).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    files = [
        broken(tmp_path / "truncated.nii.gz", good[: len(good) // 2]),
        broken(tmp_path / "flipped_bit.nii.gz", bytes(flipped)),
        broken(tmp_path / "no_gzip.nii.gz", b"hello"),
        broken(tmp_path / "empty.nii.gz", b""),
        broken(tmp_path / "short.nii", gzip.decompress(good)[:5000]),
        broken(tmp_path / "text.nii", b"hello" * 100),
        tmp_path / "absent.nii.gz",
    ]
    for path in files:
        for read in (check_image, read_labels):
            with pytest.raises(InputError) as caught:
                read(path)
            assert path.name in str(caught.value)
            assert "cannot be read as NIfTI" in str(caught.value)


def test_other_formats_are_refused(tmp_path):
    array = np.arange(120, dtype=np.float32).reshape(SHAPE)
    nibabel.save(nibabel.MGHImage(array, np.eye(4)), tmp_path / "a.mgz")
    with pytest.raises(InputError, match=r"a\.mgz is not a NIfTI file"):
        check_image(tmp_path / "a.mgz")
