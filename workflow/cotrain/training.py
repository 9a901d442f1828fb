"""Training of one network for one round: in, a checkpoint, labels and audited masks; out, the next.

Network, augmentation, Dice loss and plans are nnU-Net's. The loop is ours instead of a subclass of
nnUNetTrainer: that class ties together a validation split (we have no label to spare), folders in
the environment, unseeded augmenter processes and pickled checkpoints, and each of them would have
to be overridden to make a killed training end in the same bits as an undisturbed one.
"""

import argparse
import hashlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cotrain.audit import accepted_in, learnt_from
from cotrain.batches import STREAMS, BatchSource, Case, batches, seed_everything
from cotrain.device import (
    arrange_for_cpu,
    autocast,
    device_of,
    devices_of,
    precision_of,
    telling_what_takes_less,
)
from cotrain.errors import InputError
from cotrain.files import read_table, sha256_of, write_atomically, write_table
from cotrain.losses import DiceAndSoftCrossEntropy
from cotrain.nnunet import Planned, arrays_in, arrays_of
from cotrain.provenance import keep_provenance
from cotrain.schedule import Schedule, Window
from cotrain.settings import Cotraining, TrainStage, learnt_of, load
from cotrain.shards import manifests_of
from cotrain.team import Place, team
from cotrain.workfolder import WorkFolder

GRADIENT_NORM = 12
"""nnU-Net's bound on the gradient norm."""
QUICK_SAVE_SECONDS = 1
"""A checkpoint that is saved as fast as this is saved after each epoch."""
SHARE_FOR_SAVING = 0.05
"""Share of a training's time that saving may take where it is slower."""
CURVE_COLUMNS = (
    "epoch",
    "round",
    "loss",
    "learning_rate",
    "share_wanted",
    "share_realised",
    "seconds",
)


class MovingAverage(ModelEmaV3):
    """timm's moving average of weights, with each tensor taken once.

    nnU-Net's networks list a convolution under up to four names, and timm's own loop over
    `state_dict()` moves it once for each: encoder, decoder and head would follow at different
    decays, and on a GPU, in one launch, at random ones.
    """

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move every parameter and buffer towards the model's by 1 - decay."""
        for average, current in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point():
                average.lerp_(current, 1 - decay)
            else:
                average.copy_(current)


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


