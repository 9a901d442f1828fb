"""The mean of two networks: in, two mask sets of the same cases; out, a third one.

Probabilities are averaged on the preprocessed grid; the labels come from the averages.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cotrain.inference import add_mask_set_arguments, make_mask_set
from cotrain.masks import open_soft, quantised, with_background
from cotrain.nnunet import Planned
from cotrain.settings import Section
from cotrain.shards import manifests_of

SLICES = 8
"""Slices averaged at a time."""


def mean_of(soft_masks: list[np.ndarray]) -> torch.Tensor:
    """Return `(K, Z, Y, X)` float32 mean probabilities of soft masks `(K-1, Z, Y, X)` uint8."""
    return torch.from_numpy(np.mean([with_background(each) for each in soft_masks], axis=0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain merge`."""
    parser.add_argument("--masks", type=Path, nargs=2, required=True, help="the two mask sets")
    add_mask_set_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain merge`."""
    torch.set_num_threads(arguments.threads)
    planned = Planned.read(arguments.preprocessed)

    def slabs_of(arrays: str) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        masks = [open_soft(folder / f"{Path(arrays).name}.b2nd") for folder in arguments.masks]
        depth, chunk = masks[0].shape[1], masks[0].chunks[1]
        for z in range(0, depth, chunk):
            read = [each[:, z : z + chunk] for each in masks]
            # As float32 with the background, a chunk of many labels is gigabytes.
            for first in range(0, read[0].shape[1], SLICES):
                mean = mean_of([each[:, first : first + SLICES] for each in read])
                yield mean, quantised(mean)

    manifests = [each for folder in arguments.masks for each in manifests_of(folder)]
    make_mask_set(
        arguments,
        planned,
        inputs=[arguments.preprocessed / "plans.json"],
        sources=manifests,
        slabs_of=slabs_of,
        settings=Section(),
        masks=[str(each) for each in arguments.masks],
    )
