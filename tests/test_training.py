"""A training step by step: what it depends on, and numbers that overflow."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from cotrain.batches import Case
from cotrain.errors import InputError
from cotrain.nnunet import Planned, arrays_of
from cotrain.settings import Settings, TrainStage, as_yaml, load
from cotrain.training import Latest, Trainer, inputs_of, learnt_by


@pytest.fixture
def trainer_in(tiny, monkeypatch):
    """Return a function that makes a new trainer of the tiny experiment, in a number format.

    fp16, too, which the settings give to GPUs alone.
    """

    def make(network: str, precision: str) -> Trainer:
        monkeypatch.setattr("cotrain.training.precision_of", lambda *_, training: precision)
        stage = tiny.settings.stages()[f"train_{network}"]
        trainer = Trainer(Planned.read(tiny.preprocessed), network, stage)
        trainer.start(None)
        return trainer

    return make


@pytest.fixture
def train_epoch(tiny):
    """Return a function that trains an epoch on the labelled cases, some steps of which overflow.

    As where a number is too large for fp16, already in front of the first normalisation.
    """
    labelled = [
        Case(row["case"], arrays_of(tiny.preprocessed / "labelled", row["case"]))
        for row in tiny.rows("labelled")
    ]

    def train(trainer: Trainer, overflowing: set[int]) -> dict[str, float]:
        compiled, steps = trainer.compiled, []

        def forward(data: torch.Tensor) -> list[torch.Tensor] | torch.Tensor:
            steps.append(len(steps))
            return compiled(data * math.inf if steps[-1] in overflowing else data)

        forward.train = compiled.train
        trainer.compiled = forward
        window = trainer.schedule.window(0)
        return next(trainer.epochs(window, 0, labelled=labelled, unlabelled=[], control=True))

    return train


@pytest.mark.parametrize("network", ["2d", "3d"])
def test_a_step_that_overflows_in_fp16_is_skipped_as_in_nnunet(network, trainer_in, train_epoch):
    trainer = trainer_in(network, "fp16")
    scale = trainer.scaler.get_scale()
    row = train_epoch(trainer, {1})
    assert math.isfinite(row["loss"])
    assert trainer.scaler.get_scale() < scale
    for tensor in trainer.network.state_dict().values():
        assert torch.isfinite(tensor).all()


def test_a_training_that_mostly_overflows_stops(trainer_in, train_epoch):
    trainer = trainer_in("2d", "fp16")
    count = trainer.stage.training.iterations_per_epoch
    with pytest.raises(
        InputError, match=r"The loss of epoch 0 is nan, or .*; lower .*learning_rate"
    ):
        train_epoch(trainer, set(range(count // 2 + 1)))


def test_any_step_that_is_not_finite_stops_a_training_in_fp32(trainer_in, train_epoch):
    with pytest.raises(InputError, match="The loss of epoch 0 is nan"):
        train_epoch(trainer_in("2d", "fp32"), {1})


def test_a_training_that_wants_pseudo_masks_and_has_none_stops_before_its_first_step(trainer_in):
    trainer = trainer_in("2d", "fp32")
    window = trainer.schedule.window(1)
    trainer.epoch = window.start
    with pytest.raises(InputError, match=r"Round 01 of the 2d network wants .* accepted no mask"):
        next(trainer.epochs(window, 1, labelled=[], unlabelled=[], control=False))
    assert trainer.epoch == window.start


def test_a_network_that_is_not_finite_is_never_saved(trainer_in, train_epoch):
    trainer = trainer_in("2d", "fp16")
    statistics = next(name for name, _ in trainer.network.named_buffers() if "running" in name)
    with torch.no_grad():
        trainer.network.get_buffer(statistics).fill_(math.nan)
    with pytest.raises(InputError, match="a weight is not finite"):
        train_epoch(trainer, set())


def test_a_slow_checkpoint_is_saved_for_a_twentieth_of_the_time(monkeypatch, tmp_path):
    clock, seconds, saved = 0.0, 0.0, []

    class Training:
        epoch = 0

        def save(self, path):
            nonlocal clock
            clock += seconds
            saved.append(self.epoch)

    def train(epochs: int) -> None:
        nonlocal clock
        for _ in range(epochs):
            training.epoch += 1
            clock += 40
            kept.save_when_due()

    monkeypatch.setattr("cotrain.training.time.monotonic", lambda: clock)
    training = Training()
    kept = Latest(training, tmp_path / "latest.pth", saved_epoch=0)
    seconds = 0.5
    train(3)
    assert saved == [1, 2, 3]
    # 10 s each: not again before 200 s of training.
    seconds = 10
    train(12)
    assert saved == [1, 2, 3, 4, 10]
    # At the round's end, or a time limit; and nothing twice.
    for _ in range(2):
        kept.save()
    assert saved == [1, 2, 3, 4, 10, 15]


def test_the_same_training_is_saved_to_the_same_bytes_under_any_name(trainer_in, tmp_path):
    # Or a finished training that is started again would train all that follows anew.
    trainer = trainer_in("2d", "fp32")
    for name in ("one.pth", "other.pth"):
        trainer.save(tmp_path / name)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "other.pth").read_bytes()


MANIFEST = "case\tshape\torigin\n"


@pytest.fixture
def told(tmp_path) -> Namespace:
    """Return the arguments of a training, with all that tells what it learns from."""
    settings = Settings(experiment="x", cases="cases.tsv", labels={"organ": 1})
    (tmp_path / "s.yaml").write_text(as_yaml(settings.train_stage("2d")))
    (tmp_path / "plans.json").write_text("{}")
    (tmp_path / "labelled.tsv").write_text("case\timage\nb\t/old/b.nii.gz\na\t/old/a.nii.gz\n")
    for split in ("labelled", "unlabelled"):
        (tmp_path / split).mkdir()
        rows = "a\t4x4x4\t111\nb\t4x4x4\t222\nc\t4x4x4\t333\n"
        (tmp_path / split / "manifest-0.tsv").write_text(MANIFEST + rows)
    (tmp_path / "audit.tsv").write_text("case\tsoft_sha256\taccepted\treason\nc\t444\ttrue\t\n")
    return Namespace(
        network="2d",
        round=1,
        settings=tmp_path / "s.yaml",
        preprocessed=tmp_path,
        labelled=tmp_path / "labelled.tsv",
        audit=tmp_path / "audit.tsv",
        previous=None,
        encoder_weights=None,
    )


def change(path: Path, old: str, new: str) -> None:
    """Put `new` in place of `old`, which must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def learnt(told: Namespace) -> dict[str, str]:
    return learnt_by(told, load(told.settings, model=TrainStage))


