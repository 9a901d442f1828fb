"""One contract for every 2D network, and what loading pretrained weights must never do silently."""

import pytest
import timm
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from cotrain.errors import InputError
from cotrain.networks import TimmSegmentationNetwork, takes_lora
from cotrain.training import MovingAverage

LITE0 = {"encoder": "tf_efficientnet_lite0"}
PVT = {"encoder": "pvt_v2_b0"}
VIT = {"encoder": "vit_tiny_patch16_224", "decoder": "DPT"}
DINO = {"encoder": "vit_small_patch16_dinov3", "decoder": "DPT"}
NETWORKS = [LITE0, PVT, VIT, DINO]
ADAPTATIONS = ["full", "lora", "frozen"]


def named(network):
    return network["encoder"]


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    """One thread: these images are so small that two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(network, **options):
    return TimmSegmentationNetwork(2, 3, **network, lora_rank=4, **options)


def must_train(name, adaptation):
    in_encoder = name.startswith("model.encoder.")
    return {"full": True, "lora": "lora_" in name or not in_encoder, "frozen": not in_encoder}[
        adaptation
    ]


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("network", NETWORKS, ids=named)
def test_network_keeps_the_contract(network, adaptation):
    first = build(network, adaptation=adaptation)
    second = build(network, adaptation=adaptation)
    images = torch.randn(2, 2, 35, 50)

    before = {name: tensor.clone() for name, tensor in first.named_buffers()}
    logits = first.train()(images)
    assert logits.shape == (2, 3, 35, 50)
    logits.square().mean().backward()
    for name, parameter in first.named_parameters():
        assert parameter.requires_grad == must_train(name, adaptation), name
        assert (parameter.grad is not None) == must_train(name, adaptation), name
    learning = [parameter for parameter in first.parameters() if parameter.requires_grad]
    assert any(parameter.grad.any() for parameter in learning)
    if adaptation != "full":
        for name, tensor in first.named_buffers():
            assert torch.equal(tensor, before[name]) or not name.startswith("model.encoder."), name

    second.load_state_dict(first.state_dict())
    with torch.inference_mode():
        assert torch.equal(first.eval()(images), second.eval()(images))


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("network", [LITE0, PVT, VIT], ids=named)
def test_loaded_encoder_gives_timms_own_features_of_a_grey_image(network, adaptation):
    options = {"dynamic_img_size": True} if network is VIT else {}
    pretrained = timm.create_model(network["encoder"], **options).eval()
    for name, tensor in pretrained.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_()
    loaded = TimmSegmentationNetwork(1, 3, **network, adaptation=adaptation, lora_rank=4).eval()
    loaded.load_encoder(pretrained.state_dict())

    grey = torch.randn(1, 1, 64, 96)
    with torch.inference_mode():
        features = loaded.model.encoder(grey)
        features = features[0] if network is VIT else features
        # a stem summed over its three inputs does to one channel what it did to three equal ones
        expected = pretrained.forward_intermediates(
            grey.expand(1, 3, 64, 96), intermediates_only=True
        )
    assert features[-1].shape == expected[-1].shape
    torch.testing.assert_close(features[-1], expected[-1], rtol=1e-4, atol=1e-4)


def test_weights_with_a_missing_an_unknown_or_a_misshapen_tensor_are_refused_and_change_nothing():
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    network = build(LITE0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stem = weights.pop("conv_stem.weight")
    with pytest.raises(InputError, match=r"1 missing \(conv_stem.weight\)"):
        network.load_encoder(weights)
    with pytest.raises(InputError, match=r"1 unexpected \(conv_stom.weight\)"):
        network.load_encoder(weights | {"conv_stem.weight": stem, "conv_stom.weight": stem})
    with pytest.raises(InputError, match=r"1 of another shape \(conv_stem.weight\)"):
        network.load_encoder(weights | {"conv_stem.weight": stem[:, :1]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_weights_without_classifier_are_enough():
    weights = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    network = build(LITE0)
    network.load_encoder(weights)
    assert torch.equal(
        network.model.encoder.model.blocks[0][0].conv_dw.weight,
        weights["blocks.0.0.conv_dw.weight"],
    )


def test_nnunet_builds_the_network_from_plans_and_may_set_its_decoders_supervision():
    network = get_network_from_plans(
        "cotrain.networks.TimmSegmentationNetwork",
        {"encoder": "tf_efficientnet_lite0", "adaptation": "lora", "lora_rank": 2},
        [],
        input_channels=1,
        output_channels=4,
        allow_init=True,
        deep_supervision=False,
    )
    network.decoder.deep_supervision = False
    assert network(torch.zeros(2, 1, 40, 56)).shape == (2, 4, 40, 56)


def test_output_is_independent_of_what_padding_adds_beyond_a_divisible_size():
    network = build(LITE0).eval()
    images = torch.randn(1, 2, 32, 40)
    repeated = torch.cat([images, images[..., -1:].expand(-1, -1, -1, 24)], dim=-1)
    with torch.inference_mode():
        assert torch.equal(network(images), network(repeated)[..., :40])


def test_same_seed_gives_the_same_network():
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        weights.append(build(PVT, adaptation="lora").state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_fresh_lora_changes_nothing_until_it_has_learnt():
    full, lora = build(LITE0).eval(), build(LITE0, adaptation="lora").eval()
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    full.load_encoder(weights)
    lora.load_encoder(weights)
    images = torch.randn(1, 2, 64, 64)
    with torch.inference_mode():
        features = full.model.encoder(images)[-1], lora.model.encoder(images)[-1]
    torch.testing.assert_close(*features)


def test_lora_leaves_out_layers_that_its_update_would_not_repeat():
    dense, linear = torch.nn.Conv2d(4, 4, 3), torch.nn.Linear(4, 4)
    assert takes_lora(dense) and takes_lora(linear)
    assert not takes_lora(torch.nn.Conv2d(4, 4, 3, groups=4))
    assert not takes_lora(torch.nn.Conv2d(4, 4, 3, dilation=2))
    assert not takes_lora(timm.layers.Conv2dSame(4, 4, 3, stride=2))


def test_lora_is_refused_where_the_encoder_reads_weights_past_its_layers():
    with pytest.raises(InputError, match=r"12 of its layers .*attn\.qkv"):
        TimmSegmentationNetwork(
            1, 2, encoder="vit_small_patch16_dinov3_qkvb", decoder="DPT", adaptation="lora"
        )


def test_graph_is_whole_for_the_compiler():
    network = build(LITE0, adaptation="lora").eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    images = torch.randn(1, 2, 35, 50)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), network(images))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"deep_supervision": True}, "Deep supervision"),
        ({"encoder": "no_such_encoder"}, "has no encoder"),
        ({"encoder": "tf_efficientnet_lite0.no_such_tag"}, "has no encoder"),
        ({"decoder": "NoSuchDecoder"}, "cannot join"),
        ({"decoder": "DPT"}, "plain vision transformers take DPT"),
        ({"encoder": "vit_tiny_patch16_224"}, "plain vision transformers take DPT"),
        ({"encoder": "vit_small_patch14_dinov2", "decoder": "DPT"}, "patches of 14 pixels"),
    ],
)
def test_argument_that_cannot_be_met_is_refused_with_a_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        TimmSegmentationNetwork(1, 2, **options)


def test_the_average_of_weights_moves_each_tensor_once_whatever_its_names():
    network = get_network_from_plans(
        "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        {
            **{"n_stages": 2, "features_per_stage": [2, 4], "conv_op": "torch.nn.Conv3d"},
            **{"kernel_sizes": [[3] * 3] * 2, "strides": [[1] * 3, [2] * 3], "conv_bias": True},
            **{"n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1]},
            **{"norm_op": "torch.nn.BatchNorm3d", "norm_op_kwargs": {"affine": True}},
            **{"nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}},
        },
        ["conv_op", "norm_op", "nonlin"],
        1,
        2,
    )
    # The reason for our own loop: a tensor under two names.
    assert len({each.data_ptr() for each in network.state_dict().values()}) < len(
        network.state_dict()
    )
    average = MovingAverage(network, decay=0.9)
    with torch.no_grad():
        for start, tensors in ((0, average.module.state_dict()), (1, network.state_dict())):
            for tensor in tensors.values():
                tensor.fill_(start)
    average.update(network)
    for name, tensor in average.module.state_dict().items():
        expected = 0.1 if tensor.is_floating_point() else 1
        assert tensor.double().mean().item() == pytest.approx(expected), name
