"""Speed and memory beside stock nnU-Net: in, a case table; out, a printed table and its TSV.

    python benchmarks/speed.py
    python benchmarks/speed.py --data-folder DIR --cases TABLE --labels anterior=1 posterior=2

Without a table it makes the demo's subjects. Three measures, stock and ours in turn, so that a busy
machine is busy for both:

- training: seconds from one optimiser step to the next, which is a step with its batch. Stock's
  nnUNetTrainer.train_step with its own data loader, ours as Trainer.epochs runs it; same
  plans, arrays, network and torch threads. What differs: stock steps with SGD and takes label maps
  at every scale from its loader; ours steps with AdamW, keeps a moving average of the weights and
  takes class probabilities at the finest scale. Beside them a step of our 2D network, which stock
  has none of, and what of each step is the making of its batch: reading, decompressing and
  augmenting, which processes ahead of the GPU do where there is one.
- inference: cases a minute of whole commands with their start-up, on one exported model without
  mirroring. Stock always computes on all cores of the machine.
- memory: what `cotrain infer` needs for a large volume beyond what it needs for a tiny one.

Medians over repetitions; `spread` is the lowest and the highest repetition.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cotrain.cases import SPLITS, labels_from
from cotrain.files import read_table, write_table, write_text
from cotrain.nnunet import CONFIGURATIONS, Planned, nnunet_folders
from cotrain.plan import DATASET_NAME
from cotrain.settings import Section, as_yaml, check

# Our commands do this for themselves. Stock gets it here too: on a busy machine it would else be
# several times slower, which would flatter us. Read by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

WARM_UP_STEPS = 3
"""Steps dropped at the start of every repetition: memory is allocated and kernels are chosen."""
DEMO_LABELS = ("striatum=1", "thalamus=2")
COLUMNS = ("measure", "variant", "unit", "median", "spread", "ratio", "goal", "met")
PEAK_OF_CHILD = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
sys.exit(code)
"""
"""Run through a small process: a child's peak counts that of the process it was forked from."""


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio."""

    bound: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound}"

    def met_by(self, ratio: float) -> bool:
        """Whether a ratio keeps the bound."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound


def row(
    measure: str,
    variant: str,
    unit: str,
    values: list[float],
    *,
    stock: list[float] | None = None,
    goal: Goal | None = None,
) -> dict[str, str]:
    """Return a line of the table: one value a repetition, and the ratio to stock's values."""
    ratio = None if stock is None else statistics.median(values) / statistics.median(stock)
    return {
        "measure": measure,
        "variant": variant,
        "unit": unit,
        "median": f"{statistics.median(values):.3f}",
        "spread": f"{min(values):.3f} to {max(values):.3f}",
        "ratio": "" if ratio is None else f"{ratio:.2f}",
        "goal": "" if goal is None else str(goal),
        "met": "" if goal is None else ("yes" if goal.met_by(ratio) else "NO"),
    }


@dataclass(frozen=True)
class Prepared:
    """What all measures share, in one folder: checked tables, arrays, a checkpoint, a model."""

    folder: Path
    threads: int

    @property
    def preprocessed(self) -> Path:
        """Folder of plans and arrays."""
        return self.folder / "preprocessed"

    @property
    def checkpoint(self) -> Path:
        """Checkpoint of the 3D network after a few steps."""
        return self.folder / "train_3d" / "checkpoint.pth"

    def cases(self, split: str) -> Path:
        """Checked case table of a split."""
        return self.folder / "cases" / f"{split}.tsv"

    def settings(self, name: str, section: Section) -> Path:
        """Write a stage's settings and return their path."""
        path = self.folder / "settings" / f"{name}.yaml"
        write_text(as_yaml(section), path)
        return path


def command(*words: object, environment: dict[str, str] | None = None) -> tuple[float, int]:
    """Run a command; return its seconds and the peak memory of its largest process in bytes.

    Ends this script with the command's output where it fails.
    """
    with tempfile.NamedTemporaryFile("r") as peak:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PEAK_OF_CHILD, peak.name, *map(str, words)],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"{done.stdout}\nThis command failed: {' '.join(map(str, words))}")
        return seconds, int(peak.read())


