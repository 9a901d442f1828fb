"""Settings: closed, checked in sentences, and cut into stages that hold nothing of each other."""

import pytest
import yaml

from cotrain.errors import InputError
from cotrain.settings import (
    PAPER,
    InferStage,
    PlanStage,
    Settings,
    TrainStage,
    as_yaml,
    changes_since,
    check,
    load,
    refuse_missing_files,
    refuse_repeated_keys,
)

MINIMUM = {"experiment": "e", "cases": "cases.tsv", "labels": {"organ": 1}}
STAGES = {
    "plan": PlanStage,
    "train_2d": TrainStage,
    "train_3d": TrainStage,
    "train_last": TrainStage,
    "infer": InferStage,
}


def changed_stages(**changes):
    """Return the stages whose settings file has other text after the change."""
    before, after = check(MINIMUM).stages(), check(MINIMUM | changes).stages()
    return {name for name in before if as_yaml(before[name]) != as_yaml(after[name])}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"expirement": "e"}, "unknown setting `expirement`; did you mean `experiment`."),
        (
            {"cotraining": {"sampling": {"share_strat": 0.1}}},
            "unknown setting `cotraining.sampling.share_strat`; did you mean `share_start`.",
        ),
        ({"audit": {"x": 1}}, "unknown setting `audit.x`; known keys: max_cases"),
        ({"training_2d": {"learning_rate": 0}}, "`training_2d.learning_rate` is 0: "),
        (
            {"experiment": "a b"},
            "`experiment` is 'a b': write letters, digits, `_` and `-`, a letter",
        ),
        ({"experiment": 2024}, "`experiment` is 2024: write a word, in quotes where it looks like"),
        ({"channels": "MRI"}, "`channels` is 'MRI': write a list, such as [a, b]"),
        ({"labels": ["a", "b"]}, "`labels` is ['a', 'b']: write `name: value` for each"),
        ({"labels": {1: "organ"}}, "`labels` has the name 1; write `name: value`"),
        ({"network_2d": None}, "`network_2d` is None: write its settings below it, indented"),
        (
            {"network_3d": {"patch_size": [64, 64]}},
            "`network_3d.patch_size` has too few numbers; give one for each axis",
        ),
        (
            {"epochs_per_round": 10},
            "did you mean `training_2d.epochs_per_round` or `training_3d.epochs_per_round`",
        ),
        ({"labels": {"a": 1, "b": 3}}, "labels are {'a': 1, 'b': 3}, wanted the values 1, 2, 3"),
        ({"labels": {"a": 0, "b": 1}}, "labels are {'a': 0, 'b': 1}, wanted the values 1, 2, 3"),
        ({"labels": {}}, "labels is empty; name each label"),
        ({"labels": {"organ": 1, "ignore": 2}}, "labels lists ignore, which nnU-Net keeps"),
        ({"labels": {"background": 0, "organ": 1}}, "labels lists background, which nnU-Net keeps"),
        ({"labels": {"a": 1, "b": 1}}, "labels are {'a': 1, 'b': 1}, wanted the values 1, 2, 3"),
        ({"recipe": "paper", "cotraining": 3}, "`cotraining` is 3: "),
        (
            {"inference": {"mirroring": True}, "training_3d": {"mirroring": False}},
            "with training_3d.mirroring: false the network never learns from any",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(content, sentence):
    with pytest.raises(InputError) as caught:
        check(MINIMUM | content)
    assert sentence in str(caught.value)


def test_a_missing_setting_is_named():
    with pytest.raises(InputError, match=r"config: the setting `cases` is missing; add it\."):
        check({"experiment": "e", "labels": {"organ": 1}})


def test_every_problem_is_told_at_once():
    with pytest.raises(InputError) as caught:
        check({"experiment": "e", "labels": {"organ": 1}, "seed": -1})
    assert "`cases`" in str(caught.value)
    assert "`seed` is -1" in str(caught.value)


def test_the_papers_recipe_fills_in_what_was_not_given():
    settings = check(MINIMUM | {"recipe": "paper", "cotraining": {"schedule_rounds": 5}})
    cotraining = settings.cotraining.model_dump()
    assert cotraining["schedule_rounds"] == 5
    for name, value in PAPER.items():
        if name != "sampling":
            assert cotraining[name] == value
    assert cotraining["sampling"]["mode"] == "learning_rate"


@pytest.mark.parametrize(
    ("cotraining", "sentence"),
    [
        ({"teacher": "mean"}, "recipe: paper sets cotraining.teacher to other, but mean was given"),
        (
            {"sampling": {"mode": "ramp"}},
            "recipe: paper sets cotraining.sampling.mode to learning_rate, but ramp was given",
        ),
    ],
)
def test_a_setting_against_the_papers_recipe_is_refused(cotraining, sentence):
    with pytest.raises(InputError, match=sentence):
        check(MINIMUM | {"recipe": "paper", "cotraining": cotraining})


def test_a_setting_that_agrees_with_the_papers_recipe_is_accepted():
    agreed = {"teacher": "other", "sampling": {"mode": "learning_rate"}}
    plain = check(MINIMUM | {"recipe": "paper"})
    assert check(MINIMUM | {"recipe": "paper", "cotraining": agreed}) == plain


def test_a_network_cannot_teach_itself_before_it_was_trained():
    with pytest.raises(InputError, match="set first_teacher to both_labels_only"):
        check(MINIMUM | {"cotraining": {"teacher": "self", "first_teacher": "2d"}})
    assert check(MINIMUM | {"cotraining": {"teacher": "self"}}).cotraining.teacher == "self"


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ({}, "network_3d.batch_size is not given; give a multiple of 2"),
        ({"network_3d": {"batch_size": 3}}, "network_3d.batch_size is 3; give a multiple of 2"),
        (
            {"network_3d": {"batch_size": 2}, "network_2d": {"batch_size": 9}},
            "network_2d.batch_size is 9",
        ),
    ],
)
def test_a_batch_that_gpus_cannot_divide_is_refused(batches, sentence):
    compute = {"gpus_per_training": 2}
    with pytest.raises(InputError, match=sentence):
        check(MINIMUM | {"compute": compute} | batches)
    divided = {"compute": compute, "network_3d": {"batch_size": 4}}
    stages = check(MINIMUM | divided).stages()
    # More GPUs for training infer nothing again.
    assert stages["train_3d"].compute.gpus_per_training == 2
    assert stages["infer"].compute.gpus_per_training == 1


