"""Inference of masks: in, a checkpoint and preprocessed cases; out, a mask set on disk.

Always by sliding window of the training patch: instance normalisation over another field of view
costs several points of Dice, in pseudo-masks and scores alike. Windows are read one by one from
the compressed volume, slices of the 2D network in batches.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import blosc2
import numpy as np
import pandas as pd
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.inference.sliding_window_prediction import (
    compute_gaussian,
    compute_steps_for_sliding_window,
)
from torch import nn

from cotrain.device import (
    arrange_for_cpu,
    autocast,
    device_of,
    precision_of,
    telling_what_takes_less,
)
from cotrain.errors import InputError
from cotrain.files import read_table, sha256_of, write_table, write_text
from cotrain.masks import MANIFEST_COLUMNS, labels_on_image_grid, quantised, write_mask
from cotrain.nnunet import Planned, arrays_of
from cotrain.provenance import keep_provenance
from cotrain.settings import Inference, InferStage, Section, learnt_of, load
from cotrain.shards import remove_manifests_beyond, shard_of
from cotrain.slices import patch_of, slices_of
from cotrain.workfolder import WorkFolder, content_of

OF_A_PROCESS = ("device", "precision")
"""Facts in which the processes that make a mask set may differ."""


def load_deployed(planned: Planned, checkpoint: Path, network: str) -> nn.Module:
    """Return the network that a training checkpoint deploys, in eval mode, on the CPU.

    That is the moving average of its weights where the training kept one. Raises InputError where
    the checkpoint is of the other network.
    """
    # Mapped: of a checkpoint's gigabytes, most are the optimiser's.
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
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

    A 2D patch gives boxes of one window in up to `slices_at_once` slices. Where the volume is
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
def logit_slabs(
    network: nn.Module,
    image: blosc2.NDArray | np.ndarray,
    *,
    patch_size: tuple[int, ...],
    class_count: int,
    batch_size: int,
    inference: Inference,
    device: torch.device,
    precision: str,
    adjacent_slices: int = 0,
) -> Iterator[torch.Tensor]:
    """Yield logits `(K, d, Y, X)` float16 on the device, slab after slab from the first slice to
    the last, averaged over overlapping windows.

    image: `(C, Z, Y, X)` float32 on the preprocessed grid; only windows of it are read. Never more
    slices are held than a window has. Windows count by a Gaussian around their centre, as in
    nnU-Net. adjacent_slices: on each side of a slice, which a 2D network sees with it. Raises
    InputError where logits are not finite.
    """
    shape = image.shape[1:]
    gaussian = compute_gaussian(
        tuple(patch_size), sigma_scale=1 / 8, value_scaling_factor=10, device=device
    )
    flat = len(patch_size) == 2
    boxes = windows(shape, patch_size, step=inference.tile_step_size, slices_at_once=batch_size)
    layers = [list(layer) for _, layer in itertools.groupby(boxes, key=lambda box: box[0])]
    lows = [max(0, layer[0][0][0]) for layer in layers]
    held = min(shape[0], max(high - low for (low, high), *_ in (layer[0] for layer in layers)))
    total = torch.zeros((class_count, held, *shape[1:]), dtype=torch.float16, device=device)
    weight = torch.zeros((held, *shape[1:]), dtype=torch.float16, device=device)
    # A slice batch is one window already.
    at_once = 1 if flat else batch_size
    for layer, first, following in zip(layers, lows, [*lows[1:], shape[0]], strict=True):
        for start in range(0, len(layer), at_once):
            group = layer[start : start + at_once]
            patches = [patch_of(image, box, adjacent_slices=adjacent_slices) for box in group]
            batch = (
                slices_of(patches[0], adjacent_slices=adjacent_slices)
                if flat
                else torch.stack(patches)
            )
            batch = batch.to(device)
            with autocast(device, precision):
                logits = _logits_of(network, batch, mirroring=inference.mirroring)
            logits = logits.float() * gaussian
            # As windows (K, z, y, x): one of all slices, or one for each patch.
            for box, part in zip(group, [logits.movedim(0, 1)] if flat else logits, strict=True):
                inside = [
                    slice(max(0, low), min(size, high))
                    for (low, high), size in zip(box, shape, strict=True)
                ]
                own = [
                    slice(place.start - low, place.stop - low)
                    for place, (low, _) in zip(inside, box, strict=True)
                ]
                inside[0] = slice(inside[0].start - first, inside[0].stop - first)
                total[(slice(None), *inside)] += part[(slice(None), *own)]
                weight[tuple(inside)] += gaussian[tuple(own[1:] if flat else own)]
        done = following - first
        mean = total[:, :done] / weight[:done]
        if not torch.isfinite(mean.sum(dtype=torch.float32)):
            raise InputError(
                "the network's output is not finite; look at the image, set compute.precision to "
                "fp32, train with a lower learning rate, or take the case out of the case table."
            )
        yield mean
        for sums in (total, weight[None]):
            kept = sums[:, done:].clone()
            sums.zero_()
            sums[:, : held - done] = kept


def _logits_of(network: nn.Module, batch: torch.Tensor, *, mirroring: bool) -> torch.Tensor:
    """Return a network's logits of a batch, averaged over mirrored copies where asked for."""
    count = len(batch)
    if count == 1 and batch.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        # torch gives a small lone fp32 volume to its slow convolution, five times slower than
        # oneDNN's, so a second copy pays.
        batch = batch.expand(2, *batch.shape[1:])
    return (_mirrored_mean(network, batch) if mirroring else network(batch))[:count]


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
    slabs_of: Callable[[str], Iterable[tuple[torch.Tensor, np.ndarray]]],
    settings: Section,
    sources: Sequence[Path] = (),
    **facts: object,
) -> None:
    """Write the mask set of one shard, going on after the last finished case.

    A finished case stays where others are added, taken away or preprocessed anew, where cases are
    shared out in another way, and on another device: a mask is whole by itself.

    slabs_of: function of a case's path without suffix that yields slabs `(scores, soft)` from the
    first slice to the last: logits or probabilities `(K, d, Y, X)` and the soft mask
    `(K-1, d, Y, X)` uint8. inputs: files whose change makes all finished cases worthless. sources:
    manifests of the masks that these are made from, case by case. facts: added to the provenance;
    `device` and `precision` are those of this process, others belong to the identity.
    """
    rows = shard_of(
        read_table(arguments.cases).to_dict("records"), arguments.shard, arguments.shards
    )
    # Other shards may still be preprocessed.
    preprocessed = arguments.preprocessed / arguments.split / f"manifest-{arguments.shard}.tsv"
    made_from = _made_from(preprocessed, sources)
    here = {name: facts[name] for name in OF_A_PROCESS if name in facts}
    identity = {
        "inputs": {str(path): sha256_of(path) for path in inputs},
        "settings": learnt_of(settings),
        **{name: fact for name, fact in facts.items() if name not in here},
    }
    work = WorkFolder(arguments.out_dir / "work", identity, name=f"shard-{arguments.shard}")
    with work:
        finished = work.folder / f"shard-{arguments.shard}.finished.jsonl"
        provenance = work.folder / f"shard-{arguments.shard}.provenance.json"
        manifest_path = arguments.out_dir / f"manifest-{arguments.shard}.tsv"
        if not work.resumable:
            for left_over in (finished, provenance, manifest_path):
                left_over.unlink(missing_ok=True)
        manifest = _finished_rows(work, made_from)
        if len(manifest) == len(rows) and _tells_of(manifest, manifest_path):
            # By another job, for which this one waited: newer files would rerun what follows.
            print(f"{manifest_path} is finished already; it stays as it is.", flush=True)
            return
        work.claim(done=len(manifest), total=len(rows))
        if manifest:
            # Snakemake has removed the log of the process before.
            for number, made in enumerate(manifest, start=1):
                print(_line_of(made, done=number, total=len(rows)))
            print(f"Resuming after {len(manifest)} finished cases.", flush=True)
        there = {made["case"] for made in manifest}
        missing = [row for row in rows if row["case"] not in there]
        for number, row in enumerate(missing, start=len(manifest) + 1):
            began = time.time()
            arrays = arrays_of(arguments.preprocessed / arguments.split, row["case"])
            shape = blosc2.open(arrays + ".b2nd", mode="r").shape[1:]
            soft = np.empty((planned.class_count - 1, *shape), dtype=np.uint8)
            try:
                labels = labels_on_image_grid(
                    _kept_soft(slabs_of(arrays), soft),
                    load_pickle(arrays + ".pkl"),
                    planned,
                    depth=shape[0],
                    threads=arguments.threads,
                )
            except InputError as error:
                raise InputError(f"Case {row['case']}: {error}") from error
            made = write_mask(
                row["case"],
                row["image"].split(";")[0],
                labels=labels,
                soft=soft,
                out_dir=arguments.out_dir,
                planned=planned,
                seconds=time.time() - began,
            )
            work.insist()
            made |= {**here, "made_from": made_from[row["case"]]}
            manifest.append(made)
            with open(finished, "a") as opened:
                opened.write(json.dumps(made) + "\n")
            print(_line_of(made, done=number, total=len(rows)), end="", flush=True)
            left = work.report(number, len(rows), "cases")
            print(f"  {left:.0f} s left", flush=True)
        keep_provenance(
            provenance,
            arguments.out_dir / f"provenance-{arguments.shard}.json",
            is_repeat=not missing,
            settings=settings,
            seed=None,
            inputs=[*inputs, preprocessed, *sources],
            cpu_seconds_before=work.cpu_seconds_before,
            **facts | {name: ", ".join(sorted({made[name] for made in manifest})) for name in here},
        )
        # In the order of the cases, even where one in their midst was made again.
        place = {row["case"]: number for number, row in enumerate(rows)}
        manifest.sort(key=lambda made: place[made["case"]])
        write_table(pd.DataFrame(manifest, columns=MANIFEST_COLUMNS), manifest_path)
        # The finished cases stay noted: should Snakemake delete the manifest, which it does after a
        # kill, it is written again in seconds and to the same bytes.
        remove_manifests_beyond(arguments.shards, arguments.out_dir)


