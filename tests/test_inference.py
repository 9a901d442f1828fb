"""Inference: stock nnU-Net's windows and logits, masks in the right place, resuming by cases."""

import copy
import json
import shutil
from argparse import Namespace
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from medpy.metric.binary import dc
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from cotrain.__main__ import main
from cotrain.errors import InputError
from cotrain.files import read_table, sha256_of, write_table
from cotrain.inference import logit_slabs, soft_mask_of, windows
from cotrain.masks import (
    _in_order,
    confidence_of,
    labels_on_image_grid,
    quantised,
    with_background,
)
from cotrain.merge import mean_of
from cotrain.nifti import orientation_of
from cotrain.nnunet import Planned
from cotrain.predict import (
    check_replaces_nothing,
    checked_table,
    final_checkpoints,
    hand_over,
    stage_on,
)
from cotrain.settings import Inference

CPU = torch.device("cpu")


@pytest.fixture
def planned(tiny):
    return Planned.read(tiny.preprocessed)


# --------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("shape", [(5, 9, 7), (20, 30, 24), (41, 16, 33)])
@pytest.mark.parametrize("patch", [(8, 16, 16), (16, 16)])
@pytest.mark.parametrize("step", [0.3, 0.5, 1])
def test_windows_cover_every_voxel(shape, patch, step):
    padded = np.zeros([size + 40 for size in shape], dtype=int)
    for box in windows(shape, patch, step=step, slices_at_once=4):
        assert [high - low for low, high in box][-len(patch) :] == list(patch)
        padded[tuple(slice(low + 20, high + 20) for low, high in box)] += 1
    inside = padded[tuple(slice(20, 20 + size) for size in shape)]
    assert inside.min() >= 1
    # No window lies beyond a volume that is larger than the patch.
    for axis, size in enumerate(shape[-len(patch) :], start=3 - len(patch)):
        if size >= patch[axis - (3 - len(patch))]:
            beyond = np.delete(padded, range(20, 20 + shape[axis]), axis=axis)
            assert beyond.max() == 0


def test_windows_by_hand():
    # 20 voxels, patch 8, step 4: three steps of 4 would do. 5 voxels: centred, 1 before, 2 after.
    boxes = list(windows((20, 5, 8), (8, 8, 8), step=0.5, slices_at_once=1))
    assert [box[0] for box in boxes] == [(0, 8), (4, 12), (8, 16), (12, 20)]
    assert {box[1:] for box in boxes} == {((-1, 7), (0, 8))}


def test_slices_come_whole_and_several_at_once():
    boxes = list(windows((10, 8, 8), (8, 8), step=0.5, slices_at_once=4))
    assert [box[0] for box in boxes] == [(0, 4), (4, 8), (8, 10)]


# ---------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("mirroring", [False, True])
@pytest.mark.parametrize("shape", [(9, 13, 21), (14, 41, 50), (20, 10, 37)])
@pytest.mark.parametrize("name", ["2d", "3d"])
def test_logits_are_those_of_stock_nnunet(name, shape, mirroring, planned):
    torch.manual_seed(0)
    network = planned.build_network(name, deep_supervision=False).eval()
    # Fresh weights give nearly the same everywhere; running statistics of a real image do not.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    configuration = planned.configuration(name)
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    image[0, :, : shape[1] // 2] += 3  # so that another field of view has other statistics
    slabs = logit_slabs(
        network,
        blosc2.asarray(image),
        patch_size=tuple(configuration.patch_size),
        class_count=planned.class_count,
        batch_size=3,
        inference=Inference(mirroring=mirroring),
        device=CPU,
        precision="fp32",
    )
    ours = torch.cat(list(slabs), dim=1)
    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_mirroring=mirroring,
        perform_everything_on_device=False,
        device=CPU,
        allow_tqdm=False,
    )
    axes = tuple(range(len(configuration.patch_size)))
    predictor.manual_initialization(
        network, planned.manager, configuration, None, planned.dataset, "nnUNetTrainer", axes
    )
    stock = predictor.predict_sliding_window_return_logits(torch.from_numpy(image))
    assert ours.dtype == stock.dtype == torch.float16
    assert ours.shape == stock.shape == (3, *shape)
    spread = stock.float().std().item()
    assert spread > 0.01
    # Sums of windows in half precision: two units in the last of its 10 bits.
    torch.testing.assert_close(ours, stock, rtol=2e-3, atol=2e-3 * spread)


