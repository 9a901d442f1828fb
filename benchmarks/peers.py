"""The usual peers of co-training, two 3D networks and no 2D: in, an experiment; out, test scores.

    python benchmarks/peers.py --peer mean_teacher --experiment results/NAME --epochs 108 \\
        --out-dir results/NAME_mean_teacher

Takes the experiment's plans, arrays, labelled cases, seed, rates, augmentation and supervised loss
of the 3D network. The rest is what these methods have where they are compared with others on
volumes (the public benchmark SSL4MIS): half of each batch is unlabelled; what it adds to the loss
of the labelled half rises over the whole training, as exp(-5 (1 - t)^2), to a tenth of that loss's
weight; the rates fall once, over all epochs.

- **mean_teacher** (Tarvainen & Valpola 2017): the moving average of the network's own weights sees
  an unlabelled patch with noise on it; the squared difference of their probabilities is added.
- **cross_pseudo** (cross pseudo supervision, Chen et al. 2021): two networks of different random
  starts; the cross-entropy with the other's most probable labels is added. Scored are the first
  network and the mean of both.

Targets are computed in each step. So one thing differs beside the method: no unlabelled patch is
aimed at foreground.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from cotrain.__main__ import main as cotrain
from cotrain.batches import Case
from cotrain.device import autocast
from cotrain.errors import InputError
from cotrain.files import read_table, write_text
from cotrain.losses import DiceAndSoftCrossEntropy
from cotrain.masks import write_soft
from cotrain.nnunet import Planned, arrays_of
from cotrain.schedule import Window
from cotrain.settings import TrainStage, load
from cotrain.training import Trainer, labelled_cases

NOISE = 0.1
"""Standard deviation of the noise on what a mean teacher sees; images are normalised to 1."""
WEIGHT = 0.2
"""Highest weight of what unlabelled patches add: SSL4MIS has 0.1 beside half of Dice and
cross-entropy, where this loss has the whole of both."""


class OnTheFly(Trainer):
    """A training whose unlabelled samples, the last ones of a batch, get their target here."""

    def begin(self, window: Window) -> None:
        """Make the network, and the loss that treats the two parts of a batch differently."""
        self.start(None)
        self.window = window
        self.loss = Mixed(self.loss, self.unsupervised)

    def _step(self, batch: dict[str, torch.Tensor], iteration: int) -> torch.Tensor:
        batch_size = len(batch["data"])
        counts = self.schedule.unlabelled_counts(self.window, self.epoch, batch_size)
        progress = self.schedule.progress(self.window, self.epoch, iteration)
        return self._taught_step(batch, iteration, batch_size - int(counts[iteration]), progress)

    def _taught_step(
        self, batch: dict, iteration: int, labelled: int, progress: float
    ) -> torch.Tensor:
        raise NotImplementedError

    def unsupervised(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of unlabelled samples, from finest logits and probabilities."""
        raise NotImplementedError

    @torch.no_grad()
    def probabilities(self, network: torch.nn.Module, data: torch.Tensor) -> torch.Tensor:
        """Return a network's probabilities `(B, K, ...)` of patches, on the CPU."""
        with autocast(self.device, self.precision):
            logits = network(data.to(self.device))
        finest = logits[0] if isinstance(logits, (list, tuple)) else logits
        return torch.softmax(finest.float(), 1).cpu()

    def taught(
        self, batch: dict, iteration: int, labelled: int, progress: float, target: torch.Tensor
    ) -> torch.Tensor:
        """Take a step with `target` for the unlabelled samples."""
        self.loss.labelled, self.loss.weight = labelled, ramp(progress)
        whole = torch.cat([batch["target"][:labelled], target])
        return super()._step({**batch, "target": whole}, iteration)


class Mixed(torch.nn.Module):
    """The loss of the labelled samples, plus a weight times that of the unlabelled ones.

    labelled: how many of a batch's samples are, the first ones; set before each step, as weight is.
    """

    def __init__(self, supervised: DiceAndSoftCrossEntropy, unsupervised: Callable) -> None:
        super().__init__()
        self.supervised, self.unsupervised = supervised, unsupervised
        self.labelled, self.weight = 0, 0.0

    def forward(self, logits: torch.Tensor | list[torch.Tensor], target: torch.Tensor):
        scales = [logits] if isinstance(logits, torch.Tensor) else list(logits)
        first, rest = slice(self.labelled), slice(self.labelled, None)
        loss = scales[0].new_zeros((), dtype=torch.float32)
        if len(target[first]):
            loss = loss + self.supervised([each[first] for each in scales], target[first])
        if len(target[rest]):
            unsupervised = self.unsupervised(scales[0][rest].float(), target[rest])
            loss = loss + self.weight * unsupervised
        return loss


