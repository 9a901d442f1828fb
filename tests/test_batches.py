"""Batches: the same whoever makes them, with the targets and shares that were asked for."""

import json

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform

from cotrain.batches import BatchSource, Case, augmentation, batches, seed_everything
from cotrain.masks import foreground_locations, write_soft
from cotrain.nnunet import Planned, arrays_of
from cotrain.slices import patch_of, slices_of

NETWORKS = ["2d", "3d"]


@pytest.fixture
def planned(tiny):
    return Planned.read(tiny.preprocessed)


@pytest.fixture
def labelled(tiny):
    return [
        Case(row["case"], arrays_of(tiny.preprocessed / "labelled", row["case"]))
        for row in tiny.rows("labelled")
    ]


@pytest.fixture
def unlabelled(tiny, pseudo_masks):
    return [
        Case(
            row["case"],
            arrays_of(tiny.preprocessed / "unlabelled", row["case"]),
            str(pseudo_masks / f"{row['case']}.b2nd"),
        )
        for row in tiny.rows("unlabelled")
    ]


def source_of(planned, network, labelled, unlabelled, counts, *, epoch=0, seed=0):
    return BatchSource(
        planned,
        network,
        labelled=labelled,
        unlabelled=unlabelled,
        counts=np.array(counts, ndmin=2),
        seed=seed,
        first_epoch=epoch,
        mirroring=True,
    )


def same(a, b):
    return torch.equal(a["data"], b["data"]) and torch.equal(a["target"], b["target"])


@pytest.mark.parametrize("network", NETWORKS)
def test_a_batch_does_not_depend_on_workers_or_on_what_was_drawn_before(
    network, planned, labelled, unlabelled
):
    source = source_of(planned, network, labelled, unlabelled, [1, 0, 1, 2])
    in_order = list(batches(source, workers=0, pin_memory=False))
    by_workers = list(batches(source, workers=2, pin_memory=False))
    assert len(in_order) == len(by_workers) == 4
    assert all(same(*pair) for pair in zip(in_order, by_workers, strict=True))
    not_forked = list(batches(source, workers=2, pin_memory=False, forking=False))
    assert all(same(*pair) for pair in zip(in_order, not_forked, strict=True))
    alone = source_of(planned, network, labelled, unlabelled, [1, 0, 1, 2])
    seed_everything(99)
    assert same(alone[2], in_order[2])


def test_every_iteration_epoch_seed_and_slot_draws_another_sample(planned, labelled, unlabelled):
    first = source_of(planned, "3d", labelled, unlabelled, [1, 1])
    others = [
        first[1],
        source_of(planned, "3d", labelled, unlabelled, [1, 1], epoch=1)[0],
        source_of(planned, "3d", labelled, unlabelled, [1, 1], seed=1)[0],
    ]
    assert not any(same(first[0], other) for other in others)
    of_one_batch = source_of(planned, "2d", labelled, unlabelled, [0])[0]["data"]
    assert len(torch.unique(of_one_batch, dim=0)) == 4


def test_epochs_made_in_one_stream_are_the_epochs_made_one_by_one(planned, labelled, unlabelled):
    # Or a resumed training, which begins in their midst, would draw other batches.
    joined = source_of(planned, "3d", labelled, unlabelled, [[0, 1], [2, 0]], epoch=3)
    second = source_of(planned, "3d", labelled, unlabelled, [2, 0], epoch=4)
    assert len(joined) == 4
    of_joined = batches(joined, workers=1, pin_memory=False)
    expected = [*batches(second, workers=0, pin_memory=False)]
    assert all(same(*pair) for pair in zip([*of_joined][2:], expected, strict=True))


@pytest.mark.parametrize("network", NETWORKS)
def test_labelled_samples_come_first_and_pseudo_labelled_ones_are_counted(
    network, planned, labelled, unlabelled
):
    configuration = planned.configuration(network)
    counts = list(range(configuration.batch_size + 1))
    source = source_of(planned, network, labelled, unlabelled, counts)
    for iteration, count in enumerate(counts):
        batch = source[iteration]
        assert batch["data"].shape == (configuration.batch_size, 1, *configuration.patch_size)
        assert batch["target"].shape == (configuration.batch_size, 3, *configuration.patch_size)
        torch.testing.assert_close(batch["target"].sum(1), torch.ones_like(batch["target"][:, 0]))
        # The teacher's masks are nowhere quite certain; true labels are everywhere.
        is_soft = [((each > 0) & (each < 1)).any().item() for each in batch["target"]]
        assert is_soft == [False] * (configuration.batch_size - count) + [True] * count


