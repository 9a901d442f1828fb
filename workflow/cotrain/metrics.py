"""Scores of one predicted mask against one true mask: in, two label arrays; out, rows of numbers.

The distances come from `medpy.metric.binary`, the library of the UA-MT and M&N line of papers, so
that numbers in voxels can be set beside theirs. Its definitions, with S(A) the voxels of A that
have a background face neighbour (or lie on the image's edge), and d(a, S) the Euclidean distance
from a voxel to the nearest voxel of S:

- `hd95(P, T)`: the 95th percentile of the pooled list {d(p, S(T)) : p in S(P)} and
  {d(t, S(P)) : t in S(T)}; it is symmetric. (Other libraries take the larger of two percentiles.)
- `asd(P, T)`: the mean of d(p, S(T)) over p in S(P): *directed*, from the prediction to the truth,
  as those papers report it; not the symmetric mean, which medpy calls `assd`.

Empty masks have no surface. What they score is fixed here, and finite, so that means over cases
stay comparable between methods:

- both empty: Dice 1, Jaccard 1, every distance 0;
- one empty: Dice 0, Jaccard 0, every distance the image's diagonal, sqrt(sum((n_i * s_i)^2)) over
  its axes with n_i voxels of s_i mm (s_i = 1 for voxels): longer than any distance in the image.
"""

import numpy as np

from cotrain.errors import InputError

DISTANCES = ("hd95_mm", "asd_mm", "hd95_voxel", "asd_voxel")
SCORES = ("dice", "jaccard", *DISTANCES)


def score_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    labels: dict[str, int],
    spacing_mm: tuple[float, ...],
) -> list[dict[str, str | float]]:
    """Return one row per label: `label`, `dice`, `jaccard` (0..1) and the four distances.

    `prediction` and `truth` are label arrays of one shape, axes in any order; `spacing_mm` has the
    voxel's size along each of those axes. `labels` names the foreground values; 0 is background.
    The definitions, also for empty masks, are at the top of this file.

    Raises InputError where an array holds a value that no label has.
    """
    _check_values("mask", prediction, labels)
    _check_values("true label", truth, labels)
    return [
        {"label": name} | _score_binary(prediction == value, truth == value, spacing_mm=spacing_mm)
        for name, value in labels.items()
    ]


def _check_values(what: str, array: np.ndarray, labels: dict[str, int]) -> None:
    """Raise InputError where `array` holds a value that is neither 0 nor a label's."""
    unknown = sorted(set(np.unique(array).tolist()) - {0} - set(labels.values()))
    if unknown:
        found = ", ".join(f"{value:g}" for value in unknown[:5])
        known = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise InputError(
            f"The {what} holds the value {found}, which no label has (labels: {known}); "
            "name it among the labels or mend the file."
        )


def _score_binary(
    prediction: np.ndarray, truth: np.ndarray, *, spacing_mm: tuple[float, ...]
) -> dict[str, float]:
    """Return the scores of two boolean arrays of one shape."""
    from medpy.metric import binary

    if not prediction.any() and not truth.any():
        return {"dice": 1.0, "jaccard": 1.0} | dict.fromkeys(DISTANCES, 0.0)
    if not prediction.any() or not truth.any():
        in_voxels = float(np.linalg.norm(truth.shape))
        in_mm = float(np.linalg.norm(np.multiply(truth.shape, spacing_mm)))
        return {
            "dice": 0.0,
            "jaccard": 0.0,
            "hd95_mm": in_mm,
            "asd_mm": in_mm,
            "hd95_voxel": in_voxels,
            "asd_voxel": in_voxels,
        }
    # Both masks end inside the box, so the crop moves no surface voxel; it only spares the
    # distance transform, which costs minutes on a whole CT, the empty rest of the image.
    box = _box_around(prediction | truth)
    prediction, truth = prediction[box], truth[box]
    return {
        "dice": float(binary.dc(prediction, truth)),
        "jaccard": float(binary.jc(prediction, truth)),
        "hd95_mm": float(binary.hd95(prediction, truth, voxelspacing=spacing_mm)),
        "asd_mm": float(binary.asd(prediction, truth, voxelspacing=spacing_mm)),
        "hd95_voxel": float(binary.hd95(prediction, truth)),
        "asd_voxel": float(binary.asd(prediction, truth)),
    }


def _box_around(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the slices of the smallest box that holds every true voxel of a mask not empty."""
    return tuple(slice(int(along.min()), int(along.max()) + 1) for along in np.nonzero(mask))