def cotrain(*words: object) -> tuple[float, int]:
    """Run `cotrain` with these words, as `command` does."""
    return command(sys.executable, "-m", "cotrain", *words)


def prepare(arguments: argparse.Namespace, folder: Path) -> Prepared:
    """Check, plan and preprocess the data, train 3D for some steps and export it."""
    prepared = Prepared(folder, arguments.threads)
    data_folder, cases, labels = arguments.data_folder, arguments.cases, arguments.labels
    if cases is None:
        data_folder = folder / "demo"
        cotrain("make-demo-data", "--folder", data_folder)
        cases, labels = data_folder / "cases.tsv", DEMO_LABELS
    from_folder = [] if data_folder is None else ["--data-folder", data_folder]
    threads = ("--threads", prepared.threads)
    jobs = ("--jobs", prepared.threads)
    for split in SPLITS:
        cotrain(
            *("check-data", "--cases", cases, *from_folder, "--labels", *labels),
            *("--list", split, "--out-dir", folder / "cases", *jobs),
        )
    for split, limit in (("test", arguments.max_cases), ("unlabelled", 4)):
        some = read_table(prepared.cases(split)).head(limit)
        if some.empty:
            sys.exit(f"{cases} has no {split} case, wanted at least one; add one to the table.")
        write_table(some, prepared.cases(split))
    plan_stage = stage_of(
        "plan",
        channels=arguments.channels,
        labels=labels_from(labels),
        network_3d={"features_per_stage": arguments.features},
    )
    plan_settings = prepared.settings("plan", plan_stage)
    preprocessed = ("--preprocessed", prepared.preprocessed)
    cotrain(
        *("plan", "--settings", plan_settings, "--cases", prepared.cases("labelled")),
        *("--out-dir", prepared.preprocessed, *jobs),
    )
    for split in SPLITS:
        cotrain(
            *("preprocess", *preprocessed, "--cases", prepared.cases(split), *jobs),
            *("--out-dir", prepared.preprocessed / split),
            *(["--with-label"] if split == "labelled" else []),
        )
    training = {"iterations_per_epoch": 40, "epochs_per_round": 1}
    shutil.rmtree(prepared.checkpoint.parent, ignore_errors=True)
    cotrain(
        *("train", "--network", "3d", "--arm", "labels_only", "--round", 0, *preprocessed),
        *("--settings", prepared.settings("train_3d", train_stage(training=training))),
        *("--labelled", prepared.cases("labelled"), *threads),
        *("--out-dir", prepared.checkpoint.parent),
    )
    infer_settings = prepared.settings("infer", infer_stage("auto"))
    cotrain(
        *("export", "--checkpoint", prepared.checkpoint, *preprocessed),
        *("--trained", prepared.checkpoint.parent / "provenance.json"),
        *("--settings", infer_settings, "--out-dir", folder / "model"),
    )
    cotrain(
        *("infer", "--network", "3d", "--checkpoint", prepared.checkpoint, *preprocessed),
        *("--settings", infer_settings, "--split", "unlabelled", *threads),
        *("--cases", prepared.cases("unlabelled"), "--out-dir", folder / "pseudo_3d"),
    )
    return prepared


def stage_of(name: str, **sections: object) -> Section:
    """Return a stage's settings with these sections, and our defaults for all others."""
    needed = {"experiment": "speed", "cases": "cases.tsv", "labels": {"label": 1}}
    return check({**needed, **sections}).stages()[name]


def train_stage(
    *, training: dict, share: float = 0, precision: str = "auto", network: str = "3d"
) -> Section:
    """Return settings of a network that is taught from its first step, by a constant share."""
    return stage_of(
        f"train_{network}",
        **{f"training_{network}": training},
        cotraining={
            "first_teacher": "2d",
            "sampling": {"share_start": share, "share_end": share},
        },
        compute={"device": "cpu", "precision": precision},
    )


