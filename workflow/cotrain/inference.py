"""Inference of masks: in, a checkpoint and preprocessed cases; out, a mask set on disk.

Always by sliding window of the training patch: instance normalisation over another field of view
costs several points of Dice, in pseudo-masks and scores alike. Windows are read one by one from
the compressed volume, slices of the 2D network in batches.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
import pandas as pd
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.inference.sliding_window_prediction import (
    compute_gaussian,
    compute_steps_for_sliding_window,
)
from torch import nn

from cotrain.device import autocast, device_of, precision_of
from cotrain.errors import InputError
from cotrain.files import read_table, sha256_of, write_table
from cotrain.masks import MANIFEST_COLUMNS, labels_on_image_grid, quantised, write_mask
from cotrain.nnunet import Planned, arrays_of, manifests_of
from cotrain.provenance import write_provenance
from cotrain.settings import Inference, InferStage, load
from cotrain.shards import shard_of
from cotrain.workfolder import WorkFolder


def load_deployed(planned: Planned, checkpoint: Path, network: str) -> nn.Module:
    """Return the network that a training checkpoint deploys, in eval mode, on the CPU.

    That is the moving average of its weights where the training kept one. Raises InputError where
    the checkpoint is of the other network.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if content["network_name"] != network:
        raise InputError(
            f"{checkpoint} holds the {content['network_name']} network, wanted the {network} "
            "network; give the checkpoint of that network."
        )
    built = planned.build_network(network, deep_supervision=False)
    built.load_state_dict(content["average_weights"] or content["network_weights"])
    return built.eval()


def windows(
    shape: tuple[int, ...], patch_size: tuple[int, ...], *, step: float, slices_at_once: int
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield boxes `((z0, z1), (y0, y1), (x0, x1))` that cover a volume of `shape`.

    A 2D patch gives boxes of up to `slices_at_once` whole-depth slices. Where the volume is
    smaller than the patch a box reaches past it on both sides; the first index may be negative.
    """
    if len(patch_size) == 2:
        depth_boxes = [
            (z, min(z + slices_at_once, shape[0])) for z in range(0, shape[0], slices_at_once)
        ]
        in_plane = zip(shape[1:], patch_size, strict=True)
        axes = [depth_boxes] + [_boxes_along(size, patch, step) for size, patch in in_plane]
    else:
        axes = [_boxes_along(*pair, step) for pair in zip(shape, patch_size, strict=True)]
    yield from itertools.product(*axes)


def _boxes_along(size: int, patch: int, step: float) -> list[tuple[int, int]]:
    """Return nnU-Net's window positions along an axis; a small image is centred in the patch."""
    padded = max(size, patch)
    before = (padded - size) // 2
    starts = compute_steps_for_sliding_window((padded,), (patch,), step)[0]
    return [(start - before, start - before + patch) for start in starts]


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    image: blosc2.NDArray | np.ndarray,
    *,
    patch_size: tuple[int, ...],
    class_count: int,
    slices_at_once: int,
    inference: Inference,
    device: torch.device,
    precision: str,
) -> torch.Tensor:
    """Return logits `(K, Z, Y, X)` float16 on the CPU, averaged over overlapping windows.

    image: `(C, Z, Y, X)` float32 on the preprocessed grid; only windows of it are read. Windows
    count by a Gaussian around their centre, as in nnU-Net. Raises InputError where logits are not
    finite.
    """
    shape = image.shape[1:]
    total = torch.zeros((class_count, *shape), dtype=torch.float16)
    weight = torch.zeros(shape, dtype=torch.float16)
    gaussian = compute_gaussian(
        tuple(patch_size), sigma_scale=1 / 8, value_scaling_factor=10, device=device
    )
    flat = len(patch_size) == 2
    for box in windows(
        shape, patch_size, step=inference.tile_step_size, slices_at_once=slices_at_once
    ):
        patch = torch.from_numpy(crop_and_pad_nd(image, [list(each) for each in box], 0))
        batch = patch.float().to(device).movedim(1, 0) if flat else patch.float().to(device)[None]
        with autocast(device, precision):
            logits = _mirrored_mean(network, batch) if inference.mirroring else network(batch)
        logits = logits.float() * gaussian
        logits = logits.movedim(0, 1) if flat else logits[0]
        inside = [
            slice(max(0, low), min(size, high))
            for (low, high), size in zip(box, shape, strict=True)
        ]
        own = [
            slice(part.start - low, part.stop - low)
            for part, (low, _) in zip(inside, box, strict=True)
        ]
        total[(slice(None), *inside)] += logits[(slice(None), *own)].cpu()
        weight[tuple(inside)] += gaussian[tuple(own[1:] if flat else own)].cpu()
    total /= weight
    if not torch.isfinite(total.sum(dtype=torch.float32)):
        raise InputError(
            "The network's output is not finite; train with a lower learning rate or set "
            "compute.precision to fp32."
        )
    return total


