"""A slice with its neighbours: in, an image and a box; out, what a 2D network sees of it."""

from collections.abc import Sequence

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd


def patch_of(
    image: blosc2.NDArray | np.ndarray,
    box: Sequence[Sequence[int]],
    *,
    adjacent_slices: int,
    outside: int = 0,
) -> torch.Tensor:
    """Return a box `((z0, z1), (y0, y1), (x0, x1))` of an image as `(C, z + 2n, y, x)` float32.

    image: `(C, Z, Y, X)`; only the box is read. n: `adjacent_slices` more before and after it.
    outside: value past the image's ends.
    """
    (low, high), *in_plane = map(list, box)
    wider = [[low - adjacent_slices, high + adjacent_slices], *in_plane]
    return torch.from_numpy(crop_and_pad_nd(image, wider, outside)).float()


def slices_of(patch: torch.Tensor, *, adjacent_slices: int) -> torch.Tensor:
    """Return the slices `(z, C * (1 + 2n), y, x)` of a patch `(C, z + 2n, y, x)`.

    Each comes with its n = `adjacent_slices` neighbours on each side as channels, all of the first
    image channel first.
    """
    neighbours = patch.unfold(1, 1 + 2 * adjacent_slices, 1)  # (C, z, y, x, 1 + 2n)
    return neighbours.permute(1, 0, 4, 2, 3).flatten(1, 2)
