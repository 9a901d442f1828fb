"""A tiny experiment that tests share: volumes made here, planned and preprocessed by the commands.

Every volume holds a bright ellipsoid (label `shell`) with a brighter one inside (`core`), in noise.
The first axis of the files has the largest spacing, so that nnU-Net turns the axes; affines are
straight, flipped or oblique, and spacings differ between cases, so that it resamples.
"""

import os

# These arrays are so small that threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import json
import multiprocessing
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cotrain.__main__ import main
from cotrain.inference import make_mask_set, soft_mask_of
from cotrain.nnunet import Planned
from cotrain.plan import configuration_2d
from cotrain.settings import Network2D, Section, Settings, as_yaml, check

LABELS = {"shell": 1, "core": 2}
SHAPE = (20, 24, 30)
CASES = {
    # name: (split, spacing in mm, signs of the axes, tilt in degrees)
    "straight": ("labelled", (2.0, 1.0, 1.0), (1, 1, 1), 0),
    "flipped": ("labelled", (2.0, 1.0, 1.0), (-1, -1, 1), 0),
    "oblique": ("labelled", (2.3, 1.0, 1.1), (-1, 1, 1), 25),
    "straight_u": ("unlabelled", (2.0, 1.0, 1.0), (1, 1, 1), 0),
    "flipped_u": ("unlabelled", (2.4, 1.0, 1.0), (1, -1, -1), 0),
    "oblique_u": ("unlabelled", (2.0, 1.1, 1.0), (-1, -1, 1), 15),
    "coarse_u": ("unlabelled", (2.6, 1.2, 1.1), (1, 1, 1), 0),
    "flipped_t": ("test", (2.0, 1.0, 1.0), (-1, 1, -1), 0),
    "oblique_t": ("test", (2.5, 1.1, 1.0), (1, -1, 1), 30),
}
SETTINGS = {
    "experiment": "tiny",
    "cases": "cases.tsv",
    "labels": LABELS,
    "network_2d": {"weights": "random", "lora_rank": 4, "patch_size": [32, 32], "batch_size": 4},
    "network_3d": {"features_per_stage": [4, 8], "patch_size": [12, 16, 32], "batch_size": 2},
    "training_2d": {"iterations_per_epoch": 2, "warmup_epochs": 2, "epochs_per_round": 4},
    "training_3d": {"iterations_per_epoch": 8, "epochs_per_round": 4, "learning_rate": 0.03},
    # 3D is taught from its first step on, so that one training has pseudo-masks.
    "cotraining": {
        "first_teacher": "2d",
        "sampling": {"share_start": 0.5, "share_end": 0.5},
        "last_epochs": 0,
    },
    "compute": {"device": "cpu"},
}
MONAI_NETWORKS = Path(__file__).parents[1] / "config" / "networks" / "monai_networks.py"
OTHER_NETWORKS_3D = {
    # name: (settings of network_3d, learning rate)
    "resenc": (
        {
            "planner": "nnUNetPlannerResEncM",
            "features_per_stage": [4, 8, 8],
            "patch_size": [16, 16, 32],
        },
        0.03,
    ),
    "segresnet": (
        {
            "architecture": f"{MONAI_NETWORKS}:SegResNet3D",
            "arguments": {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]},
            "patch_size": [16, 16, 32],
        },
        0.01,
    ),
    "swinunetr": (
        {
            "architecture": f"{MONAI_NETWORKS}:SwinUNETR3D",
            "arguments": {"feature_size": 12, "depths": [1, 1, 1, 1]},
            "patch_size": [32, 32, 64],
        },
        0.01,
    ),
    "plain_unet": (
        {
            "architecture": f"{MONAI_NETWORKS}:PlainUNet3D",
            "arguments": {"features": [8, 8, 16, 16, 16, 8]},
            "patch_size": [16, 16, 32],
        },
        0.01,
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put fast tests first."""
    later = {"contracts": 1, "workflow": 2, "slurm": 3}
    items.sort(key=lambda item: later.get(item.path.parent.name, 0))


@dataclass(frozen=True)
class Tiny:
    """A preprocessed experiment.

    settings: as in a user's YAML file. tables: split → checked case table. preprocessed: the
    folder of the plans. truth: the same cases preprocessed with their labels, one folder for each
    split.
    """

    folder: Path
    settings: Settings
    tables: dict[str, Path]
    preprocessed: Path
    truth: Path

    def stage(self, name: str, folder: Path, **changes: object) -> Path:
        """Write a stage's settings into `folder`, with whole sections changed, and return it."""
        content = self.settings.model_dump(mode="json") | changes
        path = folder / f"{name}.yaml"
        path.write_text(as_yaml(check(content).stages()[name]))
        return path

    def rows(self, split: str) -> list[dict]:
        """Return the rows of a checked case table."""
        return pd.read_csv(self.tables[split], sep="\t", dtype=str, keep_default_na=False).to_dict(
            "records"
        )


@dataclass(frozen=True)
class Training:
    """A finished round of training: its folder, its checkpoint and the command that made it."""

    folder: Path
    words: list[str]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pth"


def affine_of(spacing_mm: tuple, signs: tuple, tilt_degrees: float) -> np.ndarray:
    """Return an affine that turns by the tilt about two axes."""
    angle = np.deg2rad(tilt_degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    about_z = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(np.multiply(spacing_mm, signs))
    affine[:3, 3] = (-20, 15, 40)
    return affine


def volume_of(spacing_mm: tuple, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image `(X, Y, Z)` float32, 0 outside the body, and its labels uint8."""
    random = np.random.default_rng(seed)
    centre = np.array(SHAPE) / 2 + random.uniform(-1, 1, 3)
    steps = np.stack(np.indices(SHAPE), axis=-1) + 0.5 - centre
    at_mm = steps * spacing_mm
    extent_mm = np.array(SHAPE) * spacing_mm / 2
    shell = (np.square(at_mm / (0.62 * extent_mm)).sum(-1) < 1).astype(np.uint8)
    core = np.square(at_mm / (0.36 * extent_mm)).sum(-1) < 1
    labels = shell + core
    image = 30 + 60 * labels + random.normal(0, 6, SHAPE)
    body = np.square(steps / (0.56 * np.array(SHAPE))).sum(-1) < 1
    return (np.maximum(image, 1) * body).astype(np.float32), labels


@pytest.fixture(scope="session")
def processes():
    """Return a way to start processes that have imported torch and nnU-Net already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cotrain.training", "cotrain.inference", "cotrain.networks"])
    forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def kill_once(processes) -> Callable[..., None]:
    """Return a function that runs a command and sends it SIGKILL once a file is written."""

    def kill(words: list[str], sign: Path) -> None:
        process = processes.Process(target=main, args=(words,))
        process.start()
        while process.is_alive() and not (sign.is_file() and sign.stat().st_size):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    return kill


@pytest.fixture(scope="session")
def cotrain() -> Callable[..., None]:
    """Return a function that runs one command as the command line does, and insists on success."""

    def run(*words: object) -> None:
        assert main([str(word) for word in words]) == 0

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, cotrain, processes) -> Tiny:
    """Return the tiny experiment with a plain 3D U-Net, planned and preprocessed."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = {"labelled": [], "unlabelled": [], "test": []}
    for seed, (name, (split, spacing_mm, signs, tilt)) in enumerate(CASES.items()):
        image, labels = volume_of(spacing_mm, seed)
        affine = affine_of(spacing_mm, signs, tilt)
        paths = [folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz"]
        for array, path in zip((image, labels), paths, strict=True):
            nibabel.save(nibabel.Nifti1Image(array, affine), path)
        rows[split].append((name, *map(str, paths)))
    tables = {}
    for split, cases in rows.items():
        tables[split] = folder / f"{split}.tsv"
        frame = pd.DataFrame(cases, columns=["case", "image", "label"])
        frame.to_csv(tables[split], sep="\t", index=False)
    made = Tiny(
        folder, check(SETTINGS), tables, folder / "preprocessed", folder / "preprocessed_truth"
    )
    plan(made, cotrain)
    preprocess(made, cotrain, made.preprocessed, with_label=["labelled"])
    preprocess(made, cotrain, made.truth, with_label=tables)
    return made


@pytest.fixture(scope="session")
def tiny_two_channels(tiny, tmp_path_factory, cotrain) -> Tiny:
    """Return the tiny experiment in two channels, of which each shows one label's border alone."""
    folder = tmp_path_factory.mktemp("tiny_two_channels")
    tables = {}
    for split in tiny.tables:
        rows = tiny.rows(split)
        for row in rows:
            image = nibabel.load(row["image"])
            voxels, labels = image.get_fdata(), nibabel.load(row["label"]).get_fdata()
            paths = []
            for channel, label in enumerate(LABELS.values()):
                # 60 brighter for each label inside which a voxel is: here for this one alone.
                shown = voxels + 60 * ((labels >= label) - labels)
                paths.append(str(folder / f"{row['case']}_{channel:04d}.nii.gz"))
                nibabel.save(nibabel.Nifti1Image(shown.astype(np.float32), image.affine), paths[-1])
            row["image"] = ";".join(paths)
        tables[split] = folder / f"{split}.tsv"
        pd.DataFrame(rows).to_csv(tables[split], sep="\t", index=False)
    settings = check(SETTINGS | {"channels": list(LABELS)})
    made = replace(tiny, settings=settings, tables=tables, preprocessed=folder / "preprocessed")
    plan(made, cotrain)
    preprocess(made, cotrain, made.preprocessed, with_label=["labelled"])
    return made


@pytest.fixture(scope="session")
def tiny_with(tiny, tmp_path_factory, cotrain) -> Callable[..., Tiny]:
    """Return a function that gives the tiny experiment another 3D network on the same arrays."""

    @functools.cache
    def with_network(name: str) -> Tiny:
        folder = tmp_path_factory.mktemp(f"tiny_{name}")
        network_3d, learning_rate = OTHER_NETWORKS_3D[name]
        training = SETTINGS["training_3d"] | {"learning_rate": learning_rate}
        settings = check(
            SETTINGS | {"network_3d": {"batch_size": 2} | network_3d, "training_3d": training}
        )
        made = replace(tiny, settings=settings, preprocessed=folder)
        plan(made, cotrain)
        for split in tiny.tables:
            (folder / split).symlink_to(tiny.preprocessed / split)
        return made

    return with_network


@pytest.fixture(scope="session")
def tiny_with_2d(tiny, tmp_path_factory) -> Callable[..., Tiny]:
    """Return a function that gives the tiny experiment another 2D network on the same arrays."""

    def with_network(**changes: object) -> Tiny:
        folder = tmp_path_factory.mktemp("tiny_2d")
        plans = json.loads((tiny.preprocessed / "plans.json").read_text())
        wanted = tiny.settings.network_2d.model_copy(update=changes)
        plans["configurations"]["2d_cotrain"] = configuration_2d(
            plans, Network2D.model_validate(wanted.model_dump())
        )
        (folder / "plans.json").write_text(json.dumps(plans))
        for name in ("dataset.json", "labelled", "unlabelled", "test"):
            (folder / name).symlink_to(tiny.preprocessed / name)
        return replace(tiny, preprocessed=folder)

    return with_network


@pytest.fixture(scope="session")
def pseudo_masks(tiny) -> Path:
    """Return a mask set of the unlabelled cases, as uncertain as the truth blurred by a voxel."""
    out_dir = tiny.folder / "cotrain" / "round-00" / "pseudo_2d"

    def slabs_of(arrays: str) -> list[tuple[torch.Tensor, np.ndarray]]:
        truth = blosc2.open(str(tiny.truth / "unlabelled" / Path(arrays).name) + "_seg.b2nd")[0]
        one_hot = [gaussian_filter((np.maximum(truth, 0) == k).astype(float), 1) for k in range(3)]
        logits = torch.log(torch.from_numpy(np.stack(one_hot)) + 0.02).half()
        return [(logits, soft_mask_of(logits))]

    arguments = Namespace(
        preprocessed=tiny.preprocessed,
        split="unlabelled",
        cases=tiny.tables["unlabelled"],
        shard=0,
        shards=1,
        threads=1,
        out_dir=out_dir,
    )
    make_mask_set(
        arguments,
        Planned.read(tiny.preprocessed),
        inputs=[],
        slabs_of=slabs_of,
        settings=Section(),
    )
    return out_dir


@pytest.fixture(scope="session")
def audit_words(tiny) -> Callable[..., list[str]]:
    """Return a function that gives the audit command of a set that was inferred, not merged."""

    def words(masks: Path, out: Path, *more: object) -> list[str]:
        return [
            *("audit", "--masks", str(masks), "--manifests", str(masks / "manifest-0.tsv")),
            *("--source-masks", str(masks), "--cases", str(tiny.tables["unlabelled"])),
            *("--labels", "shell=1", "core=2", "--preprocessed", str(tiny.preprocessed)),
            *("--out", str(out), *map(str, more)),
        ]

    return words


@pytest.fixture(scope="session")
def audit_table(tiny, pseudo_masks, audit_words, cotrain) -> Path:
    """Return the audit table of the mask set: all four masks are accepted."""
    table = tiny.folder / "cotrain" / "round-00" / "audit" / "train_3d.tsv"
    cotrain(*audit_words(pseudo_masks, table))
    return table


@pytest.fixture(scope="session")
def train(cotrain) -> Callable[..., Training]:
    """Return a function that trains one network for one round."""

    def run(experiment: Tiny, network: str, folder: Path, *more: object) -> Training:
        folder.mkdir(parents=True, exist_ok=True)
        words = [
            *("train", "--network", network, "--preprocessed", experiment.preprocessed),
            *("--settings", experiment.stage(f"train_{network}", folder)),
            *("--labelled", experiment.tables["labelled"], "--out-dir", folder, *more),
        ]
        cotrain(*words)
        return Training(folder, [str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def infer_words() -> Callable[..., list[str]]:
    """Return a function that gives the command to infer a mask set, of the test cases by default.

    fp32, because stock nnU-Net knows nothing else on a CPU.
    """

    def words(
        experiment: Tiny,
        network: str,
        checkpoint: Path,
        out_dir: Path,
        split: str = "test",
        **inference: object,
    ) -> list[str]:
        out_dir.mkdir(parents=True, exist_ok=True)
        compute = {"device": "cpu", "precision": "fp32"}
        settings = experiment.stage("infer", out_dir, inference=inference, compute=compute)
        return [
            *("infer", "--network", network, "--checkpoint", str(checkpoint)),
            *("--settings", str(settings), "--preprocessed", str(experiment.preprocessed)),
            *("--split", split, "--cases", str(experiment.tables[split])),
            *("--out-dir", str(out_dir)),
        ]

    return words


@pytest.fixture(scope="session")
def trained_3d(tiny, train) -> Training:
    """Return a 3D network that has learnt from labels alone for four epochs."""
    return train(tiny, "3d", tiny.folder / "trained_3d", "--arm", "labels_only", "--round", 0)


def plan(experiment: Tiny, cotrain: Callable[..., None]) -> None:
    """Let nnU-Net plan on the labelled cases."""
    experiment.preprocessed.mkdir(exist_ok=True)
    cotrain(
        *("plan", "--settings", experiment.stage("plan", experiment.preprocessed)),
        *("--cases", experiment.tables["labelled"], "--out-dir", experiment.preprocessed),
    )


def preprocess(
    experiment: Tiny, cotrain: Callable[..., None], folder: Path, *, with_label: Collection[str]
) -> None:
    """Let nnU-Net preprocess all cases into a folder for each split."""
    for split, table in experiment.tables.items():
        cotrain(
            *("preprocess", "--preprocessed", experiment.preprocessed, "--cases", table),
            *("--out-dir", folder / split, *(["--with-label"] if split in with_label else [])),
        )