def _line_of(made: dict, *, done: int, total: int) -> str:
    return (
        f"{done}/{total} {made['case']}  {float(made['volume_ml']):.2f} ml  "
        f"confidence {made['confidence']}  {made['seconds']} s"
    )


def _kept_soft(
    slabs: Iterable[tuple[torch.Tensor, np.ndarray]], soft: np.ndarray
) -> Iterator[torch.Tensor]:
    """Yield the scores of slabs while putting their soft masks together in `soft`."""
    done = 0
    for scores, part in slabs:
        soft[:, done : done + part.shape[1]] = part
        done += part.shape[1]
        yield scores


def _made_from(preprocessed: Path, sources: Sequence[Path]) -> dict[str, list[str]]:
    """Return hashes of what each case's masks are made from: its arrays, and its source masks."""
    table = read_table(preprocessed)
    made_from = {
        case: [origin] for case, origin in zip(table["case"], table["origin"], strict=True)
    }
    for path in sources:
        for made in read_table(path).to_dict("records"):
            # Another shard's cases are in these manifests, too.
            if made["case"] in made_from:
                made_from[made["case"]].append(made["soft_sha256"])
    return made_from


def _finished_rows(work: WorkFolder, made_from: dict[str, list[str]]) -> list[dict]:
    """Return the noted rows of finished cases whose files are there as they were made.

    work: that of one of the shards; cases that now belong to it may have been finished by another.
    made_from: what each of its cases' masks are made from now. A line cut short by a kill does not
    count.
    """
    notes = work.folder / f"{work.name}.finished.jsonl"
    noted = []
    for path in sorted(work.folder.glob("shard-*.finished.jsonl")):
        identity = content_of(path.with_name(path.name.replace("finished.jsonl", "identity.json")))
        if identity == work.identity:
            noted += noted_rows(path)
    # One edited or deleted is made again: an audit that refused it says how to get there.
    rows = {
        row["case"]: row
        for row in noted
        if row.get("made_from") == made_from.get(row["case"], [])
        and _is_whole(row, notes.parents[1])
    }
    # Those of other shards stay noted for these, which may not have begun.
    others = [row for row in noted_rows(notes) if row["case"] not in made_from]
    write_text("".join(json.dumps(row) + "\n" for row in [*others, *rows.values()]), notes)
    return list(rows.values())


