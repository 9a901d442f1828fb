"""Plans: nnU-Net's 3D network narrowed, the 2D network beside it, and arrays that fit the plans."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from cotrain.errors import InputError
from cotrain.nnunet import Planned, make_importable
from cotrain.plan import (
    check_network_3d,
    check_planner,
    configuration_2d,
    dataset_description,
    narrowed_3d,
    plan,
    replaced_3d,
)
from cotrain.settings import Network2D, Network3D, PlanStage

PLANNED = {
    "patch_size": [20, 64, 48],
    "batch_size": 2,
    "median_image_size_in_voxels": [18.0, 70.0, 41.0],
    "architecture": {
        "arch_kwargs": {
            "n_stages": 4,
            "features_per_stage": [32, 64, 128, 256],
            "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [2, 2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2, 2],
        }
    },
}


def test_without_settings_nnunets_plan_stays_as_it_is():
    assert narrowed_3d(PLANNED, Network3D()) == PLANNED


def test_fewer_features_cut_the_deepest_stages_off():
    narrow = narrowed_3d(PLANNED, Network3D(features_per_stage=(8, 16, 32)))
    assert narrow["architecture"]["arch_kwargs"] == {
        "n_stages": 3,
        "features_per_stage": [8, 16, 32],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
    }
    assert PLANNED["architecture"]["arch_kwargs"]["n_stages"] == 4


def test_a_residual_encoder_loses_its_deepest_blocks():
    residual = json.loads(json.dumps(PLANNED))
    keywords = residual["architecture"]["arch_kwargs"]
    del keywords["n_conv_per_stage"]
    keywords |= {"n_blocks_per_stage": [1, 3, 4, 6], "n_conv_per_stage_decoder": [1, 1, 1]}
    narrow = narrowed_3d(residual, Network3D(features_per_stage=(8, 16)))
    keywords = narrow["architecture"]["arch_kwargs"]
    assert keywords["n_blocks_per_stage"] == [1, 3]
    assert keywords["n_conv_per_stage_decoder"] == [1]
    assert "n_conv_per_stage" not in keywords


def test_patch_and_batch_are_those_of_the_settings():
    narrow = narrowed_3d(PLANNED, Network3D(patch_size=(16, 32, 40), batch_size=5))
    assert (narrow["patch_size"], narrow["batch_size"]) == ([16, 32, 40], 5)


def test_more_stages_than_planned_are_refused():
    with pytest.raises(InputError, match="has 5 stages, nnU-Net planned 4"):
        narrowed_3d(PLANNED, Network3D(features_per_stage=(8, 16, 32, 64, 64)))


def test_a_patch_that_cannot_be_halved_is_refused_with_what_divides_it():
    # Strides multiply to 4, 8, 8 over four stages, and to 1, 2, 2 over two.
    with pytest.raises(InputError, match=r"\[18, 64, 48\] cannot be divided by \[4, 8, 8\]"):
        narrowed_3d(PLANNED, Network3D(patch_size=(18, 64, 48)))
    two = Network3D(patch_size=(17, 62, 46), features_per_stage=(8, 16))
    assert narrowed_3d(PLANNED, two)["patch_size"] == [17, 62, 46]
    with pytest.raises(InputError, match=r"cannot be divided by \[1, 2, 2\]"):
        narrowed_3d(PLANNED, Network3D(patch_size=(17, 62, 45), features_per_stage=(8, 16)))


@pytest.mark.parametrize(
    ("median", "patch"),
    [([18.0, 70.0, 41.0], [96, 64]), ([9, 64, 32], [64, 32]), ([200, 513, 900], [512, 512])],
)
def test_a_slice_is_the_median_case_in_plane_in_steps_of_32(median, patch):
    plans = {"configurations": {"3d_fullres": {"median_image_size_in_voxels": median}}}
    assert configuration_2d(plans, Network2D())["patch_size"] == patch
    asked = configuration_2d(plans, Network2D(patch_size=(48, 80)))
    assert asked["patch_size"] == [48, 80]


def test_both_networks_share_the_grid(tiny):
    planned = Planned.read(tiny.preprocessed)
    flat, full = planned.configuration("2d"), planned.configuration("3d")
    assert flat.spacing == full.spacing == [2.0, 1.0, 1.0]
    assert flat.data_identifier == full.data_identifier
    assert (list(flat.patch_size), list(full.patch_size)) == ([32, 32], [12, 16, 32])
    assert (planned.class_count, planned.channel_count) == (3, 1)
    assert planned.has_deep_supervision("3d")
    assert not planned.has_deep_supervision("2d")


EXAMPLE = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", EXAMPLE, re.DOTALL)[1]


@pytest.fixture
def replaced(tiny, tmp_path):
    """Return a function that puts the documentation's network into the tiny experiment's plans."""

    def make(name: str = "ten_lines.py:TwoLayers", *, code: str = EXAMPLE, **settings):
        (tmp_path / name.partition(":")[0]).write_text(code)
        wanted = Network3D(architecture=f"{tmp_path / name}", **settings)
        plans = json.loads((tiny.preprocessed / "plans.json").read_text())
        whole = plans["configurations"]["3d_fullres"]
        plans["configurations"]["3d_fullres"] = replaced_3d(whole, wanted, tmp_path / "plans")
        make_importable(tmp_path / "plans", plans)
        planned = Planned(plans, Planned.read(tiny.preprocessed).dataset)
        check_network_3d(planned, wanted)
        return planned

    yield make
    sys.path[:] = [each for each in sys.path if not each.startswith(str(tmp_path))]
    for name in ("ten_lines", "one_logit", "misspelt"):
        sys.modules.pop(name, None)


def test_the_documentations_own_network_is_built_from_its_file_beside_the_plans(replaced):
    planned = replaced(arguments={"width": 5}, batch_size=3)
    network = planned.build_network("3d", deep_supervision=False)
    assert network.layers[0].out_channels == 5
    assert planned.configuration("3d").batch_size == 3
    assert not planned.has_deep_supervision("3d")
    first = planned.plans["configurations"]["3d_fullres"]["architecture"]["file_sha256"]
    again = replaced(code=EXAMPLE)
    assert again.plans["configurations"]["3d_fullres"]["architecture"]["file_sha256"] == first


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("json.py:TwoLayers", {}, "has the name of another module"),
        ("ten-lines.py:TwoLayers", {}, "that Python cannot import"),
        ("ten_lines.py:TwoLayers", {"code": "import nowhere_to_be_found"}, "nowhere_to_be_found"),
        ("ten_lines.py:TwoLayers", {"arguments": {"height": 3}}, "does not work: .*height"),
        ("misspelt.py:ThreeLayers", {}, "does not work"),
        (
            "one_logit.py:TwoLayers",
            {"code": EXAMPLE.replace("width, num_classes", "width, 1")},
            "gives .*1, 1, 12, 16, 32.*, wanted a tensor of .*1, 3, 12, 16, 32",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused_in_planning(replaced, name, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        replaced(name, **changes)


def test_a_network_file_changed_beside_the_plans_is_refused(replaced, tmp_path):
    plans = replaced().plans
    (tmp_path / "plans" / "ten_lines.py").write_text(EXAMPLE + "# mended here\n")
    with pytest.raises(InputError, match="was changed after planning"):
        make_importable(tmp_path / "plans", plans)


@pytest.mark.parametrize("size", ["M", "L", "XL"])
def test_nnunets_residual_presets_plan_their_own_network(tiny, size, tmp_path):
    stage = tiny.settings.stages()["plan"]
    network_3d = Network3D(planner=f"nnUNetPlannerResEnc{size}")
    plan(
        stage.model_copy(update={"network_3d": network_3d}),
        tiny.rows("labelled"),
        tmp_path / "planned",
        jobs=1,
    )
    planned = Planned.read(tmp_path / "planned")
    assert planned.plans["experiment_planner_used"] == f"nnUNetPlannerResEnc{size}"
    architecture = planned.configuration("3d").network_arch_class_name
    assert architecture.endswith("ResidualEncoderUNet")


def test_a_planner_that_nnunet_does_not_have_is_refused():
    with pytest.raises(InputError, match="planner is nnUNetPlannerResEncH, which this nnU-Net"):
        check_planner("nnUNetPlannerResEncH")


def test_a_missing_network_file_is_refused(tmp_path):
    wanted = Network3D(architecture=f"{tmp_path}/nowhere.py:Network")
    with pytest.raises(InputError, match=r"nowhere\.py, which does not exist"):
        replaced_3d(PLANNED, wanted, tmp_path)


def test_a_planner_with_another_resampling_is_refused_before_anything_is_trained(tiny, tmp_path):
    stage = tiny.settings.stages()["plan"]
    network_3d = stage.network_3d.model_copy(update={"planner": "nnUNetPlanner_torchres"})
    stage = stage.model_copy(update={"network_3d": network_3d})
    with pytest.raises(InputError, match=r"resample_torch.*take a planner that keeps it"):
        plan(stage, tiny.rows("labelled"), tmp_path / "planned", jobs=1)
    assert not (tmp_path / "planned").exists()


def test_the_axis_of_the_largest_spacing_comes_first(tiny):
    # Files are (X, Y, Z) with 2 mm along X; nnU-Net reads (Z, Y, X) and turns that to (X, Z, Y).
    assert Planned.read(tiny.preprocessed).manager.transpose_forward == [2, 0, 1]


def test_channels_and_labels_are_described_in_nnunets_words():
    stage = PlanStage(
        channels=("CT", "PET"),
        labels={"organ": 1, "tumour": 2},
        network_2d=Network2D(),
        network_3d=Network3D(),
    )
    description = dataset_description(
        stage, [{"case": "a", "image": "/x/ct.nii.gz;/x/pet.nii.gz", "label": "/x/l.nii.gz"}]
    )
    assert description["channel_names"] == {"0": "CT", "1": "PET"}
    assert description["labels"] == {"background": 0, "organ": 1, "tumour": 2}
    assert description["dataset"]["a"]["images"] == ["/x/ct.nii.gz", "/x/pet.nii.gz"]


def test_the_exported_model_names_no_place_of_this_machine_and_no_class_of_ours(
    tiny, trained_3d, cotrain, infer_words, tmp_path
):
    words = infer_words(tiny, "3d", trained_3d.checkpoint, tmp_path / "settings")
    cotrain(
        *("export", "--checkpoint", trained_3d.checkpoint, "--out-dir", tmp_path / "model"),
        *("--trained", trained_3d.folder / "provenance.json"),
        *("--preprocessed", tiny.preprocessed),
        *("--settings", words[words.index("--settings") + 1]),
    )
    (folder,) = (tmp_path / "model").glob("Dataset001_cotrain/*")
    assert folder.name == "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for name in ("dataset.json", "plans.json", "dataset_fingerprint.json"):
        text = (folder / name).read_text()
        assert "/" not in text
        assert "cotrain." not in text
    training = json.loads((tmp_path / "model/provenance.json").read_text())["training"]
    assert (training["labelled"], training["pseudo_labelled"]) == (3, 0)
    assert (folder / "fold_all" / "checkpoint_final.pth").is_file()


# --------------------------------------------------------------------------- preprocessing


@pytest.fixture
def preprocess(tiny, cotrain, tmp_path):
    """Return a function that preprocesses a copy of the labelled cases and returns who was done."""
    shutil.copytree(tiny.preprocessed / "labelled", tmp_path / "labelled")
    for name in ("plans.json", "dataset.json"):
        shutil.copy(tiny.preprocessed / name, tmp_path)

    def run() -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "labelled").glob("*.pkl")}
        cotrain(
            *("preprocess", "--preprocessed", tmp_path, "--cases", tiny.tables["labelled"]),
            *("--out-dir", tmp_path / "labelled", "--with-label"),
        )
        after = {path: path.stat().st_mtime_ns for path in (tmp_path / "labelled").glob("*.pkl")}
        return {path.stem for path in after if after[path] != before.get(path)}

    return run


def change_plans(folder, change):
    plans = json.loads((folder / "plans.json").read_text())
    change(plans["configurations"]["3d_fullres"])
    (folder / "plans.json").write_text(json.dumps(plans))


def test_a_preprocessed_case_is_not_done_again(preprocess, tmp_path):
    change_plans(tmp_path, lambda full: full.update(batch_size=7))
    change_plans(tmp_path, lambda full: full["architecture"]["arch_kwargs"].update(n_stages=1))
    assert preprocess() == set()


def test_changed_plans_preprocess_every_case_again(preprocess, tmp_path):
    change_plans(tmp_path, lambda full: full.update(spacing=[2.5, 1.0, 1.0]))
    assert preprocess() == {"straight", "flipped", "oblique"}
    assert preprocess() == set()


def test_a_case_that_a_kill_left_without_its_last_file_is_done_again(preprocess, tmp_path):
    (tmp_path / "labelled" / "flipped.pkl").unlink()
    (tmp_path / "labelled" / ".writing-node1-7-~flipped_seg.b2nd").write_text("half")
    assert preprocess() == {"flipped"}
    assert list((tmp_path / "labelled").glob(".*")) == []