def test_a_slice_is_seen_with_those_beside_it():
    """Two channels of 4 slices: the first holds 1 to 4, the second 10 to 40."""
    image = np.arange(1, 5)[None, :, None, None] * np.array([1, 10])[:, None, None, None]
    image = np.broadcast_to(image, (2, 4, 8, 8)).astype(np.float32)
    slabs = logit_slabs(
        torch.nn.Identity(),
        image,
        patch_size=(8, 8),
        class_count=6,
        batch_size=3,
        inference=Inference(),
        device=CPU,
        precision="fp32",
        adjacent_slices=1,
    )
    seen = torch.cat(list(slabs), dim=1)[:, :, 4, 4].round()
    # By slices: before, itself and after of one channel, then of the other; 0 past the ends.
    assert seen.T.tolist() == [
        [0, 1, 2, 0, 10, 20],
        [1, 2, 3, 10, 20, 30],
        [2, 3, 4, 20, 30, 40],
        [3, 4, 0, 30, 40, 0],
    ]


def test_a_networks_infinite_output_stops_with_a_sentence(planned):
    class Broken(torch.nn.Module):
        def forward(self, images):
            return images.new_full((len(images), 3, *images.shape[2:]), float("nan"))

    with pytest.raises(ValueError, match="lower learning rate"):
        logits = logit_slabs(
            Broken(),
            np.zeros((1, 4, 4, 4), dtype=np.float32),
            patch_size=(4, 4, 4),
            class_count=3,
            batch_size=1,
            inference=Inference(),
            device=CPU,
            precision="fp32",
        )
        list(logits)


# ------------------------------------------------------------------------- masks on the grids


@pytest.mark.parametrize("split", ["labelled", "unlabelled", "test"])
def test_labels_come_back_to_the_images_own_grid(split, tiny, planned):
    for row in tiny.rows(split):
        arrays = str(tiny.truth / split / row["case"])
        label = torch.from_numpy(blosc2.open(arrays + "_seg.b2nd")[0].astype(np.int64)).clamp(0)
        logits = torch.nn.functional.one_hot(label, 3).movedim(-1, 0).half()
        back = labels_on_image_grid(
            [logits], load_pickle(arrays + ".pkl"), planned, depth=logits.shape[1]
        )
        original = np.asarray(nibabel.load(row["label"]).dataobj)
        assert back.transpose(2, 1, 0).shape == original.shape
        for value in tiny.settings.labels.values():
            assert dc(back.transpose(2, 1, 0) == value, original == value) > 0.97, row["case"]


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [
        ((9, 20, 24), (1.0, 1.0, 1.0)),
        ((23, 31, 20), (0.6, 0.8, 1.7)),
        ((40, 50, 45), (0.5, 0.5, 0.5)),
        ((6, 40, 41), (5.0, 0.7, 0.7)),
        ((33, 9, 30), (0.8, 4.0, 0.8)),
        ((1, 20, 20), (4.0, 1.0, 1.0)),
    ],
)
def test_labels_are_resampled_as_nnunet_does_it(shape, spacing_mm, planned):
    torch.manual_seed(0)
    margin, planned_mm = (2, 0, 3), planned.configuration("3d").spacing
    grid = [max(1, round(n * a / b)) for n, a, b in zip(shape, spacing_mm, planned_mm, strict=True)]
    logits = (2 * torch.randn(3, *grid)).half()
    properties = {
        # In the image's order; everything else is in the order of the preprocessed axes.
        "spacing": [spacing_mm[axis] for axis in planned.manager.transpose_backward],
        "shape_before_cropping": tuple(n + 2 * m for n, m in zip(shape, margin, strict=True)),
        "shape_after_cropping_and_before_resampling": shape,
        "bbox_used_for_cropping": [[m, m + n] for n, m in zip(shape, margin, strict=True)],
    }
    slabs = torch.split(logits, 4, dim=1)
    ours = labels_on_image_grid(slabs, properties, planned, depth=grid[0])
    at_a_time = labels_on_image_grid(slabs, properties, planned, depth=grid[0], threads=3)
    assert np.array_equal(ours, at_a_time)
    stock = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, planned.manager, planned.configuration("3d"), planned.labels, properties
    )
    assert ours.shape == stock.shape
    assert sorted(ours.shape) == sorted(properties["shape_before_cropping"])
    # nnU-Net interpolates all axes at once: the last bit may decide between two equal labels.
    assert (ours != stock).mean() < 1e-3
    assert len(np.unique(ours)) == 3


