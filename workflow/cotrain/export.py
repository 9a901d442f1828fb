"""Export: in, a 3D checkpoint; out, a model folder that stock nnU-Net runs without this package."""

import argparse
import json
from pathlib import Path

import torch

from cotrain.files import write_atomically, write_json, write_text
from cotrain.inference import load_deployed
from cotrain.nnunet import CONFIGURATIONS, Planned
from cotrain.provenance import write_provenance
from cotrain.settings import InferStage, load

TRAINER = "nnUNetTrainer"
"""The name inference looks up: stock nnU-Net's, so that no machine needs ours."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain export`."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="3D training checkpoint")
    parser.add_argument(
        "--averaged-with",
        type=Path,
        help="2D training checkpoint that ended the same run; not exported, its hash is noted",
    )
    parser.add_argument("--trained", type=Path, required=True, help="provenance of the checkpoint")
    parser.add_argument("--preprocessed", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--settings", type=Path, required=True, help="settings of inference")
    parser.add_argument(
        "--out-dir", type=Path, required=True, help="folder to use as nnUNet_results"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain export`."""
    stage = load(arguments.settings, model=InferStage)
    trained = json.loads(arguments.trained.read_text())
    planned = Planned.read(arguments.preprocessed)
    configuration = CONFIGURATIONS["3d"]
    plans = {
        **planned.plans,
        # The 2D configuration names a class of ours, which the other machine does not have.
        "configurations": {configuration: planned.plans["configurations"][configuration]},
    }
    # Where the labelled images lie on this machine is nobody else's business.
    dataset = {name: value for name, value in planned.dataset.items() if name != "dataset"}
    folder = (
        arguments.out_dir
        / plans["dataset_name"]
        / f"{TRAINER}__{plans['plans_name']}__{configuration}"
    )
    network = load_deployed(planned, arguments.checkpoint, "3d")
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": TRAINER,
        "init_args": {
            "plans": plans,
            "configuration": configuration,
            "fold": "all",
            "dataset_json": dataset,
        },
        # Stock inference mirrors along these axes unless told not to; ours by its setting.
        "inference_allowed_mirroring_axes": (0, 1, 2) if stage.inference.mirroring else None,
        "current_epoch": 0,
    }
    write_json(plans, folder / "plans.json")
    write_json(dataset, folder / "dataset.json")
    fingerprint = arguments.preprocessed / "dataset_fingerprint.json"
    write_text(fingerprint.read_text(), folder / "dataset_fingerprint.json")
    write_provenance(
        arguments.out_dir / "provenance.json",
        settings=stage,
        seed=trained["seed"],
        # Also the 2D network: `cotrain predict` averages the two that ended the same run.
        inputs=[
            path
            for path in (
                arguments.checkpoint,
                arguments.averaged_with,
                arguments.preprocessed / "plans.json",
            )
            if path is not None
        ],
        # This folder is sent around, the one of the checkpoint is not. Names of cases are often
        # those of patients: how many they were is enough.
        training={
            **trained,
            **{cases: len(trained[cases]) for cases in ("labelled", "pseudo_labelled")},
        },
    )
    with write_atomically(folder / "fold_all" / "checkpoint_final.pth") as temporary:
        torch.save(checkpoint, temporary)
    # A network of a person's own file needs it wherever the model goes.
    module = planned.configuration("3d").network_arch_class_name.split(".")[0]
    own_file = arguments.preprocessed / f"{module}.py"
    python_path = ""
    if own_file.is_file():
        write_text(own_file.read_text(), arguments.out_dir / own_file.name)
        python_path = f"PYTHONPATH={arguments.out_dir} "
    channels = json.dumps(dataset["channel_names"])
    print(
        f"Model written. Predict images named CASE_0000.nii.gz (channels {channels}) with\n"
        f"  {python_path}nnUNet_results={arguments.out_dir} nnUNetv2_predict -i IMAGES -o MASKS "
        f"-d {plans['dataset_name']} -c {configuration} -f all "
        f"-step_size {stage.inference.tile_step_size}\n"
        "and with -device cpu where there is no GPU."
    )
