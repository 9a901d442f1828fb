"""Training batches: in, preprocessed cases and audited pseudo-masks; out, augmented patches.

Cropping follows nnU-Net's data loader and augmentation *is* nnU-Net's. Unlike stock, each
sample's random state is a function of (seed, network, epoch, iteration, slot), so that a resumed
training draws the very batches an undisturbed one would have drawn.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import blosc2
import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from cotrain.masks import open_soft
from cotrain.nnunet import Planned
from cotrain.slices import patch_of, slices_of
from cotrain.team import Place

FOREGROUND_OVERSAMPLING = 0.33
"""nnU-Net's share of patches aimed at foreground, rounded to whole samples of a batch as there."""
BATCHES_AHEAD = 6
"""Least number of batches that are made ahead of a GPU, as nnU-Net keeps them; each worker one."""
STREAMS = {"2d": 2, "3d": 3}
"""Number of each network in the seed of its samples."""


@dataclass(frozen=True)
class Case:
    """A case a network trains on.

    arrays: path of the preprocessed case without suffix. soft: its teacher's soft mask, or None
    for a labelled case.
    """

    name: str
    arrays: str
    soft: str | None = None


def seed_everything(*words: int) -> None:
    """Set the global random states that nnU-Net's transforms draw from, on CPU and GPU."""
    numpy_seed, torch_seed = np.random.SeedSequence(words).generate_state(2)
    np.random.seed(numpy_seed)
    random.seed(int(numpy_seed))
    # Not torch.manual_seed: without a GPU it formats three stack traces a call, half a millisecond.
    torch.default_generator.manual_seed(int(torch_seed))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int(torch_seed))


def augmentation(
    configuration, *, mirroring: bool, adjacent_slices: int = 0
) -> tuple[object, np.ndarray]:
    """Return nnU-Net's training transforms of a configuration and the patch they start from.

    mirroring: at random along all axes. adjacent_slices: of a slice, on each side, as further
    channels.

    The ranges are those of `nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_
    size` (nnunetv2 2.8.1), which cannot be called without a trainer and its folders.
    """
    patch_size = list(configuration.patch_size)
    dimensions = len(patch_size)
    flat = dimensions == 3 and max(patch_size) / patch_size[0] > ANISO_THRESHOLD
    if dimensions == 2:
        degrees = 15 if max(patch_size) / min(patch_size) > 1.5 else 180
    else:
        degrees = 180 if flat else 30
    rotation = (-np.deg2rad(degrees), np.deg2rad(degrees))
    start = get_patch_size(patch_size, rotation, rotation, rotation, (0.85, 1.25))
    if flat:
        start[0] = patch_size[0]
    transforms = nnUNetTrainer.get_training_transforms(
        patch_size,
        rotation,
        None,
        tuple(range(dimensions)) if mirroring else (),
        flat,
        use_mask_for_norm=[
            masked
            for masked in configuration.use_mask_for_norm
            for _ in range(1 + 2 * adjacent_slices)
        ],
    )
    _make_repeatable(transforms)
    if adjacent_slices:
        _mask_by_own_slice(transforms, slices=1 + 2 * adjacent_slices)
    return transforms, start


def _make_repeatable(transforms) -> None:
    """Switch off the blur's choice of algorithm by stopwatch: it changes the last bits."""
    for transform in transforms.transforms:
        inner = getattr(transform, "transform", transform)
        if hasattr(inner, "benchmark"):
            inner.benchmark = False


def _mask_by_own_slice(transforms, *, slices: int) -> None:
    """Mask each slice by the body in itself; nnU-Net's would take the body in the first for all."""
    transforms.transforms = [
        own
        for transform in transforms.transforms
        for own in (
            [
                MaskImageTransform([channel], channel % slices, transform.set_outside_to)
                for channel in transform.apply_to_channels
            ]
            if isinstance(transform, MaskImageTransform)
            else [transform]
        )
    ]