def infer_stage(precision: str, *, tile_step_size: float = 0.5) -> Section:
    """Return our default settings of inference."""
    return stage_of(
        "infer",
        inference={"tile_step_size": tile_step_size},
        compute={"device": "cpu", "precision": precision},
    )


def seconds_between(moments: list[float]) -> list[float]:
    """Return the seconds from each moment to the next, warm-up dropped."""
    return [after - before for before, after in itertools.pairwise(moments)][WARM_UP_STEPS:]


def seconds_of_steps(optimizer, run: Callable[[], object]) -> list[float]:
    """Return the seconds from each optimiser step of `run` to the next, warm-up dropped."""
    moments = []
    hook = optimizer.register_step_post_hook(lambda *_: moments.append(time.perf_counter()))
    run()
    hook.remove()
    return seconds_between(moments)


@contextlib.contextmanager
def stock_trainer(prepared: Prepared, *, loader_processes: int | None) -> Iterator[object]:
    """Yield stock nnU-Net's trainer on our arrays, as `nnUNetv2_train 1 3d_fullres all` makes it.

    loader_processes: 0 makes batches in this process; None is stock's default.
    """
    import torch
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import (
        NonDetMultiThreadedAugmenter,
    )
    from nnunetv2.run.run_training import get_trainer_from_args

    os.environ.pop("nnUNet_n_proc_DA", None)
    if loader_processes is not None:
        os.environ["nnUNet_n_proc_DA"] = str(loader_processes)  # noqa: SIM112
    with nnunet_folders() as folders:
        dataset = folders / "nnUNet_preprocessed" / DATASET_NAME
        planned = Planned.read(prepared.preprocessed)
        arrays = dataset / planned.configuration("3d").data_identifier
        arrays.mkdir(parents=True)
        for path in (prepared.preprocessed / "labelled").iterdir():
            if path.suffix in (".b2nd", ".pkl"):
                (arrays / path.name).symlink_to(path)
        (dataset / "dataset.json").write_text(json.dumps(planned.dataset))
        (dataset / "nnUNetPlans.json").write_text(json.dumps(planned.plans))
        with contextlib.redirect_stdout(None):
            trainer = get_trainer_from_args(
                DATASET_NAME, CONFIGURATIONS["3d"], "all", device=torch.device("cpu")
            )
            trainer.initialize()
            trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
        trainer.network.train()
        try:
            yield trainer
        finally:
            for loader in (trainer.dataloader_train, trainer.dataloader_val):
                if isinstance(loader, NonDetMultiThreadedAugmenter):
                    loader._finish()