@pytest.mark.parametrize(
    ("network_3d", "sentence"),
    [
        ({"architecture": "a.py:A", "features_per_stage": [4]}, "belongs to nnU-Net's own"),
        ({"arguments": {"width": 3}}, "network_3d.architecture, which is not given"),
        ({"architecture": "monai.networks.nets.SegResNet"}, "network_3d.architecture"),
    ],
)
def test_a_network_of_ones_own_is_a_file_and_a_class(network_3d, sentence):
    with pytest.raises(InputError, match=sentence):
        check(MINIMUM | {"network_3d": network_3d})


@pytest.mark.parametrize("more", [{}, {"recipe": "paper"}, {"data_folder": "/data", "seed": 3}])
def test_settings_written_as_yaml_read_back_the_same(more, tmp_path):
    settings = check(MINIMUM | more)
    (tmp_path / "settings.yaml").write_text(as_yaml(settings))
    assert load(tmp_path / "settings.yaml") == settings
    for name, stage in settings.stages().items():
        (tmp_path / "stage.yaml").write_text(as_yaml(stage))
        assert load(tmp_path / "stage.yaml", model=STAGES[name]) == stage


def test_a_rate_in_yamls_scientific_notation_is_a_number():
    # YAML 1.1 takes 1e-3 for text.
    content = yaml.safe_load("training_2d: {learning_rate: 1e-3}")
    assert check(MINIMUM | content).training_2d.learning_rate == 0.001


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"audit": {"max_cases": 3}}, set()),
        ({"rounds": 9}, {"train_last"}),
        ({"shards": 4}, set()),
        ({"pool": "transductive"}, set()),
        ({"review": "review.tsv"}, set()),
        ({"data_folder": "/elsewhere"}, set()),
        ({"network_2d": {"weights": "random"}}, set()),
        ({"inference": {"mirroring": True}}, {"infer"}),
        ({"training_2d": {"warmup_epochs": 7}}, {"train_2d"}),
        ({"training_3d": {"weight_decay": 0}}, {"train_3d", "train_last"}),
        ({"training_3d": {"mirroring": False}}, {"train_3d", "train_last"}),
        ({"cotraining": {"ema_decay": 0}}, {"train_2d", "train_3d", "train_last"}),
        ({"cotraining": {"last_epochs": 3}}, {"train_last"}),
        (
            {"compute": {"precision": "fp32"}},
            {"train_2d", "train_3d", "train_last", "infer"},
        ),
        ({"network_2d": {"batch_size": 3}}, {"plan"}),
        ({"network_3d": {"batch_size": 3}}, {"plan"}),
        ({"labels": {"other": 1}}, {"plan"}),
    ],
)
def test_a_changed_setting_changes_the_files_of_its_own_stages_only(changes, stages):
    assert changed_stages(**changes) == stages


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"compute": {"device": "cuda", "precision": "fp32"}, "shards": 3}, []),
        ({"seed": 1}, ["`seed` is 1, was 0"]),
        (
            {"training_2d": {"warmup_epochs": 7}, "rounds": 4},
            ["`training_2d.warmup_epochs` is 7, was 100", "`rounds` is 4, was 3"],
        ),
        ({"inference": {"tile_step_size": 0.7}}, ["`inference.tile_step_size` is 0.7, was 0.5"]),
        (
            {"labels": {"tumour": 1}},
            ["`labels.organ` is not there, was 1", "`labels.tumour` is 1, was not there"],
        ),
    ],
)
def test_what_differs_from_the_settings_of_the_results_is_told(changes, told, tmp_path):
    for stage, section in check(MINIMUM).stages().items():
        (tmp_path / f"{stage}.yaml").write_text(as_yaml(section))
    assert changes_since(check(MINIMUM | changes), tmp_path) == told


