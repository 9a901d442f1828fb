"""Preprocessing: in, cases and the frozen plans; out, nnU-Net's Blosc2 arrays, case by case.

Unlabelled and test cases go through the same plans without a label; nnU-Net then stores where the
image is nonzero in place of one. A case that is already there, made from the same files by the same
plans, is not done again.
"""

import argparse
import hashlib
import json
import os
from functools import partial
from pathlib import Path

import pandas as pd

from cotrain.files import read_table, sha256_of, unique_prefix, write_table
from cotrain.nifti import by
from cotrain.nnunet import CONFIGURATIONS, Planned
from cotrain.pool import side_by_side
from cotrain.shards import remove_manifests_beyond, shard_of

SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
NOT_READ = ("architecture", "batch_size", "batch_dice")
"""Parts of a configuration that preprocessing does not read."""


def origin_of(row: dict, planned: Planned, *, with_label: bool) -> str:
    """Return a SHA-256 over all that the arrays of a case depend on: plans and files' bytes."""
    plans = {name: value for name, value in planned.plans.items() if name != "configurations"}
    configuration = planned.plans["configurations"][CONFIGURATIONS["3d"]]
    files = row["image"].split(";") + ([row["label"]] if with_label else [])
    content = {
        "plans": plans,
        "configuration": {k: v for k, v in configuration.items() if k not in NOT_READ},
        "labels": planned.dataset["labels"],
        "files": [sha256_of(path) for path in files],
        "with_label": with_label,
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def preprocess_case(row: dict, planned: Planned, out_dir: Path, *, with_label: bool) -> dict:
    """Preprocess one case and return its manifest row (case, preprocessed shape, origin).

    row: a row of a checked case table. The three files are written under another name and renamed,
    the properties last, so that a killed run leaves no case that looks whole but is not. The image
    array carries what it was made from, so that changed plans or files do not leave it in use.
    """
    import blosc2
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    final = out_dir / row["case"]
    array, properties = (final.with_name(final.name + suffix) for suffix in (".b2nd", ".pkl"))
    origin = origin_of(row, planned, with_label=with_label)
    whole = array.is_file() and properties.is_file()
    there = blosc2.open(str(array), mode="r") if whole else None
    if there is None or there.schunk.vlmeta.get("origin") != origin:
        properties.unlink(missing_ok=True)
        # A case has no "~" in its name, so that none is taken for the end of another's.
        partial_name = out_dir / f"{unique_prefix()}~{row['case']}"
        for suffix in SUFFIXES:
            for left_by_a_kill in out_dir.glob(f".writing-*~{row['case']}{suffix}"):
                left_by_a_kill.unlink()
        DefaultPreprocessor(verbose=False).run_case_save(
            str(partial_name),
            row["image"].split(";"),
            row["label"] if with_label else None,
            planned.manager,
            planned.configuration("3d"),
            planned.dataset,
        )
        made = blosc2.open(str(partial_name) + ".b2nd", mode="a")
        made.schunk.vlmeta["origin"] = origin
        del made
        for suffix in SUFFIXES:
            os.replace(
                partial_name.with_name(partial_name.name + suffix),
                final.with_name(final.name + suffix),
            )
    shape = blosc2.open(str(array), mode="r").shape[1:]
    return {"case": row["case"], "shape": by(shape), "origin": origin}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain preprocess`."""
    parser.add_argument("--preprocessed", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--cases", type=Path, required=True, help="checked case table")
    parser.add_argument("--shard", type=int, default=0, help="number of this shard, from 0")
    parser.add_argument("--shards", type=int, default=1, help="number of shards")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the arrays")
    parser.add_argument("--jobs", type=int, default=1, help="cases done side by side")
    parser.add_argument(
        "--with-label", action="store_true", help="preprocess the labels too (labelled cases)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain preprocess`."""
    planned = Planned.read(arguments.preprocessed)
    rows = shard_of(
        read_table(arguments.cases).to_dict("records"), arguments.shard, arguments.shards
    )
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    one = partial(
        preprocess_case, planned=planned, out_dir=arguments.out_dir, with_label=arguments.with_label
    )
    manifest = []
    # In processes of their own, be it one: nnU-Net sets Blosc2's threads for a whole process, and
    # by them the bytes of what that process writes later.
    for done, row in enumerate(side_by_side(one, rows, jobs=arguments.jobs), start=1):
        manifest.append(row)
        print(f"{done}/{len(rows)} {row['case']} {row['shape']}", flush=True)
    write_table(
        pd.DataFrame(manifest, columns=["case", "shape", "origin"]),
        arguments.out_dir / f"manifest-{arguments.shard}.tsv",
    )
    remove_manifests_beyond(arguments.shards, arguments.out_dir)
