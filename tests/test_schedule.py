"""Rates, rounds and unlabelled shares, by hand."""

import numpy as np
import pytest

from cotrain.schedule import Schedule
from cotrain.settings import Cotraining, Training

TRAINING = Training(learning_rate=1.0, iterations_per_epoch=10, warmup_epochs=4, epochs_per_round=2)
ROUNDS = {"schedule_rounds": 3, "first_teacher": "2d"}
LABELLED = {"min_labelled_per_batch": 1}


def schedule(network="2d", training=TRAINING, **cotraining):
    return Schedule(network, training, Cotraining(**{**ROUNDS, **cotraining}))


def test_rounds_follow_each_other_without_a_gap():
    windows = [schedule("2d").window(r) for r in range(4)]
    assert [(w.start, w.stop) for w in windows] == [(0, 4), (4, 6), (6, 8), (8, 10)]


def test_3d_has_no_phase_on_labels_when_2d_teaches_first():
    first = schedule("3d", first_teacher="2d").window(0)
    assert (first.start, first.stop, first.phase) == (0, 2, "cotraining")
    warm = schedule("3d", first_teacher="both_labels_only").window(0)
    assert (warm.start, warm.stop, warm.phase) == (0, 4, "labels")


def test_the_rate_rises_then_anneals_to_zero_and_restarts_at_the_asked_height():
    plan = schedule("2d", learning_rate_restart=0.5)
    labels, taught = plan.window(0), plan.window(1)
    assert 0 < plan.learning_rate(labels, 0, 0) < plan.learning_rate(labels, 0, 2)
    assert plan.learning_rate(labels, 0, 2) == pytest.approx(1.0)
    assert plan.learning_rate(labels, 3, 9) < 0.01
    assert plan.learning_rate(taught, 4, 0) == 0.5
    # Half of the co-training phase of 2 x 2 epochs: cos(pi / 2) = 0, so half the height.
    assert plan.learning_rate(plan.window(2), 6, 0) == pytest.approx(0.25)


def test_a_round_beyond_the_schedule_repeats_the_last_scheduled_stretch():
    plan = schedule("2d")
    assert plan.learning_rate(plan.window(3), 8, 3) == plan.learning_rate(plan.window(2), 6, 3)


def test_a_last_training_follows_the_rounds_and_restarts_rate_and_share():
    cotraining = Cotraining(
        **ROUNDS,
        learning_rate_restart=0.5,
        last_epochs=6,
        sampling={"mode": "ramp", "share_start": 0.2, "share_end": 0.6},
    )
    plan = Schedule("3d", TRAINING, cotraining, last_round=3)
    last = plan.window(3)
    assert (last.start, last.stop) == (plan.window(2).stop, plan.window(2).stop + 6) == (6, 12)
    assert plan.learning_rate(last, 6, 0) == 0.5
    assert plan.learning_rate(last, 9, 0) == pytest.approx(0.25)
    assert plan.learning_rate(last, 11, 9) < 0.01
    assert plan.wanted_share(last, 6, 0, batch_size=8) == pytest.approx(0.2)
    assert plan.wanted_share(last, 9, 0, batch_size=8) == pytest.approx(0.4)
    # 60 batches of 8 with a mean share of 0.4 - the step to the next of 0.4 / 60 / 2.
    assert plan.unlabelled_counts(last, 6, 8).sum() < plan.unlabelled_counts(last, 11, 8).sum()
    total = sum(plan.unlabelled_counts(last, epoch, 8).sum() for epoch in range(6, 12))
    assert abs(total - 60 * 8 * (0.4 - 0.4 / 120)) <= 1


def test_share_is_one_minus_relative_rate_up_to_the_cap():
    plan = schedule("2d", learning_rate_restart=1.0, sampling=LABELLED | {"mode": "learning_rate"})
    assert plan.wanted_share(plan.window(1), 4, 0, batch_size=4) == 0
    assert plan.wanted_share(plan.window(2), 6, 0, batch_size=4) == pytest.approx(0.5)
    assert plan.wanted_share(plan.window(2), 7, 9, batch_size=4) == 0.75


def test_reference_share_climbs_in_fifths():
    plan = schedule("2d", sampling={"mode": "reference"})
    shares = [
        plan.wanted_share(plan.window(1 + (e >= 6)), e, i, batch_size=5)
        for e in range(4, 8)
        for i in range(10)
    ]
    assert shares == [0.0] * 8 + [0.2] * 8 + [0.4] * 8 + [0.6] * 8 + [0.8] * 8


def test_a_ramp_goes_straight_from_start_to_end():
    plan = schedule(
        "3d",
        sampling={
            "mode": "ramp",
            "share_start": 0.25,
            "share_end": 0.75,
            "min_labelled_per_batch": 0,
        },
    )
    assert plan.wanted_share(plan.window(0), 0, 0, batch_size=2) == 0.25
    assert plan.wanted_share(plan.window(1), 3, 0, batch_size=2) == pytest.approx(0.5)


def test_fractional_shares_are_exact_over_time_at_batch_size_two():
    plan = schedule("3d", sampling={"mode": "ramp", "share_start": 0.3, "share_end": 0.3})
    counts = np.concatenate([plan.unlabelled_counts(plan.window(e // 2), e, 2) for e in range(4)])
    # 0.6 unlabelled samples a batch: running totals 0, 1, 1, 2, 3 repeat every five batches.
    assert counts.tolist() == [0, 1, 0, 1, 1] * 8
    assert counts.sum() == 24


@pytest.mark.parametrize(("least", "unlabelled"), [(LABELLED, 1), ({}, 2)])
def test_a_batch_holds_as_many_labelled_samples_as_asked_for(least, unlabelled):
    plan = schedule("3d", sampling=least | {"share_start": 1.0, "share_end": 1.0})
    for epoch in range(2):
        assert plan.unlabelled_counts(plan.window(0), epoch, 2).max() == unlabelled


def test_round_00_on_labels_draws_no_unlabelled_sample():
    plan = schedule("2d")
    assert plan.unlabelled_counts(plan.window(0), 2, 16).sum() == 0