def test_nothing_differs_from_results_that_are_not_there(tmp_path):
    assert changes_since(check(MINIMUM | {"seed": 1}), tmp_path) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3\n", "has `a` twice, in the lines 1 and 3"),
        ("s:\n  a: 1\n  a: 3\n", "has `a` twice, in the lines 2 and 3"),
        ("l: [{a: 1, a: 2}]\n", "has `a` twice, in the lines 1 and 1"),
        ("s: {a: 1}\nt: {a: 1}\n", None),
        ("# nothing\n", None),
        ('{\n\t"a": 1\n}\n', None),
        ("x: &x {a: 1}\ny: &y {b: 1}\ns:\n  <<: *x\n  <<: *y\n", None),
    ],
)
def test_a_key_that_stands_twice_is_refused(text, sentence, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    if sentence is None:
        refuse_repeated_keys(path)
        return
    with pytest.raises(InputError, match=sentence):
        refuse_repeated_keys(path)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"network_3d": {"architecture": "my.py:Net"}}, "network_3d.architecture"),
        ({"network_2d": {"weights": "my.py"}}, "network_2d.weights"),
    ],
)
def test_a_file_that_the_settings_name_must_be_there(changes, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = check(MINIMUM | changes)
    with pytest.raises(InputError, match=rf"my.yaml: `{key}` names the file my.py, which does not"):
        refuse_missing_files(settings, source="my.yaml")
    (tmp_path / "my.py").touch()
    refuse_missing_files(settings, source="my.yaml")


def test_settings_cannot_be_changed_after_the_check():
    settings = check(MINIMUM)
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 1


def test_every_setting_is_described():
    def undescribed(model, prefix=""):
        for name, field in model.model_fields.items():
            annotation = field.annotation
            if hasattr(annotation, "model_fields"):
                yield from undescribed(annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undescribed(Settings)) == []
