"""The usual peers of co-training, two 3D networks and no 2D: in, an experiment; out, test scores.

    python benchmarks/peers.py --peer mean_teacher --experiment results/NAME --epochs 108 \\
        --out-dir results/NAME_mean_teacher

Takes the experiment's plans, arrays, labelled cases, seed and settings of the 3D network.
Unlabelled patches have no masks on disk here: what they are taught is computed in each step. So
two things differ beside the method: no unlabelled patch is aimed at foreground, and the rates fall
once over all epochs, as is usual for these methods, instead of restarting.

- **mean_teacher** (Tarvainen & Valpola 2017): the moving average of the network's own weights sees
  the patch with noise on it, and its probabilities are the target.
- **cross_pseudo** (cross pseudo supervision, Chen et al. 2021): two networks of different random
  starts teach each other their most probable labels; the first one is scored.

Rates, augmentation, loss and the unlabelled share of a batch are those of co-training.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import one_hot

from cotrain.__main__ import main as cotrain
from cotrain.batches import Case
from cotrain.device import autocast
from cotrain.errors import InputError
from cotrain.files import read_table, write_text
from cotrain.masks import write_soft
from cotrain.nnunet import Planned, arrays_of
from cotrain.schedule import Window
from cotrain.settings import TrainStage, load
from cotrain.training import Trainer, labelled_cases

NOISE = 0.1
"""Standard deviation of the noise on what a mean teacher sees; images are normalised to 1."""


class OnTheFly(Trainer):
    """A training whose unlabelled samples, the last ones of a batch, get their target here."""

    def begin(self, window: Window) -> None:
        """Make the network, and remember which samples of each batch are unlabelled."""
        self.start(None)
        self.window = window

    def _step(self, batch: dict[str, torch.Tensor], iteration: int) -> torch.Tensor:
        batch_size = len(batch["data"])
        counts = self.schedule.unlabelled_counts(self.window, self.epoch, batch_size)
        labelled = batch_size - int(counts[iteration])
        return self._taught_step(batch, iteration, labelled)

    def _taught_step(self, batch: dict, iteration: int, labelled: int) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def probabilities(self, network: torch.nn.Module, data: torch.Tensor) -> torch.Tensor:
        """Return a network's probabilities `(B, K, ...)` of patches, on the CPU."""
        with autocast(self.device, self.precision):
            logits = network(data.to(self.device))
        finest = logits[0] if isinstance(logits, (list, tuple)) else logits
        return torch.softmax(finest.float(), 1).cpu()

    def taught(self, batch: dict, iteration: int, labelled: int, target: torch.Tensor):
        """Take a step with `target` for the unlabelled samples."""
        whole = torch.cat([batch["target"][:labelled], target])
        return super()._step({**batch, "target": whole}, iteration)


class MeanTeacher(OnTheFly):
    """The network's own moving average is the teacher."""

    def begin(self, window: Window) -> None:
        super().begin(window)
        if self.average is None:
            raise InputError("A mean teacher needs cotraining.ema_decay above 0; set it.")

    def _taught_step(self, batch: dict, iteration: int, labelled: int) -> torch.Tensor:
        patches = batch["data"][labelled:]
        noisy = patches + NOISE * torch.randn_like(patches).clamp_(-2, 2)
        target = batch["target"][labelled:]
        if len(patches):
            target = self.probabilities(self.average.module, noisy)
        return self.taught(batch, iteration, labelled, target)


class CrossPseudo(OnTheFly):
    """A second network, started from another seed, teaches and is taught."""

    def begin(self, window: Window) -> None:
        super().begin(window)
        stage = self.stage.model_copy(update={"seed": self.stage.seed + 1000})
        self.partner = OnTheFly(self.planned, self.network_name, stage)
        self.partner.begin(window)

    def _taught_step(self, batch: dict, iteration: int, labelled: int) -> torch.Tensor:
        patches = batch["data"][labelled:]
        mine = theirs = batch["target"][labelled:]
        if len(patches):
            mine, theirs = (
                hard(self.probabilities(each.network, patches)) for each in (self, self.partner)
            )
        self.partner.epoch = self.epoch
        for group in self.partner.optimizer.param_groups:
            group["lr"] = self.optimizer.param_groups[0]["lr"]
        self.partner.taught(batch, iteration, labelled, mine)
        return self.taught(batch, iteration, labelled, theirs)


