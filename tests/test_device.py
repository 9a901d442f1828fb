"""What is arranged for a CPU computes the same, and steps share out GPUs."""

import copy
import subprocess
import sys

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


STEP_WITH_TWO_GPUS = """
import types
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(uuid=f"GPU-{number}")
from cotrain.device import device_of
from cotrain.settings import Compute
print(device_of(Compute()), device_of(Compute()), flush=True)
print(device_of(Compute(gpus_per_training=2), rank=1), flush=True)
input()
"""


def test_steps_at_a_time_take_different_gpus_and_a_finished_one_frees_its_own(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    steps = []

    def gpu_of_a_new_step() -> str:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        step = subprocess.Popen([sys.executable, "-c", STEP_WITH_TWO_GPUS], **pipes)
        steps.append(step)
        first, again = step.stdout.readline().split()
        assert first == again
        # Of those that train together each has the GPU of its number.
        assert step.stdout.readline() == "cuda:1\n"
        return first

    assert [gpu_of_a_new_step() for _ in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    steps[1].kill()
    steps[1].wait()
    assert gpu_of_a_new_step() == "cuda:1"
    for step in steps:
        step.kill()
        step.communicate()