def test_unlabelled_cases_are_drawn_alike_and_with_the_numbers_they_always_were(
    planned, labelled, unlabelled, monkeypatch
):
    source, drawn = source_of(planned, "2d", labelled, unlabelled, [4, 3]), []

    def sample(case, *, aimed):
        drawn.append(case.name.removesuffix("_u"))
        return torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(source, "_sample", sample)
    assert len(source[0]["data"]) == len(source[1]["data"]) == 4
    # Another call of numpy's would draw others, and a training begun before go on with them.
    assert drawn == [
        *("flipped", "straight", "oblique", "straight"),
        *("flipped", "oblique", "coarse", "straight"),
    ]


def test_slices_beside_a_slice_come_as_its_channels(planned, labelled, unlabelled):
    plans = json.loads(json.dumps(planned.plans))
    plans["configurations"]["2d_cotrain"]["architecture"]["arch_kwargs"]["adjacent_slices"] = 2
    seeing = source_of(Planned(plans, planned.dataset), "2d", labelled, unlabelled, [2])
    batch = seeing[0]
    size = planned.configuration("2d").patch_size
    assert batch["data"].shape == (4, 5, *size)
    assert batch["target"].shape == (4, 3, *size)


def test_a_patch_holds_the_slices_beside_it():
    # The second of four slices, 2 x 3 voxels that reach past the left edge: voxels are numbered.
    image = np.arange(1, 4 * 8 * 8 + 1, dtype=np.float32).reshape(1, 4, 8, 8)
    patch = patch_of(blosc2.asarray(image), [(1, 2), (2, 4), (-1, 2)], adjacent_slices=2)
    assert patch.shape == (1, 5, 2, 3)
    assert not patch[0, 0].any()
    assert patch[0, 1:].tolist() == [
        [[0, 64 * z + 17, 64 * z + 18], [0, 64 * z + 25, 64 * z + 26]] for z in range(4)
    ]
    (seen,) = slices_of(patch, adjacent_slices=2)
    assert torch.equal(seen, patch[0])


@pytest.mark.parametrize("network", NETWORKS)
def test_a_certain_soft_mask_teaches_what_its_label_teaches(network, planned, labelled, tmp_path):
    label = labelled[2]
    truth = blosc2.open(label.arrays + "_seg.b2nd")[0]
    certain = np.stack([truth == 1, truth == 2]).astype(np.uint8) * 255
    write_soft(certain, tmp_path / "soft.b2nd", patch_size=(12, 16, 32))
    soft = Case(label.name, label.arrays, str(tmp_path / "soft.b2nd"))
    source = source_of(planned, network, [label], [soft], [0])
    exactly, turned = 0, 0
    for seed in range(30):
        samples = []
        for case in (label, soft):
            seed_everything(seed)
            samples.append(source._sample(case, aimed=False))
        (image, target), (same_image, soft_target) = samples
        assert torch.equal(image, same_image)
        if torch.equal(target, soft_target):
            exactly += 1
            continue
        turned += 1
        # Interpolated: certain inside, and on the right side of one half nearly everywhere.
        assert (target.argmax(0) == soft_target.argmax(0)).float().mean() > 0.98
        assert (target - soft_target).abs().mean() < 0.05
    assert exactly > 10
    assert turned > 4


@pytest.mark.parametrize("network", NETWORKS)
def test_outside_the_body_is_zero_where_nnunet_normalises_inside_it(network, planned, unlabelled):
    masked = Planned(
        {
            **planned.plans,
            "configurations": {
                name: content | {"use_mask_for_norm": [True]}
                for name, content in planned.plans["configurations"].items()
            },
        },
        planned.dataset,
    )
    counts = [planned.configuration(network).batch_size] * 4
    with_mask = source_of(masked, network, unlabelled, unlabelled, counts)
    without = source_of(planned, network, unlabelled, unlabelled, counts)
    for iteration in range(4):
        a, b = with_mask[iteration], without[iteration]
        assert torch.equal(a["target"], b["target"])
        changed = a["data"] != b["data"]
        assert changed.any()
        assert (a["data"][changed] == 0).all()


def test_each_slice_beside_a_slice_is_zero_outside_its_own_body(planned, labelled, tmp_path):
    plans = json.loads(json.dumps(planned.plans))
    content = plans["configurations"]["2d_cotrain"]
    content["architecture"]["arch_kwargs"]["adjacent_slices"] = 1
    content["use_mask_for_norm"] = [True]
    # The body is a column of its own in each of three slices, and the image is 5 everywhere.
    shape = blosc2.open(labelled[0].arrays + ".b2nd").shape
    image = np.full((1, 3, *shape[2:]), 5, dtype=np.float32)
    body = np.full(image.shape, -1, dtype=np.int16)
    for z in range(3):
        body[0, z, :, 10 + z] = 0
    arrays = str(tmp_path / "columns")
    blosc2.asarray(image, urlpath=arrays + ".b2nd", mode="w")
    blosc2.asarray(body, urlpath=arrays + "_seg.b2nd", mode="w")
    write_pickle({"class_locations": {}}, arrays + ".pkl")
    case = Case("columns", arrays)
    source = source_of(Planned(plans, planned.dataset), "2d", [case], [], [0])
    kept = (MaskImageTransform, RemoveLabelTansform)
    source.transforms = ComposeTransforms(
        [each for each in source.transforms.transforms if isinstance(each, kept)]
    )
    source.cropper.get_bbox = lambda *_: ((1, 0, 5), (2, 4, 15))
    seen, target = source._sample(case, aimed=False)
    assert [channel[0].nonzero().flatten().tolist() for channel in seen] == [[5], [6], [7]]
    assert target.shape == (3, 4, 10)