def measure_training(prepared: Prepared, *, steps: int, repetitions: int) -> list[dict]:
    """Return the table's lines about training: the median step of every repetition."""
    import torch

    from cotrain.batches import BatchSource, Case, batches
    from cotrain.training import Trainer

    torch.set_num_threads(prepared.threads)
    planned = Planned.read(prepared.preprocessed)
    steps += WARM_UP_STEPS + 1
    labelled, unlabelled = (
        [
            Case(
                name,
                str(prepared.preprocessed / split / name),
                str(prepared.folder / "pseudo_3d" / f"{name}.b2nd") if soft else None,
            )
            for name in read_table(prepared.cases(split))["case"]
        ]
        for split, soft in (("labelled", False), ("unlabelled", True))
    )

    def ours(precision: str, share: float, network: str = "3d") -> Callable[[], list[float]]:
        training = {"iterations_per_epoch": steps}
        stage = train_stage(training=training, share=share, precision=precision, network=network)
        trainer = Trainer(planned, network, stage)
        trainer.start(None)

        def epoch() -> None:
            next(
                trainer.epochs(
                    trainer.schedule.window(0),
                    0,
                    labelled=labelled,
                    unlabelled=unlabelled,
                    control=share == 0,
                )
            )

        return lambda: seconds_of_steps(trainer.optimizer, epoch)

    def batch_alone(network: str) -> Callable[[], list[float]]:
        half = planned.configuration(network).batch_size // 2
        source = BatchSource(
            planned,
            network,
            labelled=labelled,
            unlabelled=unlabelled,
            counts=np.full((1, steps), half),
            seed=0,
            first_epoch=0,
            mirroring=True,
        )

        return lambda: seconds_between(
            [time.perf_counter() for _ in batches(source, workers=0, pin_memory=False)]
        )

    def stock(trainer) -> Callable[[], list[float]]:
        def epoch() -> None:
            for _ in range(steps):
                trainer.train_step(next(trainer.dataloader_train))

        return lambda: seconds_of_steps(trainer.optimizer, epoch)

    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(stock_trainer(prepared, loader_processes=number))
            for number in (None, 0)
        ]
        variants = {
            "stock, batches in its process": stock(processes[1]),
            "ours, fp32": ours("fp32", 0),
            "ours, fp32, half pseudo-labelled": ours("fp32", 0.5),
            "stock, its default batch processes": stock(processes[0]),
            "ours, bf16": ours("bf16", 0),
            "ours, bf16, half pseudo-labelled": ours("bf16", 0.5),
            "our batch alone, half pseudo-labelled": batch_alone("3d"),
            "our 2D, fp32, half pseudo-labelled": ours("fp32", 0.5, "2d"),
            "our 2D, bf16, half pseudo-labelled": ours("bf16", 0.5, "2d"),
            "our 2D batch alone, half pseudo-labelled": batch_alone("2d"),
        }
        if not has_fast_bf16():
            variants = {name: run for name, run in variants.items() if "bf16" not in name}
        medians = {name: [] for name in variants}
        for _ in range(repetitions):
            for name, run in variants.items():
                medians[name].append(statistics.median(run()))
    reference = medians["stock, batches in its process"]
    goals = {"ours, fp32": Goal(1.05), "ours, bf16": Goal(0.5)}
    return [
        row(
            "training",
            name,
            "s per batch" if "alone" in name else "s per step",
            values,
            stock=None if "2D" in name else reference,
            goal=goals.get(name),
        )
        for name, values in medians.items()
    ]


def has_fast_bf16() -> bool:
    """Whether this CPU trains faster in bf16, as `compute.precision: auto` decides."""
    import torch

    from cotrain.device import is_bf16_faster

    return is_bf16_faster(torch.cpu.get_capabilities())


