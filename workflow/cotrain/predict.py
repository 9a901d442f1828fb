"""Prediction: in, a finished experiment and new images; out, masks by the mean of both networks.

The exported model holds the 3D network alone, because stock nnU-Net cannot run the 2D one; the mean
of both is better (docs/accuracy.md), and this command makes it. The steps are the workflow's own.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from cotrain import inference, merge, preprocess
from cotrain.data_check import all_examined, problem_of_size, refuse
from cotrain.device import device_of
from cotrain.errors import InputError
from cotrain.files import read_table, sha256_of, write_atomically, write_table, write_text
from cotrain.make_table import add_image_arguments, images_of
from cotrain.nnunet import Planned
from cotrain.settings import InferStage, as_yaml, load

PREPROCESSING_AT_A_TIME = 2
"""Cases, as in the workflow's rule: a large CT takes some 5 GB each."""


def final_checkpoints(experiment: Path) -> dict[str, Path]:
    """Return the checkpoints that a finished experiment ends with, by network.

    Raises InputError where it is not finished, or where a checkpoint or the plans are not those
    that the model was exported with: the networks are then of different runs.
    """
    note = experiment / "model" / "provenance.json"
    if not note.is_file():
        raise InputError(
            f"{note} does not exist, so {experiment} is not the folder of a finished experiment; "
            "give results/<experiment>, or let the workflow finish (`cotrain status`)."
        )
    exported = json.loads(note.read_text())
    training = exported["training"]
    last = training["round"]
    # A last training is of 3D alone; 2D is then as the round before left it.
    of_2d = last if training["settings"]["last_round"] is None else last - 1
    checkpoints = {
        network: experiment / f"cotrain/round-{round_:02d}/train_{network}/checkpoint.pth"
        for network, round_ in (("2d", of_2d), ("3d", last))
    }
    for file in (*checkpoints.values(), experiment / "preprocessed" / "plans.json"):
        if not file.is_file():
            raise InputError(
                f"{file} is missing; let the workflow make it again, or copy the whole "
                f"folder {experiment}."
            )
        # By content: the folder may lie elsewhere now.
        if sha256_of(file) not in exported["inputs"].values():
            raise InputError(
                f"{file} is not the one that {note} was written with, so the networks may be of "
                "different runs; let the workflow finish (type its command again)."
            )
    return checkpoints


def stage_on(device: str | None, experiment: Path) -> InferStage:
    """Return the experiment's settings of inference, on another device where one is given.

    Raises InputError where the device cannot be had here.
    """
    stage = load(experiment / "settings" / "infer.yaml", model=InferStage)
    if device is not None:
        compute = stage.compute.model_copy(update={"device": device})
        stage = stage.model_copy(update={"compute": compute})
    try:
        device_of(stage.compute)
    except InputError as error:
        # Its remedy is for a step of the workflow: in the settings it would train everything anew.
        found = str(error).partition(";")[0]
        raise InputError(
            f"{found}; go where torch sees a GPU, or add --device cpu (leave the experiment's "
            "settings as they are)."
        ) from None
    return stage


def checked_table(arguments: argparse.Namespace, planned: Planned) -> pd.DataFrame:
    """Return the images' case table; raises InputError where one cannot be used."""
    channels_of = images_of(arguments.images, channel_suffixes=arguments.channel_suffix)
    found = max(1, len(arguments.channel_suffix))
    if found != planned.channel_count:
        raise InputError(
            f"The images have {found} channels, the networks were trained on "
            f"{planned.channel_count} ({', '.join(planned.dataset['channel_names'].values())}); "
            "name them all with --channel-suffix _0000,_0001 ..., in this order."
        )
    if taken := [case for case in channels_of if case.endswith("_seg")]:
        raise InputError(
            f"The image {channels_of[taken[0]][0]} has a name that ends in `_seg`, which nnU-Net "
            "keeps for the labels of another case; rename it, or move it out of the folder if it "
            "is a mask."
        )
    table = pd.DataFrame(
        {"case": case, "image": ";".join(paths), "label": "", "split": "test"}
        for case, paths in channels_of.items()
    )
    tasks = [(row, False) for row in table.to_dict("records")]
    examined = list(all_examined(tasks, {}, jobs=arguments.threads))
    refuse([problem for case in examined for problem in case.problems], where="the images")
    spacing = np.array(planned.configuration("3d").spacing)
    # NIfTI's axes are nnU-Net's in reverse. Which of them lie along the patient's is not known of
    # the labelled cases any more, so that edges are compared by their length.
    usual = spacing[planned.manager.transpose_backward][::-1]
    sentences = (
        problem_of_size(
            case,
            usual,
            times_as_long=(np.sort(case.spacing_mm) / np.sort(usual)).max(),
        )
        for case in examined
    )
    refuse([sentence for sentence in sentences if sentence], where="the images")
    # An experiment that was planned by older code does not tell.
    learnt = planned.dataset.get("orientations", [])
    others = [case for case in examined if case.orientation not in learnt]
    if learnt and others:
        print(
            f"WARNING: {len(others)} of {len(examined)} images are stored in another orientation "
            f"than the labelled ones ({', '.join(learnt)}), such as {others[0].name} "
            f"({others[0].orientation}): to the networks their anatomy is mirrored or turned. "
            "Reorient the images to one that was learnt.",
            flush=True,
        )
    return table