class MeanTeacher(OnTheFly):
    """The network's own moving average is the teacher."""

    def begin(self, window: Window) -> None:
        super().begin(window)
        if self.average is None:
            raise InputError("A mean teacher needs cotraining.ema_decay above 0; set it.")

    def _taught_step(
        self, batch: dict, iteration: int, labelled: int, progress: float
    ) -> torch.Tensor:
        patches = batch["data"][labelled:]
        noise = NOISE * torch.randn_like(patches).clamp_(-2, 2)
        target = self.probabilities(self.average.module, patches + noise)
        return self.taught(batch, iteration, labelled, progress, target)

    def unsupervised(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mse_loss(torch.softmax(logits, 1), target)


class CrossPseudo(OnTheFly):
    """A second network, started from another seed, teaches and is taught."""

    def begin(self, window: Window) -> None:
        super().begin(window)
        stage = self.stage.model_copy(update={"seed": self.stage.seed + 1000})
        self.partner = CrossPseudo(self.planned, self.network_name, stage)
        # Not its own `begin`: it has no partner but this one.
        OnTheFly.begin(self.partner, window)

    def _taught_step(
        self, batch: dict, iteration: int, labelled: int, progress: float
    ) -> torch.Tensor:
        patches = batch["data"][labelled:]
        # Both before either has learnt from the other.
        mine, theirs = (
            hard(self.probabilities(each.network, patches)) for each in (self, self.partner)
        )
        self.partner.epoch = self.epoch
        for group in self.partner.optimizer.param_groups:
            group["lr"] = self.optimizer.param_groups[0]["lr"]
        self.partner.taught(batch, iteration, labelled, progress, mine)
        return self.taught(batch, iteration, labelled, progress, theirs)

    def unsupervised(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, target)


PEERS = {"mean_teacher": MeanTeacher, "cross_pseudo": CrossPseudo}


def ramp(progress: float) -> float:
    """Return the weight of unlabelled patches at a share of the training (Laine & Aila 2017)."""
    return WEIGHT * math.exp(-5 * (1 - progress) ** 2)


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


def train(arguments: argparse.Namespace) -> list[Path]:
    """Train a peer for `--epochs` epochs, and return the checkpoint of each of its networks."""
    experiment, out = arguments.experiment, arguments.out_dir
    preprocessed = experiment / "preprocessed"
    stage = load(experiment / "settings" / "train_3d.yaml", model=TrainStage)
    # One phase over all epochs, as the 3D network has it where 2D teaches first.
    training = stage.training.model_copy(update={"epochs_per_round": arguments.epochs})
    half = {"mode": "ramp", "share_start": 0.5, "share_end": 0.5, "min_labelled_per_batch": 0}
    sampling = stage.cotraining.sampling.model_copy(update=half)
    cotraining = stage.cotraining.model_copy(update={"first_teacher": "2d", "sampling": sampling})
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
    trainers = [trainer, *([trainer.partner] if isinstance(trainer, CrossPseudo) else [])]
    checkpoints = [out / f"checkpoint_{number}.pth" for number in range(len(trainers))]
    for each, path in zip(trainers, checkpoints, strict=True):
        each.save(path)
    return checkpoints


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
    parser.add_argument(
        "--scores-of-mean", type=Path, help="the same of the mean of two networks (cross_pseudo)"
    )
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for everything else")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experiment, out = arguments.experiment, arguments.out_dir
    checkpoints = train(arguments)
    # From the start of the process on, as the steps of the workflow note theirs.
    minutes = time.process_time() / 60
    write_text(f"{minutes:.2f}\n", out / "minutes.txt")
    cases = experiment / "cases" / "test.tsv"
    of_test = ["--split", "test", "--cases", cases, "--preprocessed", experiment / "preprocessed"]
    of_test += ["--threads", arguments.threads]
    masks = []
    for number, checkpoint in enumerate(checkpoints):
        masks.append(out / f"test_{number}")
        infer = ["infer", "--network", "3d", "--checkpoint", checkpoint, "--out-dir", masks[-1]]
        call(*infer, "--settings", experiment / "settings" / "infer.yaml", *of_test)
    scored = {arguments.scores: masks[0]}
    if arguments.scores_of_mean:
        scored[arguments.scores_of_mean] = out / "test_mean"
        call("merge", "--masks", *masks, "--out-dir", out / "test_mean", *of_test)
    for scores, folder in scored.items():
        evaluate = ["evaluate", "--masks", folder, "--cases", cases, "--out", scores]
        call(*evaluate, "--labels", *arguments.labels)
    return 0


def call(*words: object) -> None:
    """Run a command of the package in this process; leave with its exit code where it fails."""
    code = cotrain([str(word) for word in words])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