def test_plans_with_another_resampling_are_refused(planned):
    plans = copy.deepcopy(planned.plans)
    for configuration in plans["configurations"].values():
        if "resampling_fn_probabilities" in configuration:
            configuration["resampling_fn_probabilities"] = "resample_torch_fornnunet"
    with pytest.raises(InputError, match="resample_torch_fornnunet"):
        labels_on_image_grid([], {"spacing": (1, 1, 1)}, Planned(plans, planned.dataset), depth=1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_slices_resampled_at_a_time_come_in_order_and_few_ahead(threads):
    taken = []
    items = (taken.append(item) or item for item in range(20))
    for number, made in enumerate(_in_order(lambda item: 10 * item, items, threads=threads)):
        assert made == 10 * number
        assert len(taken) <= number + 1 + 2 * threads
    assert taken == list(range(20))


def test_quantisation_errs_by_half_a_step_at_most():
    torch.manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(4, 6, 7, 8), 0)
    soft = quantised(probabilities.clone())
    assert soft.dtype == np.uint8
    back = with_background(soft)
    assert np.abs(back[1:] - probabilities[1:].numpy()).max() <= 1 / 510 + 1e-6
    assert back.min() >= 0
    np.testing.assert_allclose(back.sum(0), 1, atol=3 / 510)


def test_the_soft_mask_is_the_softmax_of_the_logits():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 6, 7).half()
    assert np.array_equal(soft_mask_of(logits), quantised(torch.softmax(logits.float(), 0)))


def test_confidence_by_hand():
    # Background, shell surely, core barely, nothing wins over 100 of background.
    soft = np.array([[0, 255, 60, 80], [10, 0, 130, 75]], dtype=np.uint8).reshape(2, 1, 1, 4)
    assert confidence_of(soft) == pytest.approx((255 + 130) / 2 / 255)
    assert confidence_of(np.zeros_like(soft)) == 0


def test_manifest_says_volume_and_confidence_of_the_files(tiny, pseudo_masks):
    header, *lines = (pseudo_masks / "manifest-0.tsv").read_text().splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    assert [row["case"] for row in rows] == [row["case"] for row in tiny.rows("unlabelled")]
    for row in rows:
        mask = nibabel.load(pseudo_masks / row["mask"])
        voxel_ml = np.prod(mask.header.get_zooms()) / 1000
        volume_ml = np.count_nonzero(np.asarray(mask.dataobj)) * voxel_ml
        assert float(row["volume_ml"]) == pytest.approx(volume_ml, abs=1e-3)
        soft = blosc2.open(str(pseudo_masks / row["soft"]))[:]
        assert float(row["confidence"]) == pytest.approx(confidence_of(soft), abs=1e-4)


# -------------------------------------------------------------------------------- the mean


def test_the_mean_of_two_soft_masks_by_hand():
    a = np.array([51, 0, 102, 255], dtype=np.uint8).reshape(2, 1, 1, 2)
    b = np.zeros_like(a)
    # Foreground of a: 0.2 and 0.4, and 0 and 1; of b: nothing.
    mean = mean_of([a, b])[:, 0, 0]
    torch.testing.assert_close(mean, torch.tensor([[0.7, 0.5], [0.1, 0.0], [0.2, 0.5]]))


def test_a_mask_set_merged_with_itself_stays_the_same(tiny, pseudo_masks, cotrain, tmp_path):
    cotrain(
        *("merge", "--masks", pseudo_masks, pseudo_masks, "--preprocessed", tiny.preprocessed),
        *("--split", "unlabelled", "--cases", tiny.tables["unlabelled"], "--out-dir", tmp_path),
    )
    assert (tmp_path / "manifest-0.tsv").exists()
    for row in tiny.rows("unlabelled"):
        soft, mask = (
            [folder / f"{row['case']}{suffix}" for folder in (pseudo_masks, tmp_path)]
            for suffix in (".b2nd", ".nii.gz")
        )
        assert np.array_equal(*(blosc2.open(str(path))[:] for path in soft))
        # From probabilities instead of logits: the border may move by a part of a voxel.
        labels = [np.asarray(nibabel.load(path).dataobj) for path in mask]
        assert dc(labels[0] > 0, labels[1] > 0) > 0.97


# -------------------------------------------------------------------------------- resuming


