"""What is arranged for a CPU computes the same."""

import copy

import pytest
import torch
from torch import nn

from cotrain.device import arrange_for_cpu


def test_an_arranged_instance_norm_is_the_same_function_and_keeps_the_layout():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv3d(2, 4, 3), nn.InstanceNorm3d(4, affine=True, eps=1e-2))
    nn.init.normal_(stock[1].weight)
    nn.init.normal_(stock[1].bias)
    ours = copy.deepcopy(stock)
    arrange_for_cpu(ours)
    # Samples of different contrast: statistics over the batch would show.
    volumes = torch.randn(3, 2, 6, 7, 8) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1, 1)
    for network in (stock, ours):
        network(volumes).square().sum().backward()
    for theirs, mine in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    made = ours.eval()(volumes)
    torch.testing.assert_close(made, stock.eval()(volumes))
    assert made.is_contiguous(memory_format=torch.channels_last_3d)
    assert ours.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((2, 2, 2), 3), ((2, 3, 6), 3), ((1, 4, 4), 3), ((3, 3, 3), 3), ((3, 6, 6), 5)],
)
def test_gradients_of_thin_volumes_hold_no_uninitialised_memory(shape, kernel):
    gradients = []
    for junk in (float("nan"), 1e30, float("nan"), 1e30):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv3d(32, 32, kernel, padding=kernel // 2))
        arrange_for_cpu(network)
        volumes = torch.randn(2, 32, *shape)
        left_behind = [torch.full((1 << 18,), junk) for _ in range(6)]
        del left_behind
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(volumes)
        logits.float().square().mean().backward()
        gradients.append(network[0].weight.grad)
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
        assert torch.equal(gradient, gradients[0])


def test_a_norm_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.InstanceNorm3d):
        def forward(self, features):
            return 2 * super().forward(features)

    volumes = torch.randn(2, 3, 4, 4, 4)
    network = nn.Sequential(Doubled(3))
    expected = network(volumes)
    arrange_for_cpu(network)
    torch.testing.assert_close(network(volumes), expected)