PEERS = {"mean_teacher": MeanTeacher, "cross_pseudo": CrossPseudo}


def hard(probabilities: torch.Tensor) -> torch.Tensor:
    """Return `(B, K, ...)` probabilities with 1 for the most probable class."""
    classes = probabilities.shape[1]
    return one_hot(probabilities.argmax(1), classes).movedim(-1, 1).float()


def blank_masks(cases: list[str], preprocessed: Path, folder: Path, planned: Planned) -> list[Case]:
    """Return unlabelled cases with empty soft masks, whose patches are drawn without any aim."""
    import blosc2

    found = []
    for case in cases:
        arrays, soft = arrays_of(preprocessed / "unlabelled", case), folder / f"{case}.b2nd"
        shape = blosc2.open(arrays + ".b2nd", mode="r").shape[1:]
        empty = np.zeros((planned.class_count - 1, *shape), dtype=np.uint8)
        write_soft(empty, soft, patch_size=planned.configuration("3d").patch_size)
        found.append(Case(case, arrays, str(soft)))
    return found


def train(arguments: argparse.Namespace) -> Path:
    """Train a peer for `--epochs` epochs on one schedule, and return its checkpoint."""
    experiment, out = arguments.experiment, arguments.out_dir
    preprocessed = experiment / "preprocessed"
    stage = load(experiment / "settings" / "train_3d.yaml", model=TrainStage)
    # One phase over all epochs, as the 3D network has it where 2D teaches first.
    training = stage.training.model_copy(update={"epochs_per_round": arguments.epochs})
    cotraining = stage.cotraining.model_copy(update={"first_teacher": "2d"})
    stage = stage.model_copy(update={"training": training, "cotraining": cotraining})
    planned = Planned.read(preprocessed)
    trainer = PEERS[arguments.peer](planned, "3d", stage)
    window = Window(0, arguments.epochs, "cotraining", 0, arguments.epochs)
    trainer.begin(window)
    labelled = labelled_cases(experiment / "cases" / "labelled.tsv", preprocessed)
    unlabelled = blank_masks(
        list(read_table(experiment / "cases" / "unlabelled.tsv")["case"]),
        preprocessed,
        out / "blank",
        planned,
    )
    for row in trainer.epochs(window, 0, labelled=labelled, unlabelled=unlabelled, control=False):
        print(
            f"{arguments.peer} epoch {row['epoch']} of {arguments.epochs}  loss {row['loss']:.4f}  "
            f"unlabelled share {row['share_realised']:.3f}  {row['seconds']:.1f} s",
            flush=True,
        )
    trainer.save(out / "checkpoint.pth")
    return out / "checkpoint.pth"


def main() -> int:
    """Train, infer the test cases and score them, with the package's own commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=sorted(PEERS), required=True)
    parser.add_argument("--experiment", type=Path, required=True, help="results/NAME, preprocessed")
    parser.add_argument("--epochs", type=int, required=True, help="epochs of 3D training")
    parser.add_argument("--labels", nargs="+", required=True, metavar="NAME=VALUE")
    parser.add_argument("--scores", type=Path, required=True, help="table of scores to write")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for everything else")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment, out = arguments.experiment, arguments.out_dir
    checkpoint = train(arguments)
    # From the start of the process on, as the steps of the workflow note theirs.
    minutes = time.process_time() / 60
    write_text(f"{minutes:.2f}\n", out / "minutes.txt")
    masks, cases = out / "test_3d", experiment / "cases" / "test.tsv"
    infer = ["infer", "--network", "3d", "--checkpoint", checkpoint, "--split", "test"]
    infer += ["--settings", experiment / "settings" / "infer.yaml", "--cases", cases]
    infer += ["--preprocessed", experiment / "preprocessed", "--out-dir", masks]
    infer += ["--threads", arguments.threads]
    evaluate = ["evaluate", "--masks", masks, "--cases", cases]
    evaluate += ["--labels", *arguments.labels, "--out", arguments.scores]
    failed = any(cotrain([str(word) for word in words]) for words in (infer, evaluate))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
