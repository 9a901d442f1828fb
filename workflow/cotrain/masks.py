"""Mask sets on disk: in, probabilities on the preprocessed grid; out, files a person can audit.

A mask set is a folder with, for each case, `<case>.nii.gz` (labels on the image's own grid and
affine), `<case>.b2nd` (soft mask) and a row in a shard's manifest.
"""

from pathlib import Path

import blosc2
import nibabel
import numpy as np
import torch

from cotrain.files import sha256_of, write_atomically
from cotrain.nifti import write_labels
from cotrain.nnunet import Planned

LOCATIONS_PER_LABEL = 500
MANIFEST_COLUMNS = [
    "case",
    "mask",
    "mask_sha256",
    "soft",
    "soft_sha256",
    "confidence",
    "volume_ml",
    "seconds",
]


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


def confidence_of(soft: np.ndarray) -> float:
    """Return the mean probability of the predicted label over predicted foreground voxels.

    soft: `(C-1, Z, Y, X)` uint8. 0 for an empty mask.
    """
    highest = soft.max(0)
    background = 255 - soft.sum(0, dtype=np.int32)
    foreground = highest > background
    return float(highest[foreground].mean() / 255) if foreground.any() else 0.0


def foreground_locations(soft: np.ndarray) -> dict[str, list]:
    """Return up to 500 voxels `[z, y, x]` for each label's index, where training aims patches.

    soft: `(C-1, Z, Y, X)` uint8. Chosen at even steps, so that the choice needs no seed.
    """
    label_index = np.concatenate(
        [255 - soft.sum(0, keepdims=True, dtype=np.int32), soft.astype(np.int32)]
    ).argmax(0)
    locations = {}
    for label in range(1, soft.shape[0] + 1):
        voxels = np.argwhere(label_index == label)
        chosen = np.linspace(0, len(voxels) - 1, min(len(voxels), LOCATIONS_PER_LABEL))
        locations[str(label)] = voxels[chosen.astype(int)].tolist()
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


def labels_on_image_grid(scores: torch.Tensor, properties: dict, planned: Planned) -> np.ndarray:
    """Return label values `(Z, Y, X)` on the image's own grid, in nnU-Net's axis order.

    scores: `(C, Z, Y, X)` logits or probabilities on the preprocessed grid, resampled as nnU-Net
    does it, then the highest wins. properties: what preprocessing stored with the case.
    """
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape,
    )

    return convert_predicted_logits_to_segmentation_with_correct_shape(
        scores,
        planned.manager,
        planned.configuration("3d"),
        planned.labels,
        properties,
        num_threads_torch=torch.get_num_threads(),
    )


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
    write_labels(labels.transpose(2, 1, 0).astype(np.uint8), like=image, path=mask_path)
    voxel_ml = abs(np.linalg.det(nibabel.load(image).affine[:3, :3])) / 1000
    return {
        "case": case,
        "mask": mask_path.name,
        "mask_sha256": sha256_of(mask_path),
        "soft": soft_path.name,
        "soft_sha256": sha256_of(soft_path),
        "confidence": f"{confidence_of(soft):.4f}",
        "volume_ml": f"{np.count_nonzero(labels) * voxel_ml:.4f}",
        "seconds": f"{seconds:.2f}",
    }
