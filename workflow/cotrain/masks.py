"""Mask sets on disk: in, probabilities on the preprocessed grid; out, files a person can audit.

A mask set is a folder with, for each case, `<case>.nii.gz` (labels on the image's own grid and
affine), `<case>.b2nd` (soft mask) and a row in a shard's manifest.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import torch

from cotrain.errors import InputError
from cotrain.files import sha256_of, write_atomically
from cotrain.nifti import voxel_volume_ml, write_labels
from cotrain.nnunet import Planned
from cotrain.review import absent_labels

LOCATIONS_PER_LABEL = 500
SLICE_BY_SLICE = {
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "is_seg": False,
    "order": 1,
    "order_z": 0,
}
"""nnU-Net's default resampling of probabilities, which this module repeats slice by slice."""
MANIFEST_COLUMNS = [
    "case",
    "mask",
    "mask_sha256",
    "soft",
    "soft_sha256",
    "confidence",
    "volume_ml",
    "absent",
    "seconds",
]
"""`absent`: names of the labels that a mask holds no voxel of, separated by `;`."""


def quantised(probabilities: torch.Tensor) -> np.ndarray:
    """Return foreground probabilities as uint8.

    probabilities: `(C, Z, Y, X)` float, summing to 1 over C. Returns `(C-1, Z, Y, X)` uint8,
    round(255 p); the background is what is missing to 255.
    """
    return (probabilities[1:] * 255).round_().to(torch.uint8).cpu().numpy()


def with_background(soft: np.ndarray) -> np.ndarray:
    """Return `(C, ...)` float32 probabilities of a quantised soft mask `(C-1, ...)` uint8.

    Rounding can make the foreground sum up to slightly more than 1; the background is then 0.
    """
    foreground = soft.astype(np.float32) / 255
    background = np.clip(1 - foreground.sum(0, keepdims=True), 0, None)
    return np.concatenate([background, foreground])


def labels_of(soft: np.ndarray) -> np.ndarray:
    """Return the most probable label index `(Z, Y, X)` uint8 of `(C-1, Z, Y, X)` uint8."""
    labels = np.empty(soft.shape[1:], dtype=np.uint8)
    for z in range(soft.shape[1]):
        background = 255 - soft[:, [z]].sum(0, dtype=np.int16)
        labels[z] = np.concatenate([background, soft[:, z].astype(np.int16)]).argmax(0)
    return labels


def confidence_of(soft: np.ndarray) -> float:
    """Return the mean probability of the predicted label over predicted foreground voxels.

    soft: `(C-1, Z, Y, X)` uint8. 0 for an empty mask.
    """
    total = count = 0
    for z in range(soft.shape[1]):
        highest = soft[:, z].max(0)
        foreground = highest > 255 - soft[:, z].sum(0, dtype=np.int16)
        total += int(highest[foreground].sum(dtype=np.int64))
        count += int(foreground.sum())
    return total / count / 255 if count else 0.0


def foreground_locations(soft: np.ndarray) -> dict[str, list]:
    """Return up to 500 voxels `[z, y, x]` for each label's index, where training aims patches.

    soft: `(C-1, Z, Y, X)` uint8. Chosen at even steps, so that the choice needs no seed.
    """
    labels = labels_of(soft)
    locations = {}
    for label in range(1, soft.shape[0] + 1):
        in_slices = np.array([np.count_nonzero(plane == label) for plane in labels])
        before = np.concatenate([[0], np.cumsum(in_slices)])
        count = int(before[-1])
        chosen = np.linspace(0, count - 1, min(count, LOCATIONS_PER_LABEL)).astype(int)
        found = []
        for z in np.flatnonzero(in_slices):
            here = chosen[(chosen >= before[z]) & (chosen < before[z + 1])] - before[z]
            voxels = np.argwhere(labels[z] == label)[here]
            found += [[int(z), *voxel] for voxel in voxels.tolist()]
        locations[str(label)] = found
    return locations


