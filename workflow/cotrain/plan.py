"""Planning: in, the labelled cases; out, nnU-Net's fingerprint and one frozen plans file.

nnU-Net extracts the fingerprint and plans by itself; we then narrow the 3D network where the
settings ask for it and add the 2D network as a configuration on the same preprocessed grid.
"""

import argparse
import copy
import importlib.util
import json
import math
import shutil
from pathlib import Path

from cotrain.errors import InputError
from cotrain.files import read_table, sha256_of, write_json
from cotrain.nifti import orientation_of
from cotrain.nnunet import CONFIGURATIONS, Planned, make_importable, nnunet_folders
from cotrain.settings import Network2D, Network3D, PlanStage, load

DATASET_NAME = "Dataset001_cotrain"
PER_STAGE = (
    "features_per_stage",
    "kernel_sizes",
    "strides",
    "n_conv_per_stage",
    "n_blocks_per_stage",
)


def dataset_description(stage: PlanStage, cases: list[dict]) -> dict:
    """Return nnU-Net's dataset.json content; images stay where they are, named by their paths.

    cases: rows of the labelled case table (case, image, label).
    """
    return {
        "channel_names": {str(i): name for i, name in enumerate(stage.channels)},
        "labels": {"background": 0, **stage.labels},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        # Keeps the affine as it is; SimpleITK refuses affines with a trace of shear.
        "overwrite_image_reader_writer": "NibabelIO",
        "dataset": {
            row["case"]: {"images": row["image"].split(";"), "label": row["label"]} for row in cases
        },
    }


def _sized(configuration: dict, wanted: Network3D) -> dict:
    """Return a copy of a 3d_fullres configuration with the patch and batch of the settings."""
    own = wanted.model_dump(mode="json", include={"patch_size", "batch_size"}, exclude_none=True)
    return {**copy.deepcopy(configuration), **own}


def narrowed_3d(configuration: dict, wanted: Network3D) -> dict:
    """Return a 3d_fullres configuration with the patch, batch and width of the settings.

    Raises InputError where the width has more stages than the plan, or the patch cannot be halved
    as often as the network does it.
    """
    configuration = _sized(configuration, wanted)
    architecture = configuration["architecture"]["arch_kwargs"]
    if wanted.features_per_stage is not None:
        stages = len(wanted.features_per_stage)
        if stages > architecture["n_stages"]:
            raise InputError(
                f"network_3d.features_per_stage has {stages} stages, nnU-Net planned "
                f"{architecture['n_stages']} for this data; give at most that many numbers."
            )
        architecture["n_stages"] = stages
        for name in PER_STAGE:
            if name in architecture:
                architecture[name] = architecture[name][:stages]
        architecture["n_conv_per_stage_decoder"] = architecture["n_conv_per_stage_decoder"][
            : stages - 1
        ]
        architecture["features_per_stage"] = list(wanted.features_per_stage)
    divisor = [math.prod(axis) for axis in zip(*architecture["strides"], strict=True)]
    patch = configuration["patch_size"]
    if any(size % by for size, by in zip(patch, divisor, strict=True)):
        raise InputError(
            f"network_3d.patch_size {patch} cannot be divided by {divisor}, the product of the "
            "network's strides; give multiples of these numbers."
        )
    return configuration


def replaced_3d(configuration: dict, wanted: Network3D, folder: Path) -> dict:
    """Return a 3d_fullres configuration with the network of a person's own file.

    The file is copied into `folder`, beside the plans, and its hash stands in the plans: another
    file is another plan. Raises InputError where it cannot be used.
    """
    file, _, class_name = wanted.architecture.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(
            f"network_3d.architecture names the file {path}, which does not exist in {Path.cwd()}; "
            "give the path of a Python file, a colon and a class in it."
        )
    if not path.stem.isidentifier() or _is_another_module(path):
        raise InputError(
            f"network_3d.architecture: {path.name} has the name of another module, or one that "
            "Python cannot import; rename the file, e.g. my_networks.py."
        )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / path.name)
    architecture = {
        "network_class_name": f"{path.stem}.{class_name}",
        "arch_kwargs": dict(wanted.arguments),
        "_kw_requires_import": [],
        "file_sha256": sha256_of(folder / path.name),
    }
    return {**_sized(configuration, wanted), "architecture": architecture}


def _is_another_module(path: Path) -> bool:
    """Return whether Python already knows a module of a file's name that is not a copy of it."""
    known = importlib.util.find_spec(path.stem)
    return known is not None and (
        not known.has_location or sha256_of(known.origin) != sha256_of(path)
    )


def configuration_2d(plans: dict, wanted: Network2D) -> dict:
    """Return the 2D network as a configuration that inherits the 3D grid.

    plans: nnU-Net's plans; the patch defaults to the median case's in-plane size on the
    preprocessed grid, rounded up to a multiple of 32.
    """
    full = plans["configurations"][CONFIGURATIONS["3d"]]
    in_plane = [
        min(512, 32 * math.ceil(size / 32)) for size in full["median_image_size_in_voxels"][1:]
    ]
    return {
        "inherits_from": CONFIGURATIONS["3d"],
        "patch_size": list(wanted.patch_size or in_plane),
        "batch_size": wanted.batch_size,
        "batch_dice": True,
        "architecture": {
            "network_class_name": "cotrain.networks.TimmSegmentationNetwork",
            "arch_kwargs": {
                "encoder": wanted.encoder,
                "decoder": wanted.decoder,
                "adaptation": wanted.adaptation,
                "lora_rank": wanted.lora_rank,
                "adjacent_slices": wanted.adjacent_slices,
            },
            "_kw_requires_import": [],
        },
    }


