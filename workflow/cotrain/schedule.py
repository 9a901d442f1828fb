"""The one training cut into rounds: in, settings and an iteration; out, rate and unlabelled share.

A network's epochs form up to two phases. On **labels** alone the rate rises linearly, then anneals
to 0. In **co-training** it starts again and anneals to 0 over all the scheduled rounds. The
control trains through the same epochs with the same rates, and sees labels only.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cotrain.settings import Cotraining, Network, Sampling, Training

RISE = 0.05
"""Share of a network's first phase over which the rate rises linearly."""
REFERENCE_STEPS = 5
"""Batch size of the released code, whose unlabelled share climbs in fifths."""


@dataclass(frozen=True)
class Window:
    """The epochs [start, stop) that one round trains, counted over the whole training.

    phase: `labels` or `cotraining`; phase_start: first epoch of the phase; phase_epochs: epochs
    over which the phase's rate anneals to 0.
    """

    start: int
    stop: int
    phase: str
    phase_start: int
    phase_epochs: int


@dataclass(frozen=True)
class Schedule:
    """Rates and shares of one network's whole training."""

    network: Network
    training: Training
    cotraining: Cotraining
    last_round: int | None = None

    @property
    def starts_on_labels(self) -> bool:
        """Whether round 00 of this network has no teacher."""
        return self.network == "2d" or self.cotraining.first_teacher == "both_labels_only"

    @property
    def label_epochs(self) -> int:
        """Epochs of the phase on labels alone."""
        return self.training.warmup_epochs if self.starts_on_labels else 0

    def window(self, round_: int) -> Window:
        """Return the epochs of round `round_`."""
        if round_ == self.last_round:
            start, epochs = self.window(round_ - 1).stop, self.cotraining.last_epochs
            return Window(start, start + epochs, "cotraining", start, epochs)
        if self.starts_on_labels and round_ == 0:
            return Window(0, self.label_epochs, "labels", 0, self.label_epochs)
        taught_before = round_ - 1 if self.starts_on_labels else round_
        rounds = self.cotraining.schedule_rounds - (1 if self.starts_on_labels else 0)
        epochs = self.training.epochs_per_round
        start = self.label_epochs + taught_before * epochs
        return Window(start, start + epochs, "cotraining", self.label_epochs, rounds * epochs)

    def progress(self, window: Window, epoch: int, iteration: int) -> float:
        """Return how far the phase is at an iteration, in [0, 1).

        Past the scheduled rounds the last round's stretch of the phase is repeated.
        """
        done = epoch - window.phase_start
        if done >= window.phase_epochs:
            length = self.training.epochs_per_round
            done = window.phase_epochs - length + (done - window.phase_epochs) % length
        done += iteration / self.training.iterations_per_epoch
        return done / window.phase_epochs

    def _is_first_phase(self, window: Window) -> bool:
        return window.phase_start == 0

    def highest_rate(self, window: Window) -> float:
        """Return the height that the rate of a phase anneals from."""
        if self._is_first_phase(window):
            return self.training.learning_rate
        return self.training.learning_rate * self.cotraining.learning_rate_restart

    def learning_rate(self, window: Window, epoch: int, iteration: int) -> float:
        """Return the rate of an iteration.

        Linear rise over the first 5 % of the network's first phase, half a cosine to 0 after it
        (Loshchilov & Hutter 2017, SGDR, eq. 5, one cycle a phase).
        """
        progress = self.progress(window, epoch, iteration)
        highest = self.highest_rate(window)
        if not self._is_first_phase(window):
            return highest * _half_cosine(progress)
        if progress < RISE:
            steps = self.training.iterations_per_epoch * window.phase_epochs * RISE
            return highest * (progress / RISE + 1 / max(steps, 1)) / (1 + 1 / max(steps, 1))
        return highest * _half_cosine((progress - RISE) / (1 - RISE))

    def wanted_share(self, window: Window, epoch: int, iteration: int, batch_size: int) -> float:
        """Return the unlabelled share that sampling asks for at an iteration, after the cap.

        `learning_rate`: 1 - rate / highest rate of the phase; 0 while it still rises.
        `reference`: the released code's floor((epoch - T) / (E - T) * 5) / 5, with the
        phase as [T, E).
        """
        if window.phase == "labels":
            return 0.0
        sampling: Sampling = self.cotraining.sampling
        progress = self.progress(window, epoch, iteration)
        if sampling.mode == "learning_rate":
            rising = self._is_first_phase(window) and progress < RISE
            rate = self.learning_rate(window, epoch, iteration)
            share = 0.0 if rising else 1 - rate / self.highest_rate(window)
        elif sampling.mode == "reference":
            share = math.floor(progress * REFERENCE_STEPS) / REFERENCE_STEPS
        else:
            share = sampling.share_start + (sampling.share_end - sampling.share_start) * progress
        return min(share, max(0.0, 1 - sampling.min_labelled_per_batch / batch_size))

    def unlabelled_counts(self, window: Window, epoch: int, batch_size: int) -> np.ndarray:
        """Return `(iterations,)` int: unlabelled samples in each batch of an epoch.

        Error diffusion: batch i holds floor(S_i) - floor(S_(i-1)) of them, where S_i is the sum of
        wanted shares x batch size since the phase began. So the realised share is exact over time
        to within one sample, even when a batch is two patches, and depends on nothing but the
        epoch: a resumed epoch draws the same batches.
        """
        iterations = self.training.iterations_per_epoch
        first = (epoch - window.phase_start) * iterations
        return _counts_of_phase(self, window, batch_size)[first : first + iterations]


@lru_cache(maxsize=2)
def _counts_of_phase(schedule: Schedule, window: Window, batch_size: int) -> np.ndarray:
    """Return the unlabelled samples of each batch from the phase's start to the window's end."""
    wanted = np.array(
        [
            schedule.wanted_share(window, epoch, iteration, batch_size)
            for epoch in range(window.phase_start, window.stop)
            for iteration in range(schedule.training.iterations_per_epoch)
        ]
    )
    # Rounded, because a sum of thirds must not fall short of a whole number.
    total = np.floor(np.round(np.cumsum(wanted * batch_size), 6)).astype(int)
    return np.diff(total, prepend=0)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