def write_soft(soft: np.ndarray, path: Path, *, patch_size: tuple[int, ...]) -> None:
    """Write `(C-1, Z, Y, X)` uint8 as Blosc2, chunked for reading patches of `patch_size`."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

    blocks, chunks = comp_blosc2_params(soft.shape, tuple(patch_size), soft.itemsize)
    with write_atomically(path) as temporary:
        temporary.unlink(missing_ok=True)
        stored = blosc2.asarray(
            np.ascontiguousarray(soft),
            urlpath=str(temporary),
            blocks=blocks,
            chunks=chunks,
            cparams={"codec": blosc2.Codec.ZSTD, "clevel": 5, "nthreads": 1},
        )
        stored.schunk.vlmeta["foreground_locations"] = foreground_locations(soft)
        del stored


def open_soft(path: str | Path) -> blosc2.NDArray:
    """Open a soft mask; slices of it are read chunk by chunk."""
    return blosc2.open(str(path), mode="r", dparams={"nthreads": 1})


def resampling_of_probabilities(planned: Planned) -> dict:
    """Return how the plans resample probabilities to an image's grid.

    Raises InputError where it is not nnU-Net's default, the one that is done slice by slice.
    """
    configuration = planned.configuration("3d").configuration
    asked_for = {
        "resampling_fn_probabilities": configuration["resampling_fn_probabilities"],
        **configuration["resampling_fn_probabilities_kwargs"],
    }
    if asked_for != {**asked_for, **SLICE_BY_SLICE}:
        raise InputError(
            f"The plans resample probabilities with {asked_for}, but only nnU-Net's default "
            f"({SLICE_BY_SLICE}) can be done slice by slice; take a planner that keeps it as "
            "network_3d.planner."
        )
    return asked_for


def labels_on_image_grid(
    slabs: Iterable[torch.Tensor],
    properties: dict,
    planned: Planned,
    *,
    depth: int,
    threads: int = 1,
) -> np.ndarray:
    """Return label values `(Z, Y, X)` uint8 on the image's own grid, in nnU-Net's axis order.

    slabs: logits or probabilities `(C, d, Y, X)` of the preprocessed grid from its first slice to
    its last; `depth`: their slices in all. properties: what preprocessing stored with the case.
    threads: slices that are resampled at a time, while slabs to come are computed.

    Resampled as nnU-Net's default `resample_data_or_seg_to_shape` does it for probabilities
    (linear, or along an axis of thick slices nearest), then the highest wins; but slice by slice,
    because nnU-Net holds all classes of the fine grid in float64. Raises InputError as
    `resampling_of_probabilities` does.
    """
    from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

    configuration = planned.configuration("3d")
    asked_for = resampling_of_probabilities(planned)
    spacing_mm = [properties["spacing"][axis] for axis in planned.manager.transpose_forward]
    labels = np.zeros(properties["shape_before_cropping"], dtype=np.uint8)
    inside = labels[tuple(slice(*pair) for pair in properties["bbox_used_for_cropping"])]
    separate, axis = determine_do_sep_z_and_axis(
        asked_for["force_separate_z"], configuration.spacing, spacing_mm
    )
    planes = (plane for slab in slabs for plane in slab.movedim(1, 0).numpy())

    def in_plane(plane: np.ndarray) -> np.ndarray:
        return configuration.resampling_fn_probabilities(
            plane[:, None].astype(np.float64),
            (1, *inside.shape[1:]),
            configuration.spacing,
            spacing_mm,
        )[:, 0]

    resampled = _along_z(
        _in_order(in_plane, planes, threads=threads),
        depth=depth,
        wanted=len(inside),
        nearest=separate and axis == 0,
    )
    for z, plane in enumerate(resampled):
        # Rounded to half precision as stock nnU-Net's are, so that ties fall as there.
        inside[z] = plane.astype(np.float16).argmax(0)
    return labels.transpose(planned.manager.transpose_backward)


def _in_order(
    function: Callable[[np.ndarray], np.ndarray], items: Iterator[np.ndarray], *, threads: int
) -> Iterator[np.ndarray]:
    """Yield a function of each item in order, so many made at a time, and few ahead."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        for made in waiting:
            yield made.result()


def _along_z(
    planes: Iterator[np.ndarray], *, depth: int, wanted: int, nearest: bool
) -> Iterator[np.ndarray]:
    """Yield `wanted` planes at even steps through all `depth` planes, which come in order."""
    positions = np.clip((np.arange(wanted) + 0.5) * depth / wanted - 0.5, 0, depth - 1)
    if nearest:
        positions = np.floor(positions + 0.5)
    below, index = next(planes), 0
    above = next(planes, below)
    for position in positions:
        while index < int(position):
            below, above = above, next(planes, above)
            index += 1
        share = position - index
        yield (1 - share) * below + share * above if share else below
    # The last planes may count for nothing here, but with the planes comes the soft mask.
    for _ in planes:
        pass


def write_mask(
    case: str,
    image: str,
    *,
    labels: np.ndarray,
    soft: np.ndarray,
    out_dir: Path,
    planned: Planned,
    seconds: float,
) -> dict:
    """Write a case's two files and return its manifest row.

    labels: `(Z, Y, X)` on the image's grid; soft: `(C-1, Z, Y, X)` uint8 on the preprocessed grid;
    image: path of the image whose grid and affine the mask gets.
    """
    soft_path, mask_path = out_dir / f"{case}.b2nd", out_dir / f"{case}.nii.gz"
    write_soft(soft, soft_path, patch_size=planned.configuration("3d").patch_size)
    # nnU-Net's arrays are (Z, Y, X), NIfTI's are (X, Y, Z).
    write_labels(labels.transpose(2, 1, 0), like=image, path=mask_path)
    # An edit in place would teach nothing: a viewer is to save it under a new name.
    mask_path.chmod(0o444)
    voxel_ml = voxel_volume_ml(nibabel.load(image).affine)
    return {
        "case": case,
        "mask": mask_path.name,
        "mask_sha256": sha256_of(mask_path),
        "soft": soft_path.name,
        "soft_sha256": sha256_of(soft_path),
        "confidence": f"{confidence_of(soft):.4f}",
        "volume_ml": f"{np.count_nonzero(labels) * voxel_ml:.6g}",
        "absent": absent_labels(np.unique(labels).tolist(), planned.dataset["labels"]),
        "seconds": f"{seconds:.2f}",
    }