def check_replaces_nothing(cases: Iterable[str], out_dir: Path) -> None:
    """Raise InputError where a mask would be written over a file that this command has not made.

    Such as an image, or a mask of its own that a person has corrected since.
    """
    noted = inference.noted_rows(out_dir / "steps" / "mean" / "work" / "shard-0.finished.jsonl")
    handed_over = out_dir / "confidence.tsv"
    if handed_over.is_file():
        noted += read_table(handed_over).to_dict("records")
    made = {(row.get("case"), row.get("mask_sha256")) for row in noted}
    files = {case: out_dir / f"{case}.nii.gz" for case in cases}
    others = [
        file
        for case, file in files.items()
        if file.is_file() and (case, sha256_of(file)) not in made
    ]
    if others:
        raise InputError(
            f"{others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''} would be "
            "replaced by a mask, but was not made by this command, or was edited since; give "
            "another --out-dir, or move it away."
        )


def hand_over(masks: Path, out_dir: Path) -> None:
    """Put a mask set's NIfTI files into `out_dir`, and a table of how sure each is.

    As copies, which a person may correct in place: in a mask set a file is not to be touched.
    """
    manifest = read_table(masks / "manifest-0.tsv")
    by_confidence = manifest.sort_values("confidence", key=pd.to_numeric, ignore_index=True)
    # First: it says which masks this command has made.
    write_table(
        by_confidence[["case", "confidence", "volume_ml", "mask_sha256"]],
        out_dir / "confidence.tsv",
    )
    for mask in manifest["mask"]:
        with write_atomically(out_dir / mask) as temporary:
            shutil.copyfile(masks / mask, temporary)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain predict`."""
    parser.add_argument(
        "--experiment", type=Path, required=True, help="folder of a finished one, results/<name>"
    )
    add_image_arguments(parser)
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the masks")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        help="where the networks run; default: as in the experiment's settings",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain predict`; the same command goes on after the last finished case."""
    source, out_dir = arguments.experiment, arguments.out_dir
    checkpoints = final_checkpoints(source)
    stage = stage_on(arguments.device, source)
    planned = Planned.read(source / "preprocessed")
    steps = out_dir / "steps"
    folder, table, settings = steps / "preprocessed", steps / "cases.tsv", steps / "infer.yaml"
    cases = checked_table(arguments, planned)
    check_replaces_nothing(cases["case"], out_dir)
    write_table(cases, table)
    write_text(as_yaml(stage), settings)
    folder.mkdir(exist_ok=True)
    # Plans, and the file of a network of a person's own.
    for path in [*source.glob("preprocessed/*.json"), *source.glob("preprocessed/*.py")]:
        shutil.copy(path, folder / path.name)
    print(f"{len(cases)} images, {' and '.join(map(str, checkpoints.values()))}.", flush=True)
    words = ["--preprocessed", folder, "--cases", table]
    jobs = min(arguments.threads, PREPROCESSING_AT_A_TIME)
    _call(preprocess, *words, "--out-dir", folder / "test", "--jobs", jobs)
    words += ["--split", "test", "--threads", arguments.threads]
    for network, checkpoint in checkpoints.items():
        _call(
            inference,
            *(*words, "--network", network, "--checkpoint", checkpoint),
            *("--settings", settings, "--out-dir", steps / network),
        )
    masks = [steps / network for network in checkpoints]
    _call(merge, *words, "--masks", *masks, "--out-dir", steps / "mean")
    hand_over(steps / "mean", out_dir)
    print(
        f"Masks in {out_dir}, the least certain first in {out_dir / 'confidence.tsv'}; {steps} has "
        "those of each network, and may be removed."
    )


def _call(step, *words: object) -> None:
    """Run a step as the workflow does it, with these words of its command line."""
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    step.run(parser.parse_args([str(word) for word in words]))