def measure_inference(prepared: Prepared, *, repetitions: int) -> list[dict]:
    """Return the table's lines about inference: cases a minute of every repetition."""
    images = prepared.folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    cases = read_table(prepared.cases("test"))
    for case in cases.itertuples():
        for channel, path in enumerate(case.image.split(";")):
            (images / f"{case.case}_{channel:04d}.nii.gz").symlink_to(path)
    program = Path(sys.executable).with_name("nnUNetv2_predict")
    precisions = ("fp32", "bf16") if has_fast_bf16() else ("fp32",)
    settings = {name: prepared.settings(f"infer_{name}", infer_stage(name)) for name in precisions}

    def stock(out_dir: Path, *processes: object) -> float:
        seconds, _ = command(
            *(program, "-i", images, "-o", out_dir, "-d", DATASET_NAME),
            *("-c", CONFIGURATIONS["3d"], "-f", "all", "-device", "cpu", "--disable_tta"),
            *processes,
            environment={"nnUNet_results": str(prepared.folder / "model")},
        )
        return seconds

    def ours(out_dir: Path, precision: str, preprocessed: Path = prepared.preprocessed) -> float:
        seconds, _ = cotrain(
            *("infer", "--network", "3d", "--checkpoint", prepared.checkpoint),
            *("--settings", settings[precision], "--preprocessed", preprocessed),
            *("--split", "test", "--cases", prepared.cases("test"), "--out-dir", out_dir),
            *("--threads", prepared.threads),
        )
        return seconds

    def ours_from_images(out_dir: Path, precision: str) -> float:
        fresh = out_dir / "preprocessed"
        fresh.mkdir(parents=True)
        for name in ("plans.json", "dataset.json"):
            shutil.copy(prepared.preprocessed / name, fresh)
        seconds, _ = cotrain(
            *("preprocess", "--preprocessed", fresh, "--cases", prepared.cases("test")),
            *("--out-dir", fresh / "test", "--jobs", prepared.threads),
        )
        return seconds + ours(out_dir, precision, fresh)

    variants: dict[str, Callable[[Path], float]] = {
        "stock, -npp 1 -nps 1": lambda out: stock(out, "-npp", 1, "-nps", 1),
        "stock, its defaults (-npp 3 -nps 3)": stock,
        "stock, one process (-npp 0 -nps 0)": lambda out: stock(out, "-npp", 0, "-nps", 0),
    }
    for name in precisions:
        variants[f"ours, {name}"] = lambda out, name=name: ours(out, name)
        variants[f"ours, {name}, with preprocessing"] = lambda out, name=name: ours_from_images(
            out, name
        )
    rates = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, run in variants.items():
            with tempfile.TemporaryDirectory(dir=prepared.folder) as out_dir:
                rates[name].append(60 * len(cases) / run(Path(out_dir, "masks")))
    reference = rates["stock, -npp 1 -nps 1"]
    return [
        row(
            f"inference of {len(cases)} cases",
            name,
            "cases per minute",
            values,
            stock=reference,
            goal=None if name.startswith("stock") or "with" in name else Goal(2, at_least=True),
        )
        for name, values in rates.items()
    ]


def write_large_case(
    prepared: Prepared, folder: Path, *, shape: tuple[int, ...], finer: float
) -> tuple[Path, int]:
    """Write a preprocessed case of `shape` `(Z, Y, X)`; return its case table and float32 bytes.

    It is a test case repeated in all directions, so it compresses and is segmented as real data.
    finer: how many times smaller than a preprocessed voxel its image's voxels are, along each axis.
    """
    import blosc2
    import nibabel
    from nnunetv2.training.dataloading.nnunet_dataset import (
        comp_blosc2_params,
        nnUNetDatasetBlosc2,
    )

    planned = Planned.read(prepared.preprocessed)
    configuration = planned.configuration("3d")
    first = read_table(prepared.cases("test"))["case"][0]
    small = blosc2.open(str(prepared.preprocessed / "test" / f"{first}.b2nd"), mode="r")[:]
    indices = [np.arange(size) % have for size, have in zip(shape, small.shape[1:], strict=True)]
    data = np.ascontiguousarray(small[(slice(None), *np.ix_(*indices))])
    image_shape = [round(size * finer) for size in shape]
    backward = planned.manager.transpose_backward
    spacing = [configuration.spacing[axis] / finer for axis in backward]
    properties = {
        "spacing": spacing,
        "shape_before_cropping": tuple(image_shape),
        "bbox_used_for_cropping": [[0, size] for size in image_shape],
        "shape_after_cropping_and_before_resampling": tuple(image_shape),
    }
    blocks, chunks = comp_blosc2_params(data.shape, tuple(configuration.patch_size), 4)
    (folder / "test").mkdir(parents=True)
    nnUNetDatasetBlosc2.save_case(
        data,
        np.zeros(data.shape[1:], dtype=np.int8)[None],
        properties,
        str(folder / "test" / "large"),
        chunks=chunks,
        blocks=blocks,
    )
    for name in ("plans.json", "dataset.json"):
        shutil.copy(prepared.preprocessed / name, folder)
    # Only its grid is used. NIfTI's axes are nnU-Net's in reverse.
    grid = [image_shape[axis] for axis in backward][::-1]
    image = nibabel.Nifti1Image(np.zeros(grid, dtype=np.uint8), np.diag([*spacing[::-1], 1]))
    nibabel.save(image, folder / "large.nii.gz")
    line = {"case": "large", "image": str(folder / "large.nii.gz"), "label": ""}
    write_table(pd.DataFrame([line]), folder / "test.tsv")
    return folder / "test.tsv", data.nbytes