@pytest.fixture
def killed(tiny, trained_3d, infer_words, kill_once, tmp_path):
    """Return the command and the folder of a mask set that was killed after a case."""
    folder = tmp_path / "killed"
    # Mirroring makes a case last, so that the kill comes before the end of the last.
    words = infer_words(tiny, "3d", trained_3d.checkpoint, folder, "unlabelled", mirroring=True)
    kill_once(words, folder / "work" / "shard-0.finished.jsonl")
    assert not (folder / "manifest-0.tsv").exists()
    return words, folder


def content_of(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("*.nii.gz"), *folder.glob("*.b2nd")]
    return {path.name: path.read_bytes() for path in files if not path.name.startswith(".")}


def moved(words: list[str], folder: Path, to: Path) -> list[str]:
    """Return the command with only its output folder changed: settings stay the same file."""
    place = words.index("--out-dir") + 1
    assert words[place] == str(folder)
    return [*words[:place], str(to), *words[place + 1 :]]


def test_a_killed_mask_set_goes_on_with_the_next_case_to_the_same_bytes(
    tiny, killed, cotrain, tmp_path, capsys
):
    words, folder = killed
    first = folder / f"{tiny.rows('unlabelled')[0]['case']}.nii.gz"
    made = first.stat().st_mtime_ns
    cotrain(*words)
    assert "Resuming after" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == made
    cotrain(*moved(words, folder, tmp_path / "undisturbed"))
    assert len(content_of(folder)) == 8
    assert content_of(folder) == content_of(tmp_path / "undisturbed")


def test_masks_stay_where_a_case_is_added_and_another_is_preprocessed_anew(
    tiny, pseudo_masks, cotrain, tmp_path, capsys
):
    rows = read_table(tiny.tables["unlabelled"])
    cases, folder = tmp_path / "cases.tsv", tmp_path / "mean"
    preprocessed = tmp_path / "preprocessed"
    shutil.copytree(tiny.preprocessed, preprocessed)
    words = ["merge", "--masks", pseudo_masks, pseudo_masks, "--preprocessed", preprocessed]
    words += ["--split", "unlabelled", "--cases", cases, "--out-dir", folder]
    write_table(rows.drop(index=1), cases)
    cotrain(*words)
    manifest = read_table(folder / "manifest-0.tsv")
    made = {case: (folder / f"{case}.nii.gz").stat().st_mtime_ns for case in manifest["case"]}
    assert list(made) == [rows["case"][number] for number in (0, 2, 3)]
    write_table(rows, cases)
    arrays = preprocessed / "unlabelled" / "manifest-0.tsv"
    table = read_table(arrays)
    table.loc[table["case"] == rows["case"][2], "origin"] = "another"
    write_table(table, arrays)
    capsys.readouterr()
    cotrain(*words)
    assert "Resuming after 2 finished cases" in capsys.readouterr().out
    assert list(read_table(folder / "manifest-0.tsv")["case"]) == list(rows["case"])
    kept = [
        case
        for case, time in made.items()
        if (folder / f"{case}.nii.gz").stat().st_mtime_ns == time
    ]
    assert kept == [rows["case"][0], rows["case"][3]]
    # Killed before that was told, it is told.
    told = (folder / "manifest-0.tsv").read_text()
    write_table(
        read_table(folder / "manifest-0.tsv").replace(
            sha256_of(folder / f"{rows['case'][2]}.nii.gz"), "of the one before"
        ),
        folder / "manifest-0.tsv",
    )
    cotrain(*words)
    assert (folder / "manifest-0.tsv").read_text() == told
    capsys.readouterr()
    # Shared out in another way, each case goes with its shard.
    for shard in (1, 0):
        sharded = table[shard::2]
        write_table(sharded, preprocessed / "unlabelled" / f"manifest-{shard}.tsv")
        made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}
        cotrain(*words, "--shard", str(shard), "--shards", "2")
        assert "Resuming after 2 finished cases" in capsys.readouterr().out
        assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")} == made
        manifest = read_table(folder / f"manifest-{shard}.tsv")
        assert list(manifest["case"]) == list(sharded["case"])
    (folder / "manifest-1.tsv").unlink()
    write_table(table, arrays)
    cotrain(*words)
    capsys.readouterr()
    # All are there: nothing is written again.
    cotrain(*words)
    assert "is finished already; it stays as it is" in capsys.readouterr().out


def test_cases_of_another_shard_preprocessed_meanwhile_discard_nothing(
    tiny, killed, cotrain, capsys
):
    words, _ = killed
    other = tiny.preprocessed / "unlabelled" / "manifest-1.tsv"
    other.write_text("case\n")
    try:
        cotrain(*words)
    finally:
        other.unlink()
    assert "Resuming after" in capsys.readouterr().out