def check_network_2d(planned: Planned, wanted: Network2D) -> None:
    """Build the 2D network and run one slice through it: hours earlier than training would fail.

    Raises InputError where timm or the decoder refuses the combination.
    """
    import torch

    patch = planned.configuration("2d").patch_size
    try:
        with torch.inference_mode():
            network = planned.build_network("2d", deep_supervision=False).eval()
            network(torch.zeros(1, network.input_channels, *patch))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"network_2d does not work: encoder {wanted.encoder} with decoder {wanted.decoder} on "
            f"slices of {list(patch)}: {error}; choose another encoder, decoder or patch_size."
        ) from error


def check_network_3d(planned: Planned, wanted: Network3D) -> None:
    """Build a person's own 3D network and run one patch through it.

    Raises InputError where that fails, or where it gives something else than a logit for each class
    and voxel.
    """
    import torch

    patch = list(planned.configuration("3d").patch_size)
    try:
        network = planned.build_network("3d", deep_supervision=False).eval()
        with torch.inference_mode():
            given = network(torch.zeros(1, planned.channel_count, *patch))
    # A person's own code may raise anything.
    except Exception as error:
        raise InputError(
            f"network_3d does not work: {wanted.architecture} with {wanted.arguments} on patches "
            f"of {patch}: {type(error).__name__}: {error}; mend the file, install what it imports, "
            "or choose other arguments or another network_3d.patch_size."
        ) from error
    expected = [1, planned.class_count, *patch]
    if not isinstance(given, torch.Tensor) or list(given.shape) != expected:
        shape = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise InputError(
            f"network_3d: {wanted.architecture} gives {shape} for a patch, wanted a tensor of "
            f"{expected}: a logit for each class and voxel, without deep supervision."
        )


def check_planner(name: str) -> None:
    """Raise InputError where nnU-Net has no experiment planner of this name."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    place = Path(nnunetv2.__path__[0], "experiment_planning")
    if recursive_find_python_class(str(place), name, "nnunetv2.experiment_planning") is None:
        raise InputError(
            f"network_3d.planner is {name}, which this nnU-Net does not have; wanted e.g. "
            "ExperimentPlanner, nnUNetPlannerResEncM, nnUNetPlannerResEncL, nnUNetPlannerResEncXL."
        )


def plan(stage: PlanStage, cases: list[dict], out_dir: Path, *, jobs: int) -> None:
    """Write plans.json, dataset.json and dataset_fingerprint.json into `out_dir`.

    Raises InputError where the networks that were asked for do not fit the data.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
    )

    from cotrain.masks import resampling_of_probabilities

    check_planner(stage.network_3d.planner)
    description = dataset_description(stage, cases)
    # For images to be predicted: networks see arrays as they are stored.
    first_channels = [row["image"].split(";")[0] for row in cases]
    description["orientations"] = sorted(set(map(orientation_of, first_channels)))
    with nnunet_folders() as folder:
        write_json(description, folder / "nnUNet_raw" / DATASET_NAME / "dataset.json")
        extract_fingerprints([1], num_processes=jobs, check_dataset_integrity=False)
        plan_experiments(
            [1],
            experiment_planner_class_name=stage.network_3d.planner,
            gpu_memory_target_in_gb=stage.network_3d.gpu_memory_gb,
            overwrite_plans_name="nnUNetPlans",
        )
        made = folder / "nnUNet_preprocessed" / DATASET_NAME
        plans = json.loads((made / "nnUNetPlans.json").read_text())
        if CONFIGURATIONS["3d"] not in plans["configurations"]:
            raise InputError(
                "nnU-Net planned no 3D configuration: most labelled images are single "
                "slices; give volumes of more than one slice."
            )
        # Known only now, and needed by the first masks: not to be met after a network was trained.
        resampling_of_probabilities(Planned(plans, description))
        planned_3d = plans["configurations"][CONFIGURATIONS["3d"]]
        if stage.network_3d.architecture is None:
            plans["configurations"] = {
                CONFIGURATIONS["3d"]: narrowed_3d(planned_3d, stage.network_3d)
            }
        else:
            plans["configurations"] = {
                CONFIGURATIONS["3d"]: replaced_3d(planned_3d, stage.network_3d, out_dir)
            }
            make_importable(out_dir, plans)
            check_network_3d(Planned(plans, description), stage.network_3d)
        plans["configurations"][CONFIGURATIONS["2d"]] = configuration_2d(plans, stage.network_2d)
        check_network_2d(Planned(plans, description), stage.network_2d)
        out_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "dataset_fingerprint.json", out_dir / "dataset_fingerprint.json")
        write_json(description, out_dir / "dataset.json")
        write_json(plans, out_dir / "plans.json")
    full, slices = (plans["configurations"][CONFIGURATIONS[network]] for network in ("3d", "2d"))
    print(
        f"Grid: {full['spacing']} mm, median {full['median_image_size_in_voxels']} voxels. "
        f"3D: {full['architecture']['network_class_name'].split('.')[-1]}, patch "
        f"{full['patch_size']}, batch {full['batch_size']}, features "
        f"{full['architecture']['arch_kwargs'].get('features_per_stage')}. "
        f"2D: patch {slices['patch_size']}, batch {slices['batch_size']}."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain plan`."""
    parser.add_argument("--settings", type=Path, required=True, help="settings of this stage")
    parser.add_argument("--cases", type=Path, required=True, help="checked table of labelled cases")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the fingerprint")


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain plan`."""
    stage = load(arguments.settings, model=PlanStage)
    cases = read_table(arguments.cases).to_dict("records")
    plan(stage, cases, arguments.out_dir, jobs=arguments.jobs)