@dataclass
class Trainer:
    """A network in training with all state that goes from round to round.

    epoch: the next epoch to train. curve: one row an epoch, in the order of CURVE_COLUMNS. place:
    which of the processes this is that train together; all have the same weights.
    """

    planned: Planned
    network_name: str
    stage: TrainStage
    workers: int = 0
    epoch: int = 0
    curve: list[list[float]] = field(default_factory=list)
    place: Place = field(default_factory=Place)

    def __post_init__(self) -> None:
        self.device = self.place.device or device_of(self.stage.compute)
        self.precision = precision_of(self.stage.compute, self.device, training=True)
        self.schedule = Schedule(
            self.network_name,
            self.stage.training,
            self.stage.cotraining,
            self.stage.last_round,
        )
        seed_everything(self.stage.seed, STREAMS[self.network_name])
        self.network = self.planned.build_network(
            self.network_name,
            deep_supervision=self.planned.has_deep_supervision(self.network_name),
        )
        self.loss = DiceAndSoftCrossEntropy(
            batch_dice=self.planned.configuration(self.network_name).batch_dice,
            ddp=self.place.size > 1,
        )

    def start(self, encoder_weights: Path | None) -> None:
        """Load the pretrained encoder, where one is given, and make optimiser and average."""
        if encoder_weights is not None:
            from cotrain.weights import read_weights

            self.network.load_encoder(read_weights(encoder_weights))
        if self.place.size > 1 and self.device.type == "cuda":
            # timm's, because its norms hold an activation, which torch's own would drop.
            self.network = convert_sync_batchnorm(self.network)
        self.network.to(self.device)
        if self.device.type == "cpu":
            arrange_for_cpu(self.network)
        training = self.stage.training
        learning = [each for each in self.network.parameters() if each.requires_grad]
        options = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
        if training.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(learning, fused=True, **options)
        else:
            self.optimizer = torch.optim.SGD(learning, momentum=0.99, nesterov=True, **options)
        # What masks are inferred from is kept by the process that writes.
        decay = self.stage.cotraining.ema_decay if self.place.rank == 0 else 0
        self.average = MovingAverage(self.network, decay=decay, use_warmup=True) if decay else None
        # Switched off, it passes everything through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.compiled: nn.Module = self.network
        # nnU-Net's own switch and default: compile on a GPU, not on a CPU.
        wanted = os.environ.get("nnUNet_compile", "true").lower()  # noqa: SIM112
        if self.device.type == "cuda" and wanted in ("true", "1", "t"):
            self.compiled = torch.compile(self.network)
        if self.place.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.compiled = DistributedDataParallel(self.compiled, device_ids=devices)

    @property
    def deployed(self) -> nn.Module:
        """The network that masks are inferred from: the moving average where there is one."""
        return self.average.module if self.average else self.network

    def save(self, path: Path) -> None:
        """Write everything a resumed or continued training needs; loads with weights_only=True."""
        content = {
            "network_name": self.network_name,
            "epoch": self.epoch,
            "network_weights": self.network.state_dict(),
            "average_weights": self.average.module.state_dict() if self.average else None,
            "optimizer_state": self.optimizer.state_dict(),
            "scaler_state": self.scaler.state_dict(),
            "curve": self.curve,
        }
        # Given a path, torch writes its last part into the file: the same weights, other bytes.
        with write_atomically(path) as temporary, open(temporary, "wb") as opened:
            torch.save(content, opened)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of `save`; `start` must have been called.

        Raises InputError where it is the other network's.
        """
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["network_name"] != self.network_name:
            raise InputError(
                f"{path} holds the {content['network_name']} network, wanted the "
                f"{self.network_name} network; give its own checkpoint."
            )
        self.network.load_state_dict(content["network_weights"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.average:
            self.average.module.load_state_dict(content["average_weights"])
        if content["scaler_state"]:
            self.scaler.load_state_dict(content["scaler_state"])
        self.epoch, self.curve = content["epoch"], content["curve"]

    def epochs(
        self,
        window: Window,
        round_: int,
        *,
        labelled: list[Case],
        unlabelled: list[Case],
        control: bool,
    ) -> Iterator[dict[str, float]]:
        """Train the epochs that are left of a window; yield the row of the curve after each.

        control: train on labelled cases alone, with the same rates. Raises InputError where
        pseudo-masks are wanted and none was accepted, or the loss or the network is not finite.
        """
        batch_size = self.planned.configuration(self.network_name).batch_size
        counts = np.array(
            [
                self.schedule.unlabelled_counts(window, epoch, batch_size)
                for epoch in range(self.epoch, window.stop)
            ]
        )
        if control:
            counts = counts * 0
        if counts.any() and not unlabelled:
            raise InputError(
                f"Round {round_:02d} of the {self.network_name} network wants pseudo-labelled "
                "samples, but the audit accepted no mask; look at the audit page, and accept masks "
                "or stop before this round."
            )
        source = BatchSource(
            self.planned,
            self.network_name,
            labelled=labelled,
            unlabelled=unlabelled,
            counts=counts,
            seed=self.stage.seed,
            first_epoch=self.epoch,
            mirroring=self.stage.training.mirroring,
            place=self.place,
        )
        # Of all epochs at once: the processes that make batches start once, and go on making them
        # while an epoch is ended and saved, so that a GPU does not wait for each epoch's first.
        pin = self.device.type == "cuda"
        alone = self.place.size == 1
        coming = batches(source, workers=self.workers, pin_memory=pin, forking=alone)
        for of_epoch in counts:
            own = itertools.islice(coming, len(of_epoch))
            yield self._train_epoch(window, round_, own, counts=of_epoch, control=control)

    def _train_epoch(
        self,
        window: Window,
        round_: int,
        batches_of_epoch: Iterator[dict[str, torch.Tensor]],
        *,
        counts: np.ndarray,
        control: bool,
    ) -> dict[str, float]:
        began = time.time()
        batch_size = self.planned.configuration(self.network_name).batch_size
        self.compiled.train()
        losses, rates, shares = [], [], []
        for iteration, batch in enumerate(batches_of_epoch):
            rate = self.schedule.learning_rate(window, self.epoch, iteration)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses.append(self._step(batch, iteration))
            rates.append(rate)
            shares.append(self.schedule.wanted_share(window, self.epoch, iteration, batch_size))
        loss = self._mean_loss(torch.stack(losses))
        if not (math.isfinite(loss) and all_finite(self.network)):
            raise InputError(
                f"The loss of epoch {self.epoch} is {loss}, or a weight is not finite; lower "
                f"training_{self.network_name}.learning_rate or set compute.precision to fp32, "
                "and look for broken images on the data report."
            )
        row = {
            "epoch": self.epoch,
            "round": round_,
            "loss": loss,
            "learning_rate": sum(rates) / len(rates),
            "share_wanted": 0.0 if control else sum(shares) / len(shares),
            "share_realised": float(counts.sum()) / (len(counts) * batch_size),
            "seconds": time.time() - began,
        }
        self.curve.append([row[name] for name in CURVE_COLUMNS])
        self.epoch += 1
        return row

    def _mean_loss(self, losses: torch.Tensor) -> float:
        """Return the mean over an epoch's steps, and over the processes that train together.

        In fp16 a step whose numbers overflow is left out: as in nnU-Net the scaler has skipped it.
        NaN where that were most.
        """
        counted = losses[losses.isfinite()] if self.scaler.is_enabled() else losses
        total = torch.stack([counted.sum(), torch.full_like(counted.sum(), len(counted))])
        if self.place.size > 1:
            distributed.all_reduce(total)
        return (
            float(total[0] / total[1])
            if 2 * total[1] >= len(losses) * self.place.size
            else math.nan
        )

    def _step(self, batch: dict[str, torch.Tensor], iteration: int) -> torch.Tensor:
        # Dropout and stochastic depth must not depend on how the batch was made.
        words = (self.stage.seed, 10 + STREAMS[self.network_name], self.epoch, iteration)
        seed_everything(*words, *([self.place.rank] if self.place.size > 1 else []))
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        # The scaler leaves out a step that overflows, but batch norm has seen its numbers.
        buffers = self.network.buffers() if self.scaler.is_enabled() else []
        statistics = [each for each in buffers if each.is_floating_point()]
        before = [each.clone() for each in statistics]
        with autocast(self.device, self.precision):
            logits = self.compiled(data)
        loss = self.loss(logits, target)
        learning = self.optimizer.param_groups[0]["params"]
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(learning, GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for now, kept in zip(statistics, before, strict=True):
            now.copy_(torch.where(now.isfinite(), now, kept))
        if self.average:
            # With the step, timm lets the average follow fast at first and forget the random start.
            steps = self.epoch * self.stage.training.iterations_per_epoch + iteration
            self.average.update(self.network, step=steps)
        return loss.detach()


class Latest:
    """The checkpoint that a training goes on from after a kill, `work/latest.pth`.

    Saved after each epoch; where that takes long (gigabytes, on a network file system), so seldom
    that it takes a twentieth of the time. saved_epoch: the next epoch of what the file holds, None
    where it is not there.
    """

    def __init__(self, trainer: Trainer, path: Path, *, saved_epoch: int | None) -> None:
        self._trainer, self._path, self._saved_epoch = trainer, path, saved_epoch
        self._seconds, self._saved = 0.0, time.monotonic()

    def save_when_due(self) -> None:
        """Save after an epoch, unless the last time was too short ago for how long it took."""
        since = time.monotonic() - self._saved
        if self._seconds < QUICK_SAVE_SECONDS or since * SHARE_FOR_SAVING > self._seconds:
            self.save()

    def save(self) -> None:
        """Save what was trained since."""
        if self._saved_epoch == self._trainer.epoch:
            return
        began = time.monotonic()
        self._trainer.save(self._path)
        self._saved_epoch, self._saved = self._trainer.epoch, time.monotonic()
        self._seconds = self._saved - began


def all_finite(network: nn.Module) -> bool:
    """Return whether a network holds neither NaN nor infinity, in its statistics neither."""
    tensors = [each for each in _tensors(network) if each.is_floating_point()]
    return bool(torch.stack([each.isfinite().all() for each in tensors]).all())


def _started(
    arguments: argparse.Namespace,
    stage: TrainStage,
    planned: Planned,
    place: Place,
    workers: int,
    start_from: Path | None,
) -> Trainer:
    """Return a trainer with pretrained weights, or with those of a checkpoint to go on from."""
    trainer = Trainer(planned, arguments.network, stage, workers, place=place)
    trainer.start(arguments.encoder_weights if arguments.previous is None else None)
    if start_from is not None:
        trainer.load(start_from)
    return trainer


def _help(
    place: Place,
    arguments: argparse.Namespace,
    stage: TrainStage,
    workers: int,
    start_from: Path | None,
    cases: tuple[list[Case], list[Case]],
) -> None:
    """Train the same epochs as the step itself, in another process, and write nothing."""
    _share_threads(arguments.threads, place.size)
    planned = Planned.read(arguments.preprocessed)
    with telling_what_takes_less(arguments.network):
        trainer = _started(arguments, stage, planned, place, workers, start_from)
        for _ in _epochs(trainer, arguments, cases):
            pass


def _share_threads(threads: int, processes: int) -> None:
    torch.set_num_threads(max(1, threads // processes))


def _epochs(
    trainer: Trainer, arguments: argparse.Namespace, cases: tuple[list[Case], list[Case]]
) -> Iterator[dict[str, float]]:
    labelled, unlabelled = cases
    return trainer.epochs(
        trainer.schedule.window(arguments.round),
        arguments.round,
        labelled=labelled,
        unlabelled=unlabelled,
        control=arguments.audit is None,
    )


def cases_to_learn_from(arguments: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """Return the labelled cases, and the unlabelled ones that the audit accepts."""
    labelled = labelled_cases(arguments.labelled, arguments.preprocessed)
    if arguments.audit is None:
        return labelled, []
    return labelled, accepted_cases(arguments.audit, arguments.preprocessed)


def labelled_cases(table: Path, preprocessed: Path) -> list[Case]:
    """Return the cases of a table of labelled ones, in its order."""
    return [
        Case(name, arrays_of(preprocessed / "labelled", name)) for name in read_table(table)["case"]
    ]


def accepted_cases(audit: Path, preprocessed: Path) -> list[Case]:
    """Return the unlabelled cases an audit table accepts, each with its soft mask.

    Raises InputError where a soft mask is not the audited one any more.
    """
    cases = []
    for row in accepted_in(audit).to_dict("records"):
        if not Path(row["soft"]).is_file() or sha256_of(row["soft"]) != row["soft_sha256"]:
            raise InputError(
                f"{row['soft']} is missing or not the file that was audited; run the audit again "
                "(to correct a mask, register a new file in review.tsv, see results/README.md)."
            )
        cases.append(
            Case(row["case"], arrays_of(preprocessed / "unlabelled", row["case"]), row["soft"])
        )
    return cases


def splits_shown(arguments: argparse.Namespace) -> list[str]:
    """Return the splits that a training is shown cases of.

    Arrays of unlabelled cases that it is not shown may still be made while it trains.
    """
    return ["labelled", *(["unlabelled"] if arguments.audit else [])]


def inputs_of(arguments: argparse.Namespace) -> list[Path]:
    """Return all files that a training reads or that tell of the arrays it reads."""
    given = (
        arguments.settings,
        arguments.preprocessed / "plans.json",
        arguments.labelled,
        arguments.audit,
        arguments.previous,
        arguments.encoder_weights,
    )
    manifests = [
        path
        for split in splits_shown(arguments)
        for path in manifests_of(arguments.preprocessed / split)
    ]
    return [*(path for path in given if path is not None), *manifests]


def unread_by(arguments: argparse.Namespace, stage: TrainStage) -> dict[str, set[str]]:
    """Return the settings, by section, that a training's epochs do not depend on.

    So that other rounds can be asked for without losing the epochs on labels alone, which may be
    most of all.
    """
    schedule = Schedule(arguments.network, stage.training, stage.cotraining, stage.last_round)
    if schedule.window(arguments.round).phase == "labels":
        cotraining = set(Cotraining.model_fields) - {"ema_decay"}
        return {"training": {"epochs_per_round"}, "cotraining": cotraining}
    return {"cotraining": {"teacher", "sampling"}} if arguments.audit is None else {}


def learnt_by(arguments: argparse.Namespace, stage: TrainStage) -> dict[str, str]:
    """Return hashes of all that a training learns from: a change discards its finished epochs.

    Not of where the data lie, who judged a mask, or how many jobs preprocessed the cases: what only
    tells of the same things in another way must not train again.
    """
    learnt = {"settings": learnt_of(stage, unread=unread_by(arguments, stage))}
    for name in ("previous", "encoder_weights"):
        if (path := getattr(arguments, name)) is not None:
            learnt[name] = sha256_of(path)
    learnt["plans"] = sha256_of(arguments.preprocessed / "plans.json")
    # Their order decides which is drawn.
    cases = "\n".join(read_table(arguments.labelled)["case"])
    learnt["labelled"] = hashlib.sha256(cases.encode()).hexdigest()
    for split in splits_shown(arguments):
        arrays = arrays_in(arguments.preprocessed / split)
        if split == "unlabelled":
            # A case whose mask is refused teaches nothing, and may leave the case table.
            arrays = arrays[arrays["case"].isin(accepted_in(arguments.audit)["case"])]
        told = arrays.to_csv(sep="\t", index=False)
        learnt[f"arrays of {split}"] = hashlib.sha256(told.encode()).hexdigest()
    if arguments.audit is not None:
        learnt["masks"] = learnt_from(arguments.audit)
    return learnt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain train`."""
    parser.add_argument("--network", choices=["2d", "3d"], required=True)
    parser.add_argument(
        "--arm",
        choices=["cotrain", "labels_only"],
        required=True,
        help="arm of the experiment that this training belongs to",
    )
    parser.add_argument("--round", type=int, required=True, help="number of the round, from 0")
    parser.add_argument("--settings", type=Path, required=True, help="settings of this stage")
    parser.add_argument("--preprocessed", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--labelled", type=Path, required=True, help="table of labelled cases")
    parser.add_argument(
        "--audit",
        type=Path,
        help="audit table of the masks that teach; without it the network learns from labels "
        "alone, in the same steps and at the same rates",
    )
    parser.add_argument("--previous", type=Path, help="checkpoint of the round before")
    parser.add_argument("--encoder-weights", type=Path, help="pretrained weights of the encoder")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain train`."""
    stage = load(arguments.settings, model=TrainStage)
    _share_threads(arguments.threads, stage.compute.gpus_per_training)
    planned = Planned.read(arguments.preprocessed)
    devices = devices_of(stage.compute, count=stage.compute.gpus_per_training)
    # Processes that make batches beside this one; on a CPU they would take its cores.
    threads = arguments.threads // stage.compute.gpus_per_training
    workers = max(1, threads - 1) if devices[0].type == "cuda" else 0
    identity = {
        "arm": arguments.arm,
        "round": arguments.round,
        # Another number format would go on with other bits, without a word.
        "device": devices[0].type,
        "precision": precision_of(stage.compute, devices[0], training=True),
        "inputs": learnt_by(arguments, stage),
    }
    with WorkFolder(arguments.out_dir / "work", identity) as work:
        checkpoint = arguments.out_dir / "checkpoint.pth"
        if work.resumable and checkpoint.is_file():
            # By another job, for which this one waited: a newer file would rerun what follows.
            print(f"{checkpoint} is finished already; it stays as it is.", flush=True)
            return
        with telling_what_takes_less(arguments.network):
            _train_round(arguments, stage, planned, work, devices, workers=workers)


def _train_round(
    arguments: argparse.Namespace,
    stage: TrainStage,
    planned: Planned,
    work: WorkFolder,
    devices: list[torch.device],
    *,
    workers: int,
) -> None:
    cases = labelled, unlabelled = cases_to_learn_from(arguments)
    batch_size = planned.configuration(arguments.network).batch_size
    least = stage.cotraining.sampling.min_labelled_per_batch
    if unlabelled and least >= batch_size:
        raise InputError(
            f"cotraining.sampling.min_labelled_per_batch is {least} and the {arguments.network} "
            f"network's batch size {batch_size}, so that no pseudo-mask would ever be learnt; "
            "lower the one (0 allows batches without a labelled sample) or raise the other."
        )
    latest, provenance = (work.folder / name for name in ("latest.pth", "provenance.json"))
    events = arguments.out_dir / "tensorboard"
    for half_saved in work.folder.glob(f".writing-*{latest.name}"):
        half_saved.unlink()
    resuming = work.resumable and latest.is_file()
    if not resuming:
        for left_over in (latest, provenance, arguments.out_dir / "checkpoint.pth"):
            left_over.unlink(missing_ok=True)
        shutil.rmtree(events, ignore_errors=True)
    start_from = latest if resuming else arguments.previous
    with team(devices, _help, arguments, stage, workers, start_from, cases) as place:
        trainer = _started(arguments, stage, planned, place, workers, start_from)
        window = trainer.schedule.window(arguments.round)
        if trainer.epoch != window.start and not resuming:
            raise InputError(
                f"Round {arguments.round} of the {arguments.network} network starts at epoch "
                f"{window.start}, but --previous {arguments.previous} ends at {trainer.epoch}; "
                "give the checkpoint of the round before."
            )
        total = window.stop - window.start
        work.claim(done=trainer.epoch - window.start, total=total)
        kept = Latest(trainer, latest, saved_epoch=trainer.epoch if resuming else None)
        parameters = sum(each.numel() for each in trainer.network.parameters())
        together = f" and {place.size - 1} more together" if place.size > 1 else ""
        print(
            f"{arguments.network} network, {parameters / 1e6:.2f} M parameters, {arguments.arm}, "
            f"round {arguments.round:02d}, epochs {window.start}-{window.stop - 1}, "
            f"{len(labelled)} labelled and {len(unlabelled)} pseudo-labelled cases, "
            f"{trainer.device}{together}, {trainer.precision}, {arguments.threads} threads.",
            flush=True,
        )
        from torch.utils.tensorboard import SummaryWriter

        had_all = trainer.epoch == window.stop
        if had_all:
            print(f"Nothing is left to train: {latest} has all epochs of this round.", flush=True)
        if resuming:
            # Snakemake has removed the log of the process before.
            for values in trainer.curve[window.start :]:
                row = dict(zip(CURVE_COLUMNS, values, strict=True))
                print(_line_of(row, done=row["epoch"] + 1 - window.start, total=total))
            print(f"Resuming after epoch {trainer.epoch - 1} from {latest}.", flush=True)
        with SummaryWriter(str(events), purge_step=trainer.epoch) as board:
            for row in _epochs(trainer, arguments, cases):
                work.insist()
                kept.save_when_due()
                for name in CURVE_COLUMNS[2:]:
                    board.add_scalar(f"{arguments.network}/{name}", row[name], row["epoch"])
                done = trainer.epoch - window.start
                print(_line_of(row, done=done, total=total), end="", flush=True)
                left = work.report(done, total, "epochs", before_leaving=kept.save)
                print(f"  {_duration(left)} left", flush=True)
    curve = pd.DataFrame(trainer.curve, columns=list(CURVE_COLUMNS))
    write_table(curve, arguments.out_dir / "curve.csv")
    keep_provenance(
        provenance,
        arguments.out_dir / "provenance.json",
        is_repeat=had_all,
        settings=stage,
        seed=stage.seed,
        inputs=inputs_of(arguments),
        cpu_seconds_before=work.cpu_seconds_before,
        network=arguments.network,
        arm=arguments.arm,
        round=arguments.round,
        device=str(trainer.device),
        precision=trainer.precision,
        threads=arguments.threads,
        labelled=[case.name for case in labelled],
        pseudo_labelled=[c.name for c in unlabelled],
        parameters=parameters,
        weights_hash=weights_hash(trainer.deployed),
    )
    # The declared output comes last: when it is there, the round is whole. The same bytes stay in
    # the working folder: should Snakemake die now and delete the output, the rerun takes seconds.
    work.insist()
    kept.save()
    with write_atomically(arguments.out_dir / "checkpoint.pth") as temporary:
        try:
            os.link(latest, temporary)
        except OSError:
            # Some network file systems have no hard links; then the bytes are there twice.
            shutil.copyfile(latest, temporary)


def weights_hash(network: nn.Module) -> str:
    """Return the SHA-256 over a network's tensors in order: equal hashes, equal bits."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _line_of(row: dict[str, float], *, done: int, total: int) -> str:
    return (
        f"epoch {row['epoch']:.0f} ({done:.0f}/{total})  loss {row['loss']:.4f}  "
        f"rate {row['learning_rate']:.2e}  unlabelled share {row['share_realised']:.3f} "
        f"(wanted {row['share_wanted']:.3f})  {row['seconds']:.1f} s"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
