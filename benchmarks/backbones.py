"""What each backbone costs: in, an experiment; out, a table of parameters, seconds and memory.

    python benchmarks/backbones.py --experiment results/NAME

Plans each network anew on the experiment's labelled cases and trains it for some steps on its
arrays, in a process of its own, one after the other. 3D networks have one patch (`--patch-size`,
which all of them can halve often enough) and the experiment's batch size, 2D networks the
experiment's slices; widths are chosen for a CPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from cotrain.batches import BatchSource
from cotrain.files import write_text
from cotrain.nnunet import Planned
from cotrain.settings import Network2D, Network3D, PlanStage, TrainStage, as_yaml, load
from cotrain.training import Trainer, labelled_cases

MONAI = Path(__file__).parents[1] / "config" / "networks" / "monai_networks.py"
NETWORKS: dict[str, tuple[str, dict]] = {
    "EfficientNet-Lite0, Unet": ("2d", {}),
    "EfficientNet-Lite0, Unet, LoRA 64": ("2d", {"adaptation": "lora"}),
    "PVTv2-B2, Unet": ("2d", {"encoder": "pvt_v2_b2"}),
    "PVTv2-B2, Unet, LoRA 64": ("2d", {"encoder": "pvt_v2_b2", "adaptation": "lora"}),
    "ViT-S/16 DINOv3, DPT, LoRA 64": (
        "2d",
        {"encoder": "vit_small_patch16_dinov3", "decoder": "DPT", "adaptation": "lora"},
    ),
    "nnU-Net plain": ("3d", {}),
    "nnU-Net ResEnc M": ("3d", {"planner": "nnUNetPlannerResEncM"}),
    "MONAI SegResNet": (
        "3d",
        {"architecture": f"{MONAI}:SegResNet3D", "arguments": {"init_filters": 16}},
    ),
    "MONAI SwinUNETR": (
        "3d",
        {"architecture": f"{MONAI}:SwinUNETR3D", "arguments": {"feature_size": 24}},
    ),
    "MONAI plain U-Net": (
        "3d",
        {
            "architecture": f"{MONAI}:PlainUNet3D",
            "arguments": {"features": [16, 16, 32, 64, 128, 16]},
        },
    ),
}
"""Name → (network, what differs from the experiment's settings)."""


def plan_of(stage: PlanStage, name: str, patch_size: list[int]) -> PlanStage:
    """Return the experiment's planning settings with one network exchanged."""
    network, changes = NETWORKS[name]
    if network == "2d":
        own = {**stage.network_2d.model_dump(), **changes}
        return stage.model_copy(update={"network_2d": Network2D(**own)})
    own = {**stage.network_3d.model_dump(), "patch_size": patch_size, **changes}
    if "architecture" in changes:
        own["features_per_stage"] = None
    return stage.model_copy(update={"network_3d": Network3D(**own)})


def measure(experiment: Path, name: str, steps: int, patch_size: list[int]) -> dict:
    """Plan a network and train it for some steps; return what it cost in this process."""
    network = NETWORKS[name][0]
    stage = plan_of(load(experiment / "settings/plan.yaml", model=PlanStage), name, patch_size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_text(as_yaml(stage), folder / "plan.yaml")
        command = [sys.executable, "-m", "cotrain", "plan", "--out-dir", folder]
        command += ["--settings", folder / "plan.yaml"]
        command += ["--cases", experiment / "cases/labelled.tsv"]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        planned = Planned.read(folder)
        training = load(experiment / f"settings/train_{network}.yaml", model=TrainStage)
        trainer = Trainer(planned, network, training)
        trainer.start(None)
        source = BatchSource(
            planned,
            network,
            labelled=labelled_cases(experiment / "cases/labelled.tsv", experiment / "preprocessed"),
            unlabelled=[],
            counts=np.zeros((1, steps), dtype=int),
            seed=0,
            first_epoch=0,
            mirroring=training.training.mirroring,
        )
        trainer.compiled.train()
        seconds = []
        for iteration in range(steps):
            began = time.perf_counter()
            trainer._step(source[iteration], iteration)
            seconds.append(time.perf_counter() - began)
    parameters = list(trainer.network.parameters())
    return {
        "parameters": sum(each.numel() for each in parameters) / 1e6,
        "trained": sum(each.numel() for each in parameters if each.requires_grad) / 1e6,
        "seconds": statistics.median(seconds[2:]),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Measure each network in a process of its own, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", type=Path, required=True, help="results/NAME, preprocessed")
    parser.add_argument("--steps", type=int, default=8, help="steps; the first two are not counted")
    parser.add_argument("--patch-size", type=int, nargs=3, default=[64, 64, 96], help="of 3D")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores to use")
    parser.add_argument("--one", choices=list(NETWORKS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(arguments.threads)
        made = measure(arguments.experiment, arguments.one, arguments.steps, arguments.patch_size)
        print(json.dumps(made))
        return
    print(
        "| network | parameters, M | trained, M | s/step | peak memory, MB |\n|---|---|---|---|---|"
    )
    for name in NETWORKS:
        ran = subprocess.run(
            [sys.executable, *sys.argv, "--one", name],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        made = json.loads(ran.stdout.splitlines()[-1])
        print(
            f"| {name} | {made['parameters']:.2f} | {made['trained']:.2f} | {made['seconds']:.2f} "
            f"| {made['memory_mb']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