def test_a_finished_mask_that_was_edited_or_deleted_is_made_again(
    tiny, pseudo_masks, cotrain, tmp_path, capsys
):
    words = [
        *("merge", "--masks", pseudo_masks, pseudo_masks, "--preprocessed", tiny.preprocessed),
        *("--split", "unlabelled", "--cases", tiny.tables["unlabelled"], "--out-dir", tmp_path),
    ]
    cotrain(*words)
    as_made = content_of(tmp_path)
    cases = [row["case"] for row in tiny.rows("unlabelled")]
    edited = tmp_path / f"{cases[0]}.nii.gz"
    edited.unlink()
    shutil.copy(tmp_path / f"{cases[1]}.nii.gz", edited)
    (tmp_path / f"{cases[2]}.b2nd").unlink()
    # As the audit that refused them says.
    (tmp_path / "manifest-0.tsv").unlink()
    capsys.readouterr()
    cotrain(*words)
    assert "Resuming after 2 finished cases" in capsys.readouterr().out
    assert content_of(tmp_path) == as_made
    manifest = read_table(tmp_path / "manifest-0.tsv")
    assert list(manifest["case"]) == cases
    for row in manifest.to_dict("records"):
        assert row["mask_sha256"] == sha256_of(tmp_path / row["mask"])
        assert row["soft_sha256"] == sha256_of(tmp_path / row["soft"])


def test_a_changed_checkpoint_discards_finished_cases(
    tiny, killed, trained_3d, train, cotrain, tmp_path, capsys
):
    words, folder = killed
    other = train(
        *(tiny, "3d", tmp_path / "other", "--arm", "labels_only", "--round", 1),
        *("--previous", trained_3d.checkpoint),
    )
    # Under the same path, as when a round is trained again.
    checkpoint = tmp_path / "checkpoint.pth"
    words = [str(checkpoint) if w == str(trained_3d.checkpoint) else w for w in words]
    shutil.copy(other.checkpoint, checkpoint)
    capsys.readouterr()
    cotrain(*words)
    assert "Resuming after" not in capsys.readouterr().out
    cotrain(*moved(words, folder, tmp_path / "undisturbed"))
    assert content_of(folder) == content_of(tmp_path / "undisturbed")


def test_a_checkpoint_of_the_other_network_is_refused(
    tiny, trained_3d, infer_words, tmp_path, capsys
):
    assert main(infer_words(tiny, "2d", trained_3d.checkpoint, tmp_path)) == 2
    assert "holds the 3d network, wanted the 2d network" in capsys.readouterr().err


# ------------------------------------------------------------------------------ prediction


def test_prediction_replaces_neither_an_image_nor_a_corrected_mask(
    tiny, pseudo_masks, cotrain, tmp_path
):
    words = ["merge", "--masks", pseudo_masks, pseudo_masks, "--preprocessed", tiny.preprocessed]
    words += ["--split", "unlabelled", "--cases", tiny.tables["unlabelled"]]
    mean = tmp_path / "steps" / "mean"
    cotrain(*words, "--out-dir", mean)
    hand_over(mean, tmp_path)
    cases = [row["case"] for row in tiny.rows("unlabelled")]
    masks = {f"{case}.nii.gz" for case in cases}
    assert {path.name for path in tmp_path.iterdir()} == {"steps", "confidence.tsv", *masks}
    sure = pd.read_csv(tmp_path / "confidence.tsv", sep="\t")
    assert sorted(sure["case"]) == sorted(cases)
    assert sure["confidence"].is_monotonic_increasing
    check_replaces_nothing([*cases, "new"], tmp_path)
    # What was handed over is known by its table, too: the steps may be removed.
    shutil.rmtree(tmp_path / "steps")
    check_replaces_nothing([*cases, "new"], tmp_path)
    sure.drop(columns="mask_sha256").to_csv(tmp_path / "confidence.tsv", sep="\t", index=False)
    with pytest.raises(InputError, match=rf"{cases[0]}\.nii\.gz and 3 more would be replaced"):
        check_replaces_nothing(cases, tmp_path)
    sure.to_csv(tmp_path / "confidence.tsv", sep="\t", index=False)
    shutil.copy(tiny.rows("unlabelled")[0]["image"], tmp_path / "new.nii.gz")
    with pytest.raises(InputError, match=r"new\.nii\.gz would be replaced .* another --out-dir"):
        check_replaces_nothing([*cases, "new"], tmp_path)
    # In place: what was handed over belongs to the user.
    shutil.copy(tmp_path / f"{cases[1]}.nii.gz", tmp_path / f"{cases[0]}.nii.gz")
    with pytest.raises(InputError, match=rf"{cases[0]}\.nii\.gz and 1 more would be replaced"):
        check_replaces_nothing([*cases, "new"], tmp_path)