class BatchSource(torch.utils.data.Dataset):
    """Batches of consecutive epochs by their number; an item is a whole batch.

    An item is a dictionary: `data` `(B, C, ...)` float32, `target` `(B, K, ...)` float32
    probabilities of K classes (one-hot for labelled samples), labelled samples first.

    counts: `(epochs, iterations)` int, unlabelled samples of each batch; the rest is labelled.
    place: of several processes that train together each makes its own share of the same batches.
    """

    def __init__(
        self,
        planned: Planned,
        network: str,
        *,
        labelled: list[Case],
        unlabelled: list[Case],
        counts: np.ndarray,
        seed: int,
        first_epoch: int,
        mirroring: bool,
        place: Place | None = None,
    ) -> None:
        configuration = planned.configuration(network)
        self.adjacent_slices = planned.adjacent_slices(network)
        self.patch_size = list(configuration.patch_size)
        self.batch_size = configuration.batch_size
        self.slots = (place or Place()).share_of(self.batch_size)
        self.class_count = planned.class_count
        # nnU-Net then sets voxels outside the body to 0, which the stored segmentation marks.
        self.masks_image = any(configuration.use_mask_for_norm)
        self.transforms, start = augmentation(
            configuration, mirroring=mirroring, adjacent_slices=self.adjacent_slices
        )
        self.labelled, self.unlabelled = labelled, unlabelled
        self.counts, self.seed, self.first_epoch = counts, seed, first_epoch
        self.stream = STREAMS[network]
        # Only its choice of patches is used; it reads sizes, not data.
        self.cropper = nnUNetDataLoader(
            _Names([case.name for case in labelled]),
            self.batch_size,
            start,
            self.patch_size,
            planned.labels,
            oversample_foreground_percent=FOREGROUND_OVERSAMPLING,
        )

    def __len__(self) -> int:
        return self.counts.size

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        data, target = [], []
        epoch, iteration = divmod(number, self.counts.shape[1])
        words = (self.seed, self.stream, self.first_epoch + epoch, iteration)
        # Which slots are aimed at foreground is drawn, so that labelled and pseudo-labelled
        # samples are aimed equally often; how many are is stock nnU-Net's.
        generator = np.random.default_rng(words)
        aimed_slots = generator.permutation(self.batch_size)
        random_slots = round(self.batch_size * (1 - FOREGROUND_OVERSAMPLING))
        if self.batch_size == 1:
            # A third of one rounds to none, which stock's planners never plan.
            random_slots = int(generator.random() >= FOREGROUND_OVERSAMPLING)
        for slot in self.slots:
            seed_everything(*words, slot)
            if slot < self.batch_size - self.counts[epoch, iteration]:
                case = self.labelled[np.random.randint(len(self.labelled))]
            else:
                # With chances, though equal: without them numpy draws other numbers, and a training
                # that was begun before would go on with other cases.
                equal = np.full(len(self.unlabelled), 1 / len(self.unlabelled))
                case = self.unlabelled[np.random.choice(len(equal), p=equal)]
            image, probabilities = self._sample(case, aimed=aimed_slots[slot] >= random_slots)
            data.append(image)
            target.append(probabilities)
        return {"data": torch.stack(data), "target": torch.stack(target)}

    def _sample(self, case: Case, *, aimed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        image = _open(case.arrays + ".b2nd")
        locations = _locations(case.arrays, case.soft)
        lower, upper = self.cropper.get_bbox(image.shape[1:], aimed, locations)
        box = [list(pair) for pair in zip(lower, upper, strict=True)]
        beside = {
            "image": self.adjacent_slices,
            "segmentation": self.adjacent_slices if self.masks_image else 0,
            "regression_target": 0,
        }
        sample = {"image": patch_of(image, box, adjacent_slices=beside["image"])}
        if case.soft is None or self.masks_image:
            segmentation = _open(case.arrays + "_seg.b2nd")
            cropped = patch_of(
                segmentation, box, adjacent_slices=beside["segmentation"], outside=-1
            )
            sample["segmentation"] = cropped.to(torch.int16)
        if case.soft is not None:
            cropped = patch_of(_open_soft(case.soft), box, adjacent_slices=0)
            sample["regression_target"] = cropped.div_(255)
        if len(self.patch_size) == 2:
            sample = {
                name: slices_of(tensor, adjacent_slices=beside[name])[0]
                for name, tensor in sample.items()
            }
        sample = self.transforms(**sample)
        if case.soft is None:
            # Of the slice itself, which is in the middle of its neighbours.
            label = sample["segmentation"][beside["segmentation"]].long()
            target = torch.nn.functional.one_hot(label, self.class_count).movedim(-1, 0).float()
        else:
            foreground = sample["regression_target"]
            background = (1 - foreground.sum(0, keepdim=True)).clamp_min_(0)
            target = torch.cat([background, foreground])
        return sample["image"], target


class _Names:
    """The one thing nnU-Net's loader asks a data set for when it only chooses patches."""

    def __init__(self, identifiers: list[str]) -> None:
        self.identifiers = identifiers


@lru_cache(maxsize=256)
def _open(path: str) -> blosc2.NDArray:
    return blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})


_open_soft = lru_cache(maxsize=256)(open_soft)


@lru_cache(maxsize=256)
def _locations(arrays: str, soft: str | None) -> dict[int, np.ndarray]:
    """Return each label's voxels as nnU-Net's loader wants them, `(n, 4)` with a channel first."""
    if soft is None:
        found = load_pickle(arrays + ".pkl")["class_locations"]
        return {label: np.asarray(voxels) for label, voxels in found.items()}
    found = _open_soft(soft).schunk.vlmeta["foreground_locations"]
    return {
        int(label): np.pad(np.asarray(voxels, dtype=int).reshape(-1, 3), ((0, 0), (1, 0)))
        for label, voxels in found.items()
    }


def batches(
    source: BatchSource, *, workers: int, pin_memory: bool, forking: bool = True
) -> Iterator[dict]:
    """Yield all batches of a source in order, made by `workers` processes (0: in this one).

    The order and content do not depend on the number of workers. forking: start them as copies of
    this process, which is quickest, but not safe where it talks to other GPUs through NCCL.
    """
    yield from torch.utils.data.DataLoader(
        source,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        pin_memory=pin_memory,
        # Of 128 x 128 x 128 voxels and many labels a batch has hundreds of megabytes.
        prefetch_factor=-(-BATCHES_AHEAD // workers) if workers else None,
        multiprocessing_context=None if forking or not workers else "forkserver",
    )