@pytest.mark.parametrize(("mirroring", "directions"), [(True, {-1.0, 1.0}), (False, {1.0})])
def test_patches_are_mirrored_along_each_axis_or_along_none(mirroring, directions, planned):
    transforms, start = augmentation(planned.configuration("3d"), mirroring=mirroring)
    for axis in range(3):
        seen = set()
        for seed in range(12):
            seed_everything(seed)
            shape = [size if each == axis else 1 for each, size in enumerate(start)]
            rising = torch.linspace(-1, 1, int(start[axis])).view(1, *shape)
            image = transforms(
                image=rising.expand(1, *(int(size) for size in start)).clone(),
                segmentation=torch.zeros((1, *(int(size) for size in start)), dtype=torch.int16),
            )["image"][0]
            half = image.shape[axis] // 2
            low, high = image.narrow(axis, 0, half), image.narrow(axis, half, half)
            seen.add(float(torch.sign(high.mean() - low.mean())))
        assert seen == directions


def test_nnunets_share_of_samples_is_aimed_at_foreground_in_any_place(planned, unlabelled):
    aimed = []
    source = source_of(planned, "3d", unlabelled, unlabelled, [2] * 20)
    original = source._sample
    source._sample = lambda case, *, aimed: seen.append(aimed) or original(case, aimed=aimed)
    for iteration in range(20):
        seen = []
        source[iteration]
        aimed.append(seen)
    # Stock nnU-Net aims the last of two: round(2 x 0.67) = 1 is left to chance.
    assert [sum(each) for each in aimed] == [1] * 20
    assert 0 < sum(each[0] for each in aimed) < 20


def test_a_third_of_lone_samples_is_aimed_at_foreground(planned, unlabelled):
    # Stock's formula aims none of a batch of one: round(1 x 0.67) = 1.
    source = source_of(planned, "3d", unlabelled, unlabelled, [1] * 200)
    source.batch_size, source.slots, aimed = 1, range(1), []
    sample = (torch.zeros(1), torch.zeros(1))
    source._sample = lambda case, *, aimed: seen.append(aimed) or sample
    for iteration in range(200):
        seen = []
        source[iteration]
        aimed += seen
    assert len(aimed) == 200
    assert 0.25 < sum(aimed) / 200 < 0.41


def test_foreground_locations_are_spread_over_the_whole_object():
    soft = np.zeros((2, 3, 20, 20), dtype=np.uint8)
    soft[0, :, :, :15] = 200  # 900 voxels: more than 500, less than twice as many
    soft[1, 1, 19, 19] = 255
    locations = foreground_locations(soft)
    shell = np.array(locations["1"])
    assert len(shell) == len(np.unique(shell, axis=0)) == 500
    assert [np.sum(shell[:, 0] == z) for z in range(3)] == pytest.approx([500 / 3] * 3, abs=1)
    assert shell[0].tolist() == [0, 0, 0]
    assert shell[-1].tolist() == [2, 19, 14]
    assert locations["2"] == [[1, 19, 19]]


def test_an_aimed_patch_holds_a_voxel_that_the_teacher_calls_foreground(
    planned, unlabelled, tmp_path
):
    shape = blosc2.open(unlabelled[0].arrays + ".b2nd").shape[1:]
    soft = np.zeros((2, *shape), dtype=np.uint8)
    soft[1, shape[0] - 2, shape[1] - 3, 2] = 255
    write_soft(soft, tmp_path / "corner.b2nd", patch_size=(12, 16, 32))
    corner = Case("corner", unlabelled[0].arrays, str(tmp_path / "corner.b2nd"))
    for network in NETWORKS:
        source = source_of(planned, network, [], [corner], [0])
        source.transforms = _no_augmentation(source.patch_size)
        for seed in range(20):
            seed_everything(seed)
            _, target = source._sample(corner, aimed=True)
            assert target[2].max() == 1


def _no_augmentation(patch_size):
    def crop(**sample):
        cut = [
            slice((whole - part) // 2, (whole - part) // 2 + part)
            for whole, part in zip(sample["image"].shape[1:], patch_size, strict=True)
        ]
        return {name: tensor[(slice(None), *cut)] for name, tensor in sample.items()}

    return crop