def test_images_in_an_orientation_that_was_not_learnt_are_warned_of(tiny, tmp_path, capsys):
    rows = {row["case"]: row["image"] for row in tiny.rows("unlabelled")}
    for case in ("straight_u", "flipped_u"):
        shutil.copy(rows[case], tmp_path / f"{case}.nii.gz")
    planned = Planned.read(tiny.preprocessed)
    assert planned.dataset["orientations"] == sorted(
        {orientation_of(row["image"]) for row in tiny.rows("labelled")}
    )
    arguments = Namespace(images=[tmp_path], channel_suffix=[], threads=1)
    of_straight = {**planned.dataset, "orientations": [orientation_of(rows["straight_u"])]}
    checked_table(arguments, Planned(planned.plans, of_straight))
    said = capsys.readouterr().out
    assert "WARNING: 1 of 2 images are stored in another orientation" in said
    assert f"such as flipped_u ({orientation_of(rows['flipped_u'])})" in said
    both = {**planned.dataset, "orientations": sorted(map(orientation_of, rows.values()))}
    untold = {name: value for name, value in planned.dataset.items() if name != "orientations"}
    for dataset in (both, untold):
        checked_table(arguments, Planned(planned.plans, dataset))
        assert "WARNING" not in capsys.readouterr().out


def test_an_image_in_another_unit_is_refused_before_any_is_predicted(tiny, tmp_path):
    for number, row in enumerate(tiny.rows("unlabelled")):
        image = nibabel.load(row["image"])
        affine = image.affine @ np.diag([0.001, 0.001, 0.001, 1]) if number == 1 else image.affine
        nibabel.save(nibabel.Nifti1Image(image.get_fdata(), affine), tmp_path / f"c{number}.nii.gz")
    arguments = Namespace(images=[tmp_path], channel_suffix=[], threads=1)
    planned = Planned.read(tiny.preprocessed)
    with pytest.raises(InputError, match=r"case c1: the image has .* so that nothing is left"):
        checked_table(arguments, planned)
    (tmp_path / "c1.nii.gz").unlink()
    assert list(checked_table(arguments, planned)["case"]) == ["c0", "c2", "c3"]


def test_networks_that_did_not_end_the_same_run_are_not_averaged(tmp_path):
    made = {
        "2d": tmp_path / "cotrain/round-01/train_2d/checkpoint.pth",
        "3d": tmp_path / "cotrain/round-02/train_3d/checkpoint.pth",
        "plans": tmp_path / "preprocessed/plans.json",
    }
    for name, path in made.items():
        path.parent.mkdir(parents=True)
        path.write_text(name)
    # Of paths as they were where the workflow ran.
    inputs = {f"results/x/{path.relative_to(tmp_path)}": sha256_of(path) for path in made.values()}
    note = {"training": {"round": 2, "settings": {"last_round": 2}}, "inputs": inputs}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/provenance.json").write_text(json.dumps(note))
    assert final_checkpoints(tmp_path) == {"2d": made["2d"], "3d": made["3d"]}
    for name, path in made.items():
        path.write_text("of a round that was trained again")
        with pytest.raises(InputError, match=f"{path} is not the one that .* was written with"):
            final_checkpoints(tmp_path)
        path.write_text(name)


def test_prediction_takes_another_device_and_says_how_where_there_is_no_gpu(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "settings").mkdir()
    of_the_run = {"device": "cuda", "precision": "fp32"}
    settings = tiny.stage("infer", tmp_path / "settings", compute=of_the_run)
    with pytest.raises(InputError) as refused:
        stage_on(None, tmp_path)
    assert "torch sees no GPU here; go where" in str(refused.value)
    assert "--device cpu" in str(refused.value)
    assert "set compute.device" not in str(refused.value)
    as_it_was = settings.read_text()
    assert stage_on("cpu", tmp_path).compute.model_dump() == of_the_run | {
        "device": "cpu",
        "gpus_per_training": 1,
    }
    assert settings.read_text() == as_it_was
