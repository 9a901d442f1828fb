"""Pictures: in, hand-made volumes and masks; out, whether they show the patient the right way."""

from html.parser import HTMLParser

import nibabel
import numpy as np
import pandas as pd
import pytest

from cotrain.__main__ import main
from cotrain.files import write_table
from cotrain.pictures import Volume, along_patient_axes, best_slice, grey_range

AUDIT_COLUMNS = (
    "case", "mask", "soft", "accepted", "reason", "confidence", "volume_ml", "absent",
    "truth_dice",
)  # fmt: skip


def audit_table(path, rows):
    write_table(pd.DataFrame(rows, columns=AUDIT_COLUMNS), path)
    return str(path)


def case_table(path, rows):
    write_table(pd.DataFrame(rows, columns=["case", "image", "label"]), path)
    return str(path)


def write_volume(path, array, affine):
    nibabel.Nifti1Image(array, affine).to_filename(path)
    return str(path)


def test_slices_are_turned_to_the_patients_axes_with_their_spacing():
    """The array's axes run to the front (2 mm), to the left (1 mm) and to the feet (4 mm)."""
    affine = np.array([[0, -1.0, 0, 0], [2.0, 0, 0, 0], [0, 0, -4.0, 0], [0, 0, 0, 1]])
    array = np.zeros((3, 4, 5))
    array[2, 0, 4] = 1  # frontmost, rightmost, lowest
    volume = along_patient_axes(array, affine)
    assert volume.spacing_mm == (1, 2, 4)
    assert volume.array.shape == (4, 3, 5)
    assert volume.array[3, 2, 0] == 1


def test_the_best_slice_has_the_most_foreground_and_an_empty_mask_its_middle():
    mask = np.zeros((3, 4, 5))
    mask[0, 1, 1] = mask[1, 1, 3] = mask[1, 2, 3] = 2
    assert [best_slice(mask, axis=axis) for axis in range(3)] == [1, 1, 3]
    assert [best_slice(mask * 0, axis=axis) for axis in range(3)] == [1, 2, 2]


def test_the_grey_scale_is_that_of_the_tissue_around_the_masks():
    """A CT in small: air, a line of soft tissue 100 mm long with an organ in it, and bone."""
    image = np.full((50, 3, 3), -1000.0)
    image[10:40] = np.linspace(0, 90, 30)[:, None, None]
    image[45:] = 1500
    volume = Volume(image, (5.0, 5.0, 5.0))
    mask = np.zeros(image.shape, np.uint8)
    mask[20:24] = 1
    # 20 mm are 4 voxels: 16 to 27, whose tissue has 18.6 to 52.8.
    darkest, brightest = grey_range(volume, [mask * 0, mask])
    assert 18.6 <= darkest < 22 and 49 < brightest <= 52.8
    assert grey_range(volume, [mask * 0]) == (-1000, 1500)


@pytest.fixture
def two_volumes(tmp_path):
    affine = np.diag([1.0, 2.0, 4.0, 1])
    image = np.random.default_rng(0).normal(size=(12, 10, 6)).astype(np.float32)
    mask = np.zeros((12, 10, 6), np.uint8)
    mask[0:4, 2:6, 1:4], mask[6:8, 2:6, 1:4] = 1, 2
    paths = {
        "image": write_volume(tmp_path / "image.nii.gz", image, affine),
        "mask": write_volume(tmp_path / "mask.nii.gz", mask, affine),
        "empty": write_volume(tmp_path / "empty.nii.gz", mask * 0, affine),
        "elsewhere": write_volume(tmp_path / "elsewhere.nii.gz", mask, np.eye(4)),
    }
    return tmp_path, paths


def test_the_montage_draws_a_row_for_each_mask(two_volumes, capsys):
    folder, paths = two_volumes
    words = ["montage", "--image", paths["image"], "--truth", paths["mask"], "--title", "case_7"]
    words += ["--labels", "a=1", "b=2", "--out", str(folder / "montage.png"), "--masks"]
    assert main([*words, f"2D round 0={paths['empty']}", f"3D round 0={paths['mask']}"]) == 0
    assert (folder / "montage.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, f"2D round 0={paths['elsewhere']}"]) == 2
    assert paths["elsewhere"] in capsys.readouterr().err
    assert main([*words, paths["mask"]]) == 2
    assert "name=file" in capsys.readouterr().err


class Page(HTMLParser):
    """Collects rows of cell texts, whether a row has a picture, links, and outside sources."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.pictures, self.links, self.sources = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "tr":
            self.rows.append([])
            self.pictures.append(0)
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "img":
            self.pictures[-1] += 1
            self.sources.append(attributes["src"])
        elif tag == "a":
            self.links.append(attributes["href"])

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_overlay_page_begins_with_the_least_confident_mask(two_volumes):
    folder, paths = two_volumes
    audit = audit_table(
        folder / "round-01/audit/train_3d.tsv",
        [
            ("sure", paths["mask"], "s", "true", "", 0.95, 1.5, "left", 0.9),
            ("unsure", paths["mask"], "s", "true", "", 0.6, 1.5, "left", ""),
            ("empty", paths["empty"], "s", "false", "no <foreground>", 0, 0, "left;right", 0.0),
        ],
    )
    cases = case_table(
        folder / "unlabelled.tsv",
        [("sure", f"{paths['image']};second_channel.nii.gz", paths["mask"]),
         ("unsure", paths["image"], ""), ("empty", paths["image"], paths["mask"])],
    )  # fmt: skip
    out = folder / "round-01/audit/train_3d.html"
    words = ["overlays", "--audit", audit, "--cases", cases, "--out", str(out)]
    words += ["--labels", "left=1", "right=2"]
    assert main([*words, "--max-cases", "2"]) == 0
    page = Page(out.read_text())
    assert '<b style="color: #32d74b">right</b>' in out.read_text()
    assert "<b>the label left is in none of the masks that teach" in out.read_text()
    assert "the label right" not in out.read_text()
    _, first, second, third = page.rows
    assert [row[1] for row in (first, second, third)] == ["empty", "unsure", "sure"]
    assert page.pictures == [0, 1, 1, 0]
    assert third[0] == "not drawn"
    assert first[2:6] == ["0.0", "0.0", "no: no <foreground>", "0.0"]
    assert second[2:6] == ["60.0", "1.5", "yes", "not known"]
    assert page.links[0] == "../../empty.nii.gz"
    assert "itksnap -g ../../image.nii.gz -s ../../empty.nii.gz" in first[6]
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_a_round_in_which_no_mask_taught_has_a_page_that_says_so(tmp_path):
    audit = audit_table(tmp_path / "round-00/audit/train_2d.tsv", [])
    cases = case_table(tmp_path / "unlabelled.tsv", [])
    out = tmp_path / "page.html"
    words = ["overlays", "--audit", audit, "--cases", cases, "--labels", "a=1", "--out", str(out)]
    assert main(words) == 0
    assert "No mask taught this network in this round." in out.read_text()