def _tells_of(finished: list[dict], manifest: Path) -> bool:
    """Return whether a manifest is there, and tells of the files of just these finished cases."""
    if not manifest.is_file():
        return False
    columns = ["case", "mask_sha256", "soft_sha256"]
    told = read_table(manifest)[columns].to_dict("records")
    made = [{column: row[column] for column in columns} for row in finished]
    return sorted(told, key=lambda row: row["case"]) == sorted(made, key=lambda row: row["case"])


def noted_rows(path: Path) -> list[dict]:
    """Return the manifest rows that were noted as cases were finished, whole lines only."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _is_whole(made: dict, folder: Path) -> bool:
    """Return whether the files of a manifest row are in the mask set's folder, unchanged."""
    return all(
        (folder / made[file]).is_file() and sha256_of(folder / made[file]) == made[f"{file}_sha256"]
        for file in ("mask", "soft")
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain infer`."""
    torch.set_num_threads(arguments.threads)
    stage = load(arguments.settings, model=InferStage)
    planned = Planned.read(arguments.preprocessed)
    device = device_of(stage.compute)
    precision = precision_of(stage.compute, device, training=False)
    configuration = planned.configuration(arguments.network)
    network = load_deployed(planned, arguments.checkpoint, arguments.network).to(device)
    if device.type == "cpu":
        arrange_for_cpu(network)

    def slabs_of(arrays: str) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        slabs = logit_slabs(
            network,
            # Not mapped into memory: the pages would count as this process's.
            blosc2.open(arrays + ".b2nd", mode="r", dparams={"nthreads": 1}),
            patch_size=tuple(configuration.patch_size),
            class_count=planned.class_count,
            batch_size=configuration.batch_size,
            adjacent_slices=planned.adjacent_slices(arguments.network),
            inference=stage.inference,
            device=device,
            precision=precision,
        )
        with telling_what_takes_less(arguments.network):
            for logits in slabs:
                yield logits.cpu(), soft_mask_of(logits)

    make_mask_set(
        arguments,
        planned,
        inputs=[arguments.checkpoint, arguments.preprocessed / "plans.json"],
        slabs_of=slabs_of,
        settings=stage,
        network=arguments.network,
        precision=precision,
        # Without its number: the next start may be given another of the same GPUs.
        device=device.type,
    )
