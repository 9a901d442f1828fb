"""Scores worked by hand on masks that one can draw, on a grid of 1 x 2 x 4 mm."""

import numpy as np
import pytest
from medpy.metric import binary

from cotrain.errors import InputError
from cotrain.metrics import score_case

SPACING_MM = (1.0, 2.0, 4.0)


def mask(*voxels, shape=(5, 6, 4), value=1):
    array = np.zeros(shape, np.uint8)
    for voxel in voxels:
        array[voxel] = value
    return array


def score(prediction, truth, *, spacing_mm=SPACING_MM):
    (row,) = score_case(prediction, truth, labels={"organ": 1}, spacing_mm=spacing_mm)
    assert row.pop("label") == "organ"
    return row


def test_equal_masks_score_perfectly():
    truth = mask((1, 1, 1), (1, 2, 1), (2, 1, 1))
    assert score(truth, truth) == {
        "dice": 1, "jaccard": 1, "hd95_mm": 0, "asd_mm": 0, "hd95_voxel": 0, "asd_voxel": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("axis", "mm"), [(0, 1.0), (1, 2.0), (2, 4.0)])
def test_a_neighbour_along_each_axis_is_one_voxel_and_its_edge_in_mm_away(axis, mm):
    here, there = [2, 2, 2], [2, 2, 2]
    there[axis] = 1
    assert score(mask(tuple(there)), mask(tuple(here))) == {
        "dice": 0, "jaccard": 0, "hd95_mm": mm, "asd_mm": mm, "hd95_voxel": 1, "asd_voxel": 1,
    }  # fmt: skip


def test_surface_distance_is_directed_and_hausdorff_is_the_percentile_of_both_directions():
    """Truth is one voxel; the prediction has it and another, 2 voxels of 2 mm away."""
    truth = mask((2, 1, 1))
    prediction = mask((2, 1, 1), (2, 3, 1))
    scores = score(prediction, truth)
    # 2 * 1 / (2 + 1) and 1 / 2
    assert scores["dice"] == pytest.approx(2 / 3)
    assert scores["jaccard"] == pytest.approx(1 / 2)
    # From the prediction: 0 and 4 mm. From the truth: 0.
    assert scores["asd_mm"] == pytest.approx(2)
    assert scores["asd_voxel"] == pytest.approx(1)
    # The 95th percentile of 0, 0, 4 lies 0.9 of the way from the second to the third.
    assert scores["hd95_mm"] == pytest.approx(3.6)
    assert scores["hd95_voxel"] == pytest.approx(1.8)

    swapped = score(truth, prediction)
    assert swapped["asd_mm"] == 0
    assert swapped["hd95_mm"] == pytest.approx(3.6)


def test_two_empty_masks_agree():
    assert score(mask(), mask()) == {
        "dice": 1, "jaccard": 1, "hd95_mm": 0, "asd_mm": 0, "hd95_voxel": 0, "asd_voxel": 0,
    }  # fmt: skip


@pytest.mark.parametrize("empty", ["prediction", "truth"])
def test_one_empty_mask_is_the_images_diagonal_away(empty):
    """3 x 4 x 12 voxels have a diagonal of 13; 12 x 16 x 21 mm have one of 29."""
    nothing, something = mask(shape=(3, 4, 12)), mask((1, 1, 1), shape=(3, 4, 12))
    pair = (nothing, something) if empty == "prediction" else (something, nothing)
    assert score(*pair, spacing_mm=(4.0, 4.0, 1.75)) == {
        "dice": 0, "jaccard": 0, "hd95_mm": 29, "asd_mm": 29, "hd95_voxel": 13, "asd_voxel": 13,
    }  # fmt: skip


def test_each_label_is_scored_by_itself():
    prediction = mask((1, 1, 1)) + mask((3, 3, 3), value=2)
    truth = mask((1, 1, 1)) + mask((3, 4, 3), value=2)
    first, second = score_case(
        prediction, truth, labels={"anterior": 1, "posterior": 2}, spacing_mm=SPACING_MM
    )
    assert (first["label"], first["dice"]) == ("anterior", 1)
    assert (second["label"], second["dice"], second["hd95_mm"]) == ("posterior", 0, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_crop_changes_nothing_even_at_the_images_edge(seed):
    generator = np.random.default_rng(seed)
    prediction, truth = np.zeros((2, 14, 11, 9), np.uint8)
    prediction[0:5, 3:8, 2:6] = generator.random((5, 5, 4)) < 0.7
    truth[1:6, 2:7, 2:9] = generator.random((5, 5, 7)) < 0.7
    scores = score(prediction, truth)
    assert scores["hd95_mm"] == binary.hd95(prediction, truth, SPACING_MM)
    assert scores["asd_mm"] == binary.asd(prediction, truth, SPACING_MM)
    assert scores["hd95_voxel"] == binary.hd95(prediction, truth)
    assert scores["asd_voxel"] == binary.asd(prediction, truth)


def test_a_value_that_no_label_has_is_refused():
    with pytest.raises(InputError, match=r"mask holds the value 3.*organ=1"):
        score(mask((0, 0, 0), value=3), mask())
    with pytest.raises(InputError, match=r"true label holds the value 3"):
        score(mask(), mask((0, 0, 0), value=3))