def _mirrored_mean(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean of a network's logits over all mirrored copies of a batch."""
    axes = range(2, batch.ndim)
    flips = [list(c) for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    return sum(torch.flip(network(torch.flip(batch, each)), each) for each in flips) / len(flips)


def soft_mask_of(logits: torch.Tensor) -> np.ndarray:
    """Return the quantised soft mask `(K-1, Z, Y, X)` uint8 of logits, a slice at a time."""
    slices = [quantised(torch.softmax(logits[:, [z]].float(), 0)) for z in range(logits.shape[1])]
    return np.concatenate(slices, axis=1)


def add_mask_set_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that every command which writes a mask set takes."""
    parser.add_argument("--preprocessed", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--split", choices=["unlabelled", "test"], required=True)
    parser.add_argument("--cases", type=Path, required=True, help="checked case table")
    parser.add_argument("--shard", type=int, default=0, help="number of this shard, from 0")
    parser.add_argument("--shards", type=int, default=1, help="number of shards")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the mask set")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain infer`."""
    parser.add_argument("--network", choices=["2d", "3d"], required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a training")
    parser.add_argument("--settings", type=Path, required=True, help="settings of this stage")
    add_mask_set_arguments(parser)


def make_mask_set(
    arguments: argparse.Namespace,
    planned: Planned,
    *,
    inputs: list[Path],
    scores_of,
    settings,
    **facts: object,
) -> None:
    """Write the mask set of one shard, going on after the last finished case.

    scores_of: function of a case's path without suffix that returns `(scores, soft)`: logits or
    probabilities `(K, Z, Y, X)` and the soft mask `(K-1, Z, Y, X)` uint8. inputs: files whose
    change makes finished cases worthless. facts: added to the provenance.
    """
    rows = shard_of(
        read_table(arguments.cases).to_dict("records"), arguments.shard, arguments.shards
    )
    inputs = [*inputs, *manifests_of(arguments.preprocessed / arguments.split)]
    identity = {
        "cases": [row["case"] for row in rows],
        "inputs": {str(path): sha256_of(path) for path in inputs},
        **facts,
    }
    work = WorkFolder(arguments.out_dir / "work", identity, name=f"shard-{arguments.shard}")
    with work:
        finished = work.folder / f"shard-{arguments.shard}.finished.jsonl"
        if not work.resumable:
            finished.unlink(missing_ok=True)
        work.claim()
        manifest = _finished_rows(finished)
        if manifest:
            print(f"Resuming after {len(manifest)} finished cases.", flush=True)
        for number, row in enumerate(rows[len(manifest) :], start=len(manifest) + 1):
            began = time.time()
            arrays = arrays_of(arguments.preprocessed / arguments.split, row["case"])
            scores, soft = scores_of(arrays)
            labels = labels_on_image_grid(scores, load_pickle(arrays + ".pkl"), planned)
            made = write_mask(
                row["case"],
                row["image"].split(";")[0],
                labels=labels,
                soft=soft,
                out_dir=arguments.out_dir,
                planned=planned,
                seconds=time.time() - began,
            )
            manifest.append(made)
            with open(finished, "a") as opened:
                opened.write(json.dumps(made) + "\n")
            left = work.report(number, len(rows), "cases")
            print(
                f"{number}/{len(rows)} {row['case']}  {float(made['volume_ml']):.2f} ml  "
                f"confidence {made['confidence']}  {made['seconds']} s  {left:.0f} s left",
                flush=True,
            )
        write_provenance(
            arguments.out_dir / f"provenance-{arguments.shard}.json",
            settings=settings,
            seed=None,
            inputs=inputs,
            **facts,
        )
        write_table(
            pd.DataFrame(manifest, columns=MANIFEST_COLUMNS),
            arguments.out_dir / f"manifest-{arguments.shard}.tsv",
        )
        finished.unlink(missing_ok=True)
        for left_over in arguments.out_dir.glob("manifest-*.tsv"):
            # From a run with more shards.
            if int(left_over.stem.removeprefix("manifest-")) >= arguments.shards:
                left_over.unlink()


def _finished_rows(path: Path) -> list[dict]:
    """Return the manifest rows of finished cases; a line cut short by a kill does not count."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    rows = [json.loads(line) for line in lines[:-1]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain infer`."""
    torch.set_num_threads(arguments.threads)
    stage = load(arguments.settings, model=InferStage)
    planned = Planned.read(arguments.preprocessed)
    device = device_of(stage.compute)
    precision = precision_of(stage.compute, device)
    configuration = planned.configuration(arguments.network)
    network = load_deployed(planned, arguments.checkpoint, arguments.network).to(device)

    def scores_of(arrays: str) -> tuple[torch.Tensor, np.ndarray]:
        logits = predict_logits(
            network,
            blosc2.open(arrays + ".b2nd", mode="r", mmap_mode="r", dparams={"nthreads": 1}),
            patch_size=tuple(configuration.patch_size),
            class_count=planned.class_count,
            slices_at_once=configuration.batch_size,
            inference=stage.inference,
            device=device,
            precision=precision,
        )
        return logits, soft_mask_of(logits)

    make_mask_set(
        arguments,
        planned,
        inputs=[arguments.checkpoint, arguments.settings, arguments.preprocessed / "plans.json"],
        scores_of=scores_of,
        settings=stage,
        network=arguments.network,
        precision=precision,
        device=str(device),
    )
