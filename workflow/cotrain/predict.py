"""Prediction: in, a finished experiment and new images; out, masks by the mean of both networks.

The exported model holds the 3D network alone, because stock nnU-Net cannot run the 2D one; the mean
of both is better (docs/accuracy.md), and this command makes it. The steps are the workflow's own.
"""

import argparse
import json
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd

from cotrain import inference, merge, preprocess
from cotrain.data_check import examined
from cotrain.errors import InputError
from cotrain.files import read_table, write_table
from cotrain.make_table import images_of
from cotrain.nnunet import Planned


def final_checkpoints(experiment: Path) -> dict[str, Path]:
    """Return the checkpoints that a finished experiment ends with, by network.

    Raises InputError where it is not finished: the 3D network is then not the exported one.
    """
    note = experiment / "model" / "provenance.json"
    if not note.is_file():
        raise InputError(
            f"{note} does not exist, so {experiment} is not the folder of a finished experiment; "
            "give results/<experiment>, or let the workflow finish (`cotrain status`)."
        )
    exported = [Path(path) for path in json.loads(note.read_text())["inputs"]]
    (of_3d,) = [path for path in exported if path.name == "checkpoint.pth"]
    last = int(re.fullmatch(r"round-(\d+)", of_3d.parts[-3])[1])
    # 2D has no part in a last training of 3D alone.
    rounds_of = {"2d": (last, last - 1), "3d": (last,)}
    found = {}
    for network, rounds in rounds_of.items():
        paths = [
            experiment / f"cotrain/round-{round_:02d}/train_{network}/checkpoint.pth"
            for round_ in rounds
        ]
        there = [path for path in paths if path.is_file()]
        if not there:
            raise InputError(
                f"{paths[0]} is missing; let the workflow make it again, or copy the whole folder "
                f"{experiment}."
            )
        found[network] = there[0]
    return found


def checked_rows(arguments: argparse.Namespace, planned: Planned) -> list[dict[str, str]]:
    """Return the rows of the images' case table; raises InputError where one cannot be used."""
    suffixes = [suffix for suffix in arguments.channel_suffix.split(",") if suffix]
    channels_of = images_of(arguments.images, channel_suffixes=suffixes)
    found = max(1, len(suffixes))
    if found != planned.channel_count:
        raise InputError(
            f"The images have {found} channels, the networks were trained on "
            f"{planned.channel_count} ({', '.join(planned.dataset['channel_names'].values())}); "
            "name them all with --channel-suffix _0000,_0001 ..., in this order."
        )
    rows = [
        {"case": case, "image": ";".join(paths), "label": "", "split": "test"}
        for case, paths in channels_of.items()
    ]
    with ProcessPoolExecutor(arguments.threads) as pool:
        cases = pool.map(partial(examined, labels={}), [(row, False) for row in rows])
        problems = [problem for case in cases for problem in case.problems]
    if problems:
        raise InputError(
            f"{len(problems)} problems in the images; mend them and run again:"
            + "".join(f"\n  - {problem}" for problem in problems[:20])
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain predict`."""
    parser.add_argument(
        "--experiment", type=Path, required=True, help="folder of a finished one, results/<name>"
    )
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the masks")
    parser.add_argument(
        "--channel-suffix",
        default="",
        metavar="S,S",
        help="what follows the case in image names, one a channel, e.g. _0000,_0001 (nnU-Net)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain predict`; the same command goes on after the last finished case."""
    source, out_dir = arguments.experiment, arguments.out_dir
    checkpoints = final_checkpoints(source)
    planned = Planned.read(source / "preprocessed")
    steps = out_dir / "steps"
    folder, table = steps / "preprocessed", steps / "cases.tsv"
    rows = pd.DataFrame(checked_rows(arguments, planned))
    if not table.is_file() or not read_table(table).equals(rows):
        write_table(rows, table)
    folder.mkdir(exist_ok=True)
    # Plans, and the file of a network of a person's own.
    for path in [*source.glob("preprocessed/*.json"), *source.glob("preprocessed/*.py")]:
        shutil.copy(path, folder / path.name)
    print(f"{len(rows)} images, {' and '.join(map(str, checkpoints.values()))}.", flush=True)
    words = ["--preprocessed", folder, "--cases", table]
    _call(preprocess, *words, "--out-dir", folder / "test", "--jobs", arguments.threads)
    words += ["--split", "test", "--threads", arguments.threads]
    for network, checkpoint in checkpoints.items():
        _call(
            inference,
            *(*words, "--network", network, "--checkpoint", checkpoint),
            *("--settings", source / "settings/infer.yaml", "--out-dir", steps / network),
        )
    masks = [steps / network for network in checkpoints]
    _call(merge, *words, "--masks", *masks, "--out-dir", out_dir)
    print(f"Masks in {out_dir}; {steps} has those of each network, and may be removed.")


def _call(step, *words: object) -> None:
    """Run a step as the workflow does it, with these words of its command line."""
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    step.run(parser.parse_args([str(word) for word in words]))