def measure_memory(prepared: Prepared, *, shape: tuple[int, ...]) -> list[dict]:
    """Return the table's lines about memory, in multiples of the preprocessed volume's bytes."""
    # Windows without overlap: fewer of them, and the same memory.
    settings = prepared.settings("infer_memory", infer_stage("auto", tile_step_size=1))

    def peak(shape: tuple[int, ...], finer: float) -> tuple[int, int]:
        with tempfile.TemporaryDirectory(dir=prepared.folder) as folder:
            preprocessed = Path(folder, "preprocessed")
            cases, size = write_large_case(prepared, preprocessed, shape=shape, finer=finer)
            _, bytes_ = cotrain(
                *("infer", "--network", "3d", "--checkpoint", prepared.checkpoint),
                *("--settings", settings, "--preprocessed", preprocessed, "--split", "test"),
                *("--cases", cases, "--out-dir", Path(folder, "masks")),
                *("--threads", prepared.threads),
            )
        return bytes_, size

    patch = tuple(Planned.read(prepared.preprocessed).configuration("3d").patch_size)
    tiny, _ = peak(patch, 1)
    lines = []
    for finer, grid in ((1, "image on the same grid"), (1.5, "image 1.5x finer along each axis")):
        large, size = peak(shape, finer)
        multiple = (large - tiny) / size
        name = f"{'x'.join(map(str, shape))} voxels, {size / 1e6:.0f} MB, {grid}"
        line = row("memory", name, "volumes", [multiple], stock=[1.0], goal=Goal(3))
        lines.append({**line, "spread": f"{large / 1e6:.0f} MB - {tiny / 1e6:.0f} MB"})
    return lines


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-folder", type=Path, help="folder the table's paths start from")
    parser.add_argument("--cases", type=Path, help="case table; without it, the demo's subjects")
    parser.add_argument("--labels", nargs="+", metavar="NAME=VALUE", help="labels of the table")
    parser.add_argument("--channels", nargs="+", default=["MRI"], help="nnU-Net channel names")
    parser.add_argument(
        "--features", nargs="+", type=int, default=[8, 16, 32, 64], help="3D network's width"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--steps", type=int, default=12, help="training steps in a repetition")
    parser.add_argument("--repetitions", type=int, default=3, help="of every variant, in turn")
    parser.add_argument("--max-cases", type=int, default=20, help="test cases to infer")
    parser.add_argument(
        "--memory-shape",
        nargs=3,
        type=int,
        default=[200, 320, 320],
        metavar=("Z", "Y", "X"),
        help="voxels of the large volume",
    )
    measures = ["training", "inference", "memory"]
    parser.add_argument("--only", nargs="+", choices=measures, default=measures)
    parser.add_argument("--folder", type=Path, help="keep what is made here; default: temporary")
    parser.add_argument("--out", type=Path, default=Path("speed.tsv"), help="table to write")
    arguments = parser.parse_args()
    if (arguments.cases is None) != (arguments.labels is None):
        parser.error("--cases and --labels belong together; give both or none")

    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepared = prepare(arguments, folder.absolute())
        lines = []
        if "training" in arguments.only:
            lines += measure_training(
                prepared, steps=arguments.steps, repetitions=arguments.repetitions
            )
        if "inference" in arguments.only:
            lines += measure_inference(prepared, repetitions=arguments.repetitions)
        if "memory" in arguments.only:
            lines += measure_memory(prepared, shape=tuple(arguments.memory_shape))
    table = pd.DataFrame(lines, columns=list(COLUMNS))
    print(table.to_string(index=False))
    write_table(table, arguments.out)
    print(f"{arguments.threads} torch threads, {os.cpu_count()} cores; table: {arguments.out}")


if __name__ == "__main__":
    main()