def test_data_that_moved_or_were_shared_out_in_another_way_train_nothing_again(told, tmp_path):
    before = learnt(told)
    told.labelled.write_text("case\timage\nb\t/new/b.nii.gz\na\t/new/a.nii.gz\n")
    (tmp_path / "labelled/manifest-0.tsv").write_text(f"{MANIFEST}a\t4x4x4\t111\nc\t4x4x4\t333\n")
    (tmp_path / "labelled/manifest-1.tsv").write_text(f"{MANIFEST}b\t4x4x4\t222\n")
    told.audit.write_text("case\tsoft_sha256\taccepted\treason\nc\t444\ttrue\taccept by ab\n")
    # Work is told apart by the device and the number format that `auto` found.
    change(told.settings, "device: auto", "device: cuda")
    change(told.settings, "precision: auto", "precision: fp32")
    assert learnt(told) == before


def test_an_unlabelled_case_whose_mask_was_refused_may_leave_without_a_training(told, tmp_path):
    told.audit.write_text(
        "case\tsoft_sha256\taccepted\treason\na\t666\tfalse\tby ab\nc\t444\ttrue\t\n"
    )
    before = learnt(told)
    change(tmp_path / "unlabelled/manifest-0.tsv", "a\t4x4x4\t111\n", "")
    told.audit.write_text("case\tsoft_sha256\taccepted\treason\nc\t444\ttrue\t\n")
    assert learnt(told) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("s.yaml", "seed: 0", "seed: 1"),
        ("s.yaml", "gpus_per_training: 1", "gpus_per_training: 2"),
        ("plans.json", "{}", "[]"),
        (
            "labelled.tsv",
            "b\t/old/b.nii.gz\na\t/old/a.nii.gz",
            "a\t/old/a.nii.gz\nb\t/old/b.nii.gz",
        ),
        ("labelled/manifest-0.tsv", "222", "555"),
        ("unlabelled/manifest-0.tsv", "333", "555"),
        ("audit.tsv", "444", "555"),
    ],
)
def test_other_settings_cases_arrays_or_masks_train_again(told, tmp_path, file, old, new):
    before = learnt(told)
    change(tmp_path / file, old, new)
    assert learnt(told) != before


@pytest.mark.parametrize(
    ("read_by", "old", "new"),
    [
        ("taught control", "epochs_per_round: 50", "epochs_per_round: 30"),
        ("taught", "teacher: mean", "teacher: other"),
        ("taught control", "learning_rate_restart: 0.5", "learning_rate_restart: 1.0"),
        ("taught control labels", "ema_decay: 0.99", "ema_decay: 0.9"),
        ("taught control labels", "warmup_epochs: 100", "warmup_epochs: 80"),
    ],
)
@pytest.mark.parametrize("training", ["taught", "control", "labels"])
def test_a_training_is_kept_where_a_setting_changed_that_it_does_not_read(
    told, read_by, old, new, training
):
    # All of round 01 but the phase on labels alone, which is round 00 of 2D.
    told.round = 0 if training == "labels" else 1
    told.audit = told.audit if training == "taught" else None
    before = learnt(told)
    change(told.settings, old, new)
    assert (learnt(told) != before) == (training in read_by.split())


def test_a_training_that_nobody_teaches_does_not_depend_on_unlabelled_cases(told, tmp_path):
    # They may still be preprocessed while it trains; a new manifest must not cost its epochs.
    told.audit = None
    before = learnt(told)
    (tmp_path / "unlabelled/manifest-0.tsv").unlink()
    assert learnt(told) == before
    assert None not in inputs_of(told)
