"""The accuracy benchmark: which cases each labelled set has, and how the methods stand by hand."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from cotrain.errors import InputError
from cotrain.files import read_table, write_table
from cotrain.nnunet import Planned
from cotrain.schedule import Schedule
from cotrain.summary import read_evaluations

CLONE = Path(__file__).parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, CLONE / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def accuracy():
    return script("accuracy")


@pytest.fixture
def cases():
    splits = ["labelled", "unlabelled", "labelled", "unlabelled", "unlabelled", "test"]
    rows = [(f"c{n}", f"c{n}.nii", f"l{n}.nii", split) for n, split in enumerate(splits)]
    table = pd.DataFrame(rows, columns=["case", "image", "label", "split"])
    return table.sample(frac=1, random_state=0)


@pytest.mark.parametrize(
    ("labelled", "block", "expected"), [(2, 0, "c0 c1"), (2, 1, "c2 c3"), (1, 1, "c1")]
)
def test_a_set_is_a_block_of_the_cases_in_order(accuracy, cases, labelled, block, expected):
    table = accuracy.labelled_block(cases, labelled=labelled, block=block)
    assert " ".join(table[table["split"] == "labelled"]["case"]) == expected
    assert table[table["split"] == "test"]["case"].tolist() == ["c5"]
    assert len(table) == 6


def test_a_set_that_is_not_there_is_refused(accuracy, cases):
    with pytest.raises(InputError, match=r"needs 6 cases .* but there are 5"):
        accuracy.labelled_block(cases, labelled=2, block=2)


def test_the_upper_bound_keeps_the_test_cases_apart(accuracy, cases):
    table = accuracy.all_labelled(cases).set_index("case")["split"]
    assert table.to_dict() == {
        **dict.fromkeys(("c0", "c1", "c2", "c3"), "labelled"),
        "c4": "unlabelled",
        "c5": "test",
    }


def test_the_upper_bound_is_trained_once_for_all_numbers_of_labels(accuracy, tmp_path, monkeypatch):
    monkeypatch.chdir(CLONE)
    table, settings = accuracy.experiments_of(
        "left_atrium", [(4, 0), (8, 0)], ["2d_first", "full"], tmp_path
    )
    assert len(settings) == 4
    assert settings[4, 0, "full"] == settings[8, 0, "full"]
    assert read_table(table)["experiment"].tolist() == [
        "accuracy_left_atrium_4_set0_2d_first",
        "accuracy_left_atrium_all_set0_full",
        "accuracy_left_atrium_8_set0_2d_first",
    ]


@pytest.mark.parametrize("data", ["left_atrium", "hippocampus"])
def test_all_experiments_are_valid_settings_on_the_same_cases_and_seed(
    accuracy, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(CLONE)
    names = list(accuracy.EXPERIMENTS)
    _, both = accuracy.experiments_of(data, [(4, 0), (4, 1)], names, tmp_path)
    settings = {experiment: each for (_, block, experiment), each in both.items() if block}
    assert {each.seed for each in settings.values()} == {1}
    tables = {name: str(each.cases) for name, each in settings.items()}
    full = tables.pop("full")
    (same,) = set(tables.values())
    labelled = {
        path: read_table(path).query("split == 'labelled'")["case"].tolist()
        for path in (full, same)
    }
    assert len(labelled[same]) == 4
    assert len(labelled[full]) > 40
    assert set(labelled[same]) <= set(labelled[full])


@pytest.mark.parametrize("data", ["left_atrium", "hippocampus"])
def test_3d_has_as_many_epochs_as_in_2d_first_but_where_a_method_has_more(
    accuracy, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(CLONE)
    _, settings = accuracy.experiments_of(data, [(4, 0)], list(accuracy.EXPERIMENTS), tmp_path)
    epochs = {}
    for (_, _, name), each in settings.items():
        stage = each.stages()["train_last"]
        schedule = Schedule("3d", stage.training, stage.cotraining, stage.last_round)
        epochs[name] = schedule.window(accuracy.last_round_of(each)).stop
    timed = ("long_3d", "longer_3d", "self", "labels_first")
    long, longer, alone, labels_first = (epochs.pop(name) for name in timed)
    assert max(epochs.values()) - min(epochs.values()) <= 2
    share = accuracy.DATA[data].share_of_3d
    assert long == pytest.approx(epochs["2d_first"] / share, abs=2)
    # The first teacher has had all epochs; the rest of the time is for its masks and their rounds.
    assert epochs["2d_first"] < alone < long
    assert labels_first == alone
    # What co-training computes beside 3D takes as long in either order.
    assert longer - labels_first == pytest.approx(long - epochs["2d_first"], abs=2)


def test_every_method_belongs_to_an_experiment_that_can_be_run(accuracy):
    runnable = {*accuracy.EXPERIMENTS, *accuracy.PEERS}
    assert {method.experiment for method in accuracy.METHODS} == runnable


@pytest.fixture
def stored():
    """Two sets of two test cases; co-trained beats labels only by 2 and 4 points."""
    rows = []
    for experiment, arm, dice in (
        ("2d_first", "labels_only", [[0.70, 0.80], [0.60, 0.80]]),
        ("2d_first", "cotrain", [[0.74, 0.80], [0.66, 0.82]]),
        ("full", "labels_only", [[0.80, 0.82], [0.78, 0.84]]),
    ):
        for number, cases in enumerate(dice):
            rows += [
                {
                    **{"experiment": experiment, "arm": arm, "network": "3d", "back": 0},
                    **{"set": number},
                    **{"case": case, "dice": each, "jaccard": 0.5, "hd95_mm": 3, "asd_mm": 1},
                    "minutes": 10,
                    "precision": "bf16",
                }
                for case, each in enumerate(cases)
            ]
    return pd.DataFrame(rows)


def test_gain_gap_and_worst_case_by_hand(accuracy, stored):
    standings = accuracy.standings_of(stored)
    assert [standing.method.words for standing in standings] == [
        "3D, labels only, in the epochs of 2D first",
        "3D, co-trained, 2D first",
        "3D, all labels",
    ]
    lines = accuracy.table_of(standings)
    assert lines[2].startswith(
        "| 3D, labels only, in the epochs of 2D first | 0 1 | 72.5 ± 3.5 | 65.0 ± 7.1 |"
    )
    # Sets 77.0 and 74.0, gains 2 and 4.
    assert lines[3].startswith(
        "| 3D, co-trained, 2D first | 0 1 | 75.5 ± 2.1 | 70.0 ± 5.7 | 50.0 ± 0.0 | 3.00 ± 0.00 | "
    )
    # (75.5 - 72.5) / (81 - 72.5)
    assert lines[3].endswith("| +3.0 | 35 % | 10 in bf16 |")
    # All labels are paired with no set: 81 - 72.5.
    assert lines[4].endswith("| +8.5 |  | 10 in bf16 |")


def test_products_are_held_against_what_labels_alone_give(accuracy, stored):
    lines = accuracy.bar_of(accuracy.standings_of(stored), chosen_on=(0,))
    # Worst cases: 74 - 70 and 66 - 60.
    (line,) = lines[2:]
    assert line.startswith(
        "| 3D, co-trained, 2D first | 3D, labels only, in the epochs of 2D first |"
    )
    assert line.endswith(" | 0 1 | +3.0 | +4.0 | +5.0 |")


def test_labels_first_is_held_against_2d_first_and_not_the_other_way_around(accuracy, stored):
    longer = stored[stored["experiment"] == "2d_first"].assign(experiment="labels_first")
    longer.loc[longer["arm"] == "cotrain", "dice"] += 0.01
    lines = accuracy.bar_of(accuracy.standings_of(pd.concat([stored, longer])), chosen_on=(0,))
    both = [line for line in lines if "labels first |" in line and "2D first |" in line]
    (line,) = [line for line in both if "labels only" not in line]
    assert line.startswith(
        "| 3D, co-trained, labels first | 3D, co-trained, 2D first | 0 1 | +1.0 |"
    )


def test_an_interval_needs_three_sets_and_shows_on_which_side_of_zero_it_ends(accuracy):
    zero = pd.Series([0.0, 0.0, 0.0])
    # t(2) = 4.303; standard errors 1 / sqrt(3) and 0.4 / sqrt(3): 2 +- 2.484 and 1 +- 0.994.
    assert accuracy._gain(pd.Series([1.0, 2.0, 3.0]), zero) == "+2.0 (-0.5 to +4.5)"
    assert accuracy._gain(pd.Series([0.6, 1.0, 1.4]), zero) == "**+1.0 (+0.01 to +1.99)**"
    assert accuracy._gain(pd.Series([1.0, 2.0]), zero) == "+1.5"
    assert accuracy._gain(pd.Series([-0.03, 0.01]), zero) == "+0.0"


def test_what_each_number_of_labels_gains_in_either_order_is_put_side_by_side(accuracy, stored):
    # Labels first has a control of its own, of more epochs.
    longer = stored[stored["experiment"] == "2d_first"].assign(experiment="labels_first")
    longer.loc[longer["arm"] == "labels_only", "dice"] = [0.73, 0.78, 0.66, 0.78]
    # The mean of both, co-trained, and its control on the first set alone.
    means = stored[stored["experiment"] == "2d_first"].assign(network="mean")
    means = means[(means["arm"] == "cotrain") | (means["set"] == 0)]
    few = accuracy.standings_of(pd.concat([stored, means]))
    # 3D that teaches itself has the epochs of labels first, and no 2D.
    alone = longer[longer["arm"] == "cotrain"].assign(experiment="self")
    standings = accuracy.standings_of(pd.concat([stored, longer, alone.iloc[:2]]))
    assert accuracy.numbers_of({1: few, 2: few[:1], 4: standings})[2:] == [
        "| 1 | 2D first | 0 | 75.0 | 77.0 | +2.0 | 75.0 | 77.0 | +2.0 |",
        "| 4 | labels first | 0 1 | 73.8 ± 2.5 | 75.5 ± 2.1 | +1.8 |  |  |  |",
        "| 4 | 2D first | 0 1 | 72.5 ± 3.5 | 75.5 ± 2.1 | +3.0 |  |  |  |",
        "| 4 | no 2D, 3D teaches itself | 0 | 75.5 | 77.0 | +1.5 |  |  |  |",
    ]


def test_a_report_holds_every_number_of_labels_against_the_one_bound(
    accuracy, stored, tmp_path, monkeypatch
):
    stored = stored.assign(data="left_atrium", labelled=4)
    few = stored[stored["experiment"] == "2d_first"].assign(labelled=1)
    stored["labelled"] = stored["labelled"].where(stored["experiment"] != "full", "all")
    # A CPU of another kind trained one of the sets.
    few.loc[few["set"] == 1, ["minutes", "precision"]] = 30, "fp32"
    masks = {"data": "left_atrium", "labelled": 4, "set": 0, "experiment": "2d_first", "round": 1}
    masks |= {"masks": "of 3d", "true_dice": 0.8, "confidence": 0.9, "confidence_tells": 0.5}
    masks |= {"agreement": "", "agreement_tells": ""}
    write_table(pd.concat([stored, few]).astype(str), tmp_path / "accuracy.tsv")
    write_table(pd.DataFrame([masks]).astype(str), tmp_path / "masks.tsv")
    page = tmp_path / "docs" / "accuracy.md"
    page.parent.mkdir()
    page.write_text("prose\n<!-- table left_atrium_1 -->\nold\n<!-- end -->\nmore prose\n")
    monkeypatch.setattr(accuracy, "CLONE", tmp_path)
    monkeypatch.setattr(accuracy, "STORED", tmp_path / "accuracy.tsv")
    monkeypatch.setattr(accuracy, "STORED_MASKS", tmp_path / "masks.tsv")
    accuracy.report(SimpleNamespace())
    assert page.read_text().splitlines() == [
        "prose",
        "<!-- table left_atrium_1 -->",
        "| method | sets | Dice % | minutes | 3D, co-trained, 2D first, is above it by |",
        "|---|---|---|---|---|",
        "| 3D, labels only, in the epochs of 2D first | 0 1 | 72.5 ± 3.5 | 10 in bf16, 30 in fp32 "
        "| +3.0 |",
        "| **3D, co-trained, 2D first** | 0 1 | 75.5 ± 2.1 | 10 in bf16, 30 in fp32 |  |",
        "| 3D, all labels | 0 1 | 81.0 ± 0.0 | 10 in bf16 |  |",
        "<!-- end -->",
        "more prose",
    ]
    lines = (tmp_path / "docs" / "accuracy_tables.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("##")] == [
        "## Left atrium, by number of labelled cases",
        "## Left atrium, 1 labelled",
        "## Left atrium, 4 labelled",
    ]
    assert sum(line.startswith("| 3D, all labels | 0 1 | 81.0") for line in lines) == 2
    assert "| 2d_first | 1 | of 3D | 0 | 80.0 | 90.0 |  | 0.50 |  |" in lines
    for picture in ("accuracy.png", "accuracy_by_number.png"):
        assert (tmp_path / "docs" / picture).is_file()
    page.write_text("<!-- table left_atrium_2 -->\n<!-- end -->\n")
    with pytest.raises(InputError, match="wants a table 'left_atrium_2'"):
        accuracy.report(SimpleNamespace())
    page.write_text("<!-- table left_atrium_1 -->\n<!-- table left_atrium_4 -->\n<!-- end -->\n")
    with pytest.raises(InputError, match="has table, table, end; put back"):
        accuracy.report(SimpleNamespace())


def test_masks_are_judged_by_the_truth_of_unlabelled_cases(accuracy, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "CLONE", tmp_path)
    own = SimpleNamespace(experiment="2d_first", labels={"atrium": 1})
    folder = tmp_path / "results" / "2d_first"
    made = folder / "cotrain" / "round-01" / "pseudo_2d"
    made.mkdir(parents=True)
    for path, voxels in (("truth.nii.gz", 4), (made / "c1.nii.gz", 2), (made / "c2.nii.gz", 4)):
        label = np.zeros((4, 4, 4), dtype=np.uint8)
        label[0, 0, :voxels] = 1
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / path)
    cases = pd.DataFrame({"case": ["c1", "c2"], "label": str(tmp_path / "truth.nii.gz")})
    write_table(cases, folder / "cases" / "unlabelled.tsv")
    masks = pd.DataFrame(
        {"case": ["c1", "c2"], "mask": ["c1.nii.gz", "c2.nii.gz"], "confidence": ["0.8", "0.9"]}
    )
    write_table(masks, made / "manifest-0.tsv")
    # The other network's mask of c1 is the truth, that of c2 half of it.
    of_3d = made.with_name("pseudo_3d")
    swapped = masks.assign(mask=["../pseudo_2d/c2.nii.gz", "../pseudo_2d/c1.nii.gz"])
    write_table(swapped, of_3d / "manifest-0.tsv")
    audit = pd.DataFrame({"truth_dice": ["0.5", "0.7"], "confidence": ["0.8", "0.8"]})
    write_table(audit, folder / "cotrain" / "round-01" / "audit" / "train_3d.tsv")
    names = ["round", "masks", "true_dice", "confidence", "agreement"]
    names += ["confidence_tells", "agreement_tells"]
    rows = [
        # All are as confident: there is nothing to tell.
        ["1", "for 3d", "0.60000", "0.80000", "", "", ""],
        # Dice of c1 2 * 2 / (2 + 4), of c2 1; of the two networks' masks 2 / 3 for either case.
        ["1", "of 2d", "0.83333", "0.85000", "0.66667", "1.000", ""],
        ["1", "of 3d", "0.83333", "0.85000", "0.66667", "-1.000", ""],
    ]
    assert accuracy.mask_qualities(own) == [dict(zip(names, row, strict=True)) for row in rows]


def test_minutes_are_those_of_what_the_judged_round_needed(accuracy, tmp_path):
    steps = {
        **{"cotrain/round-00/train_2d/provenance": 60, "cotrain/round-00/train_3d/provenance": 120},
        **{
            "cotrain/round-00/pseudo_2d/provenance-0": 6,
            "cotrain/round-02/train_3d/provenance": 600,
        },
        **{
            "cotrain/round-01/train_3d/provenance": 30,
            "cotrain/round-01/pseudo_3d/provenance-0": 9,
        },
        **{"labels_only/round-00/train_3d/provenance": 100},
        "cotrain/round-01/teacher_3d/provenance-0": 3,
    }
    for step, seconds in steps.items():
        path = tmp_path / f"{step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Masks are made in another precision than networks are trained in.
        precision = "fp32" if "train" in step else "bf16"
        path.write_text(json.dumps({"cpu_seconds": seconds, "precision": precision}))
    ours = SimpleNamespace(arm="cotrain", network="3d")
    assert accuracy.cost_of(tmp_path, ours, last=1) == ((60 + 120 + 6 + 33) / 60, "fp32")
    assert accuracy.cost_of(tmp_path, ours, last=0) == (3, "fp32")
    control = SimpleNamespace(arm="labels_only", network="mean")
    # 2D of round 00 was taught by nobody in either arm, and is trained once.
    assert accuracy.cost_of(tmp_path, control, last=0) == (160 / 60, "fp32")


def test_sets_that_only_one_method_has_are_not_compared(accuracy, stored):
    only = stored[(stored["set"] == 0) | (stored["experiment"] == "2d_first")]
    bound = accuracy.table_of(accuracy.standings_of(only))[4]
    assert bound.startswith("| 3D, all labels | 0 | 81.0 |")
    assert "| +8.5 |" in bound
    # The bound is the same cases in each set: (75.5 - 72.5) / (81 - 72.5).
    assert "| 35 % |" in accuracy.table_of(accuracy.standings_of(only))[3]


def test_a_peer_learns_labels_in_full_and_targets_by_a_weight_that_rises():
    peers = script("peers")
    loss = peers.Mixed(
        lambda scales, target: 10 * (scales[0] - target).abs().sum() + len(scales),
        lambda logits, target: (logits - target).abs().sum(),
    )
    fine, coarse = torch.tensor([[[1.0]], [[2.0]], [[4.0]]]), torch.zeros(3, 1, 1)
    loss.labelled, loss.weight = 1, 0.5
    # Labelled: 10 x |1 - 0| at two scales; unlabelled: (|2 - 0| + |4 - 1|) / 2 at the finest.
    assert loss([fine, coarse], torch.tensor([[[0.0]], [[0.0]], [[1.0]]])) == 12 + 2.5
    loss.labelled = 3
    assert loss(fine, fine) == 1
    assert peers.ramp(1) == peers.WEIGHT
    assert peers.ramp(0) == pytest.approx(0.2 * 0.006738, rel=1e-3)


def test_two_networks_that_teach_each_other_start_apart(tiny):
    peers = script("peers")
    planned = Planned.read(tiny.preprocessed)
    trainer = peers.CrossPseudo(planned, "3d", tiny.settings.stages()["train_3d"])
    trainer.begin(None)
    pairs = zip(trainer.network.parameters(), trainer.partner.network.parameters(), strict=True)
    assert any(not torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("peer", ["mean_teacher", "cross_pseudo"])
def test_a_peer_learns_without_any_mask_on_disk_and_is_scored(peer, tiny, tmp_path, monkeypatch):
    experiment = tmp_path / "results" / "2d_first"
    (experiment / "cases").mkdir(parents=True)
    (experiment / "preprocessed").symlink_to(tiny.preprocessed)
    for split, table in tiny.tables.items():
        (experiment / "cases" / f"{split}.tsv").symlink_to(table)
    (experiment / "settings").mkdir()
    for stage in ("train_3d", "infer"):
        tiny.stage(stage, experiment / "settings")
    scores = tmp_path / "evaluation" / "cotrain_3d_round-02.tsv"
    of_mean = (
        [tmp_path / "evaluation" / "cotrain_mean_round-02.tsv"] if peer == "cross_pseudo" else []
    )
    words = ["peers.py", "--peer", peer, "--experiment", experiment, "--epochs", "16"]
    words += ["--scores-of-mean", *of_mean] if of_mean else []
    words += ["--labels", "shell=1", "core=2", "--scores", scores, "--out-dir", tmp_path / "peer"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    assert script("peers").main() == 0
    for made in read_evaluations([scores, *of_mean]).values():
        assert len(made) == 2
        # Far from good after 128 batches, but a network that has learnt.
        assert made["dice"].mean() > 0.5
    assert float((tmp_path / "peer" / "minutes.txt").read_text()) > 0
