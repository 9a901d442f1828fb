"""One contract for every network that trains: resumed to the last bit, inferred, exported.

A new network is an entry in ENCODERS here or in OTHER_NETWORKS_3D of conftest.py, and its name in
NETWORKS.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from medpy.metric.binary import dc

from cotrain.__main__ import main
from cotrain.files import read_table, sha256_of

NETWORKS = [
    "2d full",
    "2d lora",
    "2d frozen",
    "2d pyramid",
    "2d dinov3",
    "2d two_channels",
    "3d plain",
    "3d resenc",
    "3d segresnet",
    "3d swinunetr",
    "3d plain_unet",
    "3d two_channels",
]
ENCODERS = {
    "full": {"adaptation": "full"},
    "lora": {"adaptation": "lora"},
    "frozen": {"adaptation": "frozen"},
    "pyramid": {"encoder": "pvt_v2_b0", "adaptation": "lora", "adjacent_slices": 1},
    "dinov3": {"encoder": "vit_small_patch16_dinov3", "decoder": "DPT", "adaptation": "lora"},
}
STOCK_PREDICTION = """
import sys
sys.modules["cotrain"] = None  # as on a machine that has never heard of it: importing it fails
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
predict_entry_point()
"""


@pytest.fixture(scope="module", params=NETWORKS)
def network_and_experiment(request, tiny, tiny_two_channels, tiny_with, tiny_with_2d):
    """Return `2d` or `3d` and the experiment whose plans hold the network."""
    network, kind = request.param.split()
    if kind == "two_channels":
        return network, tiny_two_channels
    if network == "3d":
        return network, tiny if kind == "plain" else tiny_with(kind)
    return network, tiny_with_2d(**ENCODERS[kind])


@pytest.fixture(scope="module")
def two_rounds(network_and_experiment, train, audit_table, tmp_path_factory):
    """Return the trainings of two rounds; pseudo-masks teach wherever the method has them."""
    network, experiment = network_and_experiment
    folder = tmp_path_factory.mktemp("rounds")
    teacher = ("--arm", "cotrain", "--audit", audit_table)
    first = train(
        experiment,
        network,
        folder / "round-00",
        *("--arm", "cotrain", "--round", 0),
        *(() if network == "2d" else ("--audit", audit_table)),
    )
    second = train(
        experiment,
        network,
        folder / "round-01",
        *(*teacher, "--round", 1, "--previous", first.checkpoint),
    )
    return first, second


def provenance(folder: Path) -> dict:
    return json.loads((folder / "provenance.json").read_text())


def test_weights_change_in_each_round_and_the_checkpoint_holds_no_pickled_code(two_rounds):
    contents = [torch.load(each.checkpoint, weights_only=True) for each in two_rounds]
    assert contents[1]["epoch"] - contents[0]["epoch"] == 4
    assert len(contents[1]["curve"]) == contents[1]["epoch"]
    first, second = (provenance(each.folder)["weights_hash"] for each in two_rounds)
    assert first != second
    moved = [
        name
        for name, tensor in contents[0]["network_weights"].items()
        if not torch.equal(tensor, contents[1]["network_weights"][name])
    ]
    assert moved


def test_provenance_holds_what_the_weights_depend_on(two_rounds, audit_table):
    first, second = two_rounds
    content = provenance(second.folder)
    assert content["inputs"][str(first.checkpoint)] == sha256_of(first.checkpoint)
    assert content["inputs"][str(audit_table)] == sha256_of(audit_table)
    assert content["settings"]["training"]["iterations_per_epoch"] > 0
    assert content["seed"] == 0
    assert content["packages"]["nnunetv2"] != "not installed"
    assert content["commit"]
    assert content["pseudo_labelled"] == ["coarse_u", "flipped_u", "oblique_u", "straight_u"]


def test_training_killed_after_an_epoch_ends_in_the_bits_of_an_undisturbed_one(
    two_rounds, kill_once, cotrain, tmp_path, capsys
):
    undisturbed = two_rounds[1]
    words = [str(tmp_path) if w == str(undisturbed.folder) else w for w in undisturbed.words]
    kill_once(words, tmp_path / "work" / "latest.pth")
    assert not (tmp_path / "checkpoint.pth").exists()
    # As a kill in the middle of a save leaves it.
    half_saved = tmp_path / "work" / ".writing-elsewhere-7-latest.pth"
    half_saved.touch()
    cotrain(*words)
    assert not half_saved.exists()
    assert "Resuming after epoch" in capsys.readouterr().out
    assert provenance(tmp_path)["weights_hash"] == provenance(undisturbed.folder)["weights_hash"]
    without_seconds = [
        [line.rsplit(",", 1)[0] for line in (folder / "curve.csv").read_text().splitlines()]
        for folder in (tmp_path, undisturbed.folder)
    ]
    assert without_seconds[0] == without_seconds[1]
    # Repeated with nothing left to train: Snakemake removes what is declared, and begins again.
    as_made = (tmp_path / "provenance.json").read_text()
    for name in ("checkpoint.pth", "curve.csv", "provenance.json"):
        (tmp_path / name).unlink()
    cotrain(*words)
    assert (tmp_path / "provenance.json").read_text() == as_made


def test_infers_masks_on_the_images_own_grid(
    network_and_experiment, two_rounds, cotrain, infer_words, tmp_path
):
    network, experiment = network_and_experiment
    cotrain(*infer_words(experiment, network, two_rounds[1].checkpoint, tmp_path))
    for row in experiment.rows("test"):
        mask = nibabel.load(tmp_path / f"{row['case']}.nii.gz")
        image = nibabel.load(row["image"].split(";")[0])
        assert mask.shape == image.shape
        assert np.array_equal(mask.affine, image.affine)
        assert mask.get_data_dtype() == np.uint8


def test_stock_nnunet_predicts_the_same_masks_without_this_package(
    network_and_experiment, two_rounds, cotrain, infer_words, tmp_path
):
    network, experiment = network_and_experiment
    if network == "2d":
        pytest.skip("the 3D network is the product; stock nnU-Net has no timm encoders")
    ours, images, stock = (tmp_path / name for name in ("ours", "images", "stock"))
    images.mkdir()
    for row in experiment.rows("test"):
        for channel, path in enumerate(row["image"].split(";")):
            (images / f"{row['case']}_{channel:04d}.nii.gz").symlink_to(path)
    words = infer_words(experiment, network, two_rounds[1].checkpoint, ours)
    cotrain(*words)
    cotrain(
        *("export", "--checkpoint", two_rounds[1].checkpoint, "--out-dir", tmp_path / "model"),
        *("--trained", two_rounds[1].folder / "provenance.json"),
        *("--preprocessed", experiment.preprocessed),
        *("--settings", words[words.index("--settings") + 1]),
    )
    environment = {name: str(tmp_path) for name in ("nnUNet_raw", "nnUNet_preprocessed")}
    environment["nnUNet_results"] = str(tmp_path / "model")
    # Where the networks of a person's own file are found, and what the export says to set.
    environment["PYTHONPATH"] = str(tmp_path / "model")
    subprocess.run(
        [
            *(sys.executable, "-c", STOCK_PREDICTION, "-i", str(images), "-o", str(stock)),
            *("-d", "Dataset001_cotrain", "-c", "3d_fullres", "-f", "all", "-device", "cpu"),
            *("-npp", "0", "-nps", "0"),
        ],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    for row in experiment.rows("test"):
        masks = [
            np.asarray(nibabel.load(folder / f"{row['case']}.nii.gz").dataobj)
            for folder in (ours, stock)
        ]
        truth = np.asarray(nibabel.load(row["label"]).dataobj)
        for value in experiment.settings.labels.values():
            # Far from perfect after 64 batches, but a mask that says something.
            assert dc(masks[0] == value, truth == value) > 0.6
            assert dc(masks[0] == value, masks[1] == value) >= 0.999


# ------------------------------------------------------------------------- what all share


def test_the_control_trains_at_the_same_rates_on_labels_alone(tiny, train, trained_3d, audit_table):
    folder = tiny.folder / "taught_3d"
    taught = train(
        *(tiny, "3d", folder, "--arm", "cotrain", "--round", 0, "--audit", audit_table),
    )
    curve, control = (pd.read_csv(each.folder / "curve.csv") for each in (taught, trained_3d))
    assert curve["learning_rate"].equals(control["learning_rate"])
    assert curve["epoch"].tolist() == control["epoch"].tolist() == [0, 1, 2, 3]
    assert curve["share_realised"].tolist() == curve["share_wanted"].tolist() == [0.5] * 4
    assert control["share_realised"].tolist() == control["share_wanted"].tolist() == [0] * 4


def test_a_verdict_that_changes_nothing_learnt_trains_no_epoch_again(
    tiny, train, cotrain, audit_table, tmp_path, capsys
):
    audit = tmp_path / "audit.tsv"
    audit.write_text(audit_table.read_text())
    taught = train(
        tiny, "3d", tmp_path / "taught", *("--arm", "cotrain", "--round", 0, "--audit", audit)
    )
    before = taught.checkpoint.read_bytes()
    table = read_table(audit).assign(reason="accept by a reader")
    table.to_csv(audit, sep="\t", index=False)
    # As Snakemake does before it starts a step again.
    taught.checkpoint.unlink()
    capsys.readouterr()
    cotrain(*taught.words)
    assert "Resuming after epoch 3" in capsys.readouterr().out
    # To the byte, or the masks of this round would be inferred again.
    assert taught.checkpoint.read_bytes() == before
    table.assign(accepted=["false", "true", "true", "true"]).to_csv(audit, sep="\t", index=False)
    taught.checkpoint.unlink()
    cotrain(*taught.words)
    assert "Resuming" not in capsys.readouterr().out


def test_a_round_that_no_mask_may_teach_stops_with_a_sentence(
    tiny, trained_3d, audit_table, tmp_path, capsys
):
    nothing = tmp_path / "nothing.tsv"
    nothing.write_text(audit_table.read_text().replace("true", "false"))
    words = [*trained_3d.words, "--arm", "cotrain", "--audit", nothing, "--out-dir", tmp_path]
    assert main([str(word) for word in words]) == 2
    assert "the audit accepted no mask" in capsys.readouterr().err
    assert "the audit accepted no mask" in (tmp_path / "work" / "step.error.txt").read_text()
    assert not (tmp_path / "work" / "step.lock").exists()


def test_the_checkpoint_of_another_round_or_network_is_refused(tiny, trained_3d, tmp_path, capsys):
    words = [*trained_3d.words, "--out-dir", tmp_path, "--previous", trained_3d.checkpoint]
    assert main([*map(str, words), "--round", "2"]) == 2
    assert "starts at epoch 8, but --previous" in capsys.readouterr().err
    words += ["--network", "2d", "--settings", tiny.stage("train_2d", tmp_path)]
    assert main([*map(str, words), "--round", "1"]) == 2
    assert "holds the 3d network, wanted the 2d network" in capsys.readouterr().err
