"""Stands for the `cotrain` command in tests of the DAG: in, a command line; out, its outputs.

Writes the files that each rule declares, with the command line as their content. The command that
STAND_IN_FAILS names fails instead, and is noted in the file `failed`. STAND_IN_TELLS names a
variable whose value is written into the file `told`.
"""

import itertools
import os
import sys
import time
from pathlib import Path

MODEL = "Dataset001_cotrain/nnUNetTrainer__nnUNetPlans__3d_fullres"
MADE_IN_OUT_DIR = {
    "check-data": "dataset.tsv dataset_report.html",
    "plan": "plans.json dataset.json dataset_fingerprint.json",
    "preprocess": "manifest-{shard}.tsv",
    "train": "checkpoint.pth curve.csv provenance.json",
    "infer": "manifest-{shard}.tsv provenance-{shard}.json",
    "merge": "manifest-{shard}.tsv provenance-{shard}.json",
    "compare": "comparison.txt comparison.tsv comparison.png",
    "summarise": "scores.tsv summary.txt dice_per_round.png training_curves.png",
    "export": f"{MODEL}/plans.json {MODEL}/dataset.json {MODEL}/dataset_fingerprint.json "
    f"{MODEL}/fold_all/checkpoint_final.pth provenance.json",
}

command, *words = sys.argv[1:]
options = dict(itertools.pairwise(words))
if "STAND_IN_TELLS" in os.environ:
    Path("told").write_text(os.environ.get(os.environ["STAND_IN_TELLS"], ""))
if command == os.environ.get("STAND_IN_FAILS"):
    with open("failed", "a") as failed:
        failed.write(f"{command}\n")
    sys.exit(2)
if command == "train":
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
if "--out" in options:
    outputs = [Path(options["--out"])]
else:
    names = MADE_IN_OUT_DIR[command].format(shard=options.get("--shard", "")).split()
    if "--list" in options:
        names = [f"{options['--list']}.tsv"]
    outputs = [Path(options["--out-dir"], name) for name in names]
if command == "fetch-weights":
    outputs.append(Path(options["--out"]).with_suffix(".json"))
for path in outputs:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(sys.argv[1:]) + "\n")
