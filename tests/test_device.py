"""What is arranged for a CPU computes the same, and steps share out GPUs."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from cotrain.device import (
    arrange_for_cpu,
    check_computes,
    devices_of,
    is_bf16_faster,
    make_current,
    precision_of,
    telling_what_takes_less,
)
from cotrain.errors import InputError
from cotrain.settings import Compute


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


STEP = """
import sys, types
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: int(sys.argv[1])
torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(uuid=f"GPU-{number}")
import cotrain.device
from cotrain.device import devices_of
from cotrain.settings import Compute
# These GPUs are but answers. It is by this check that a step opens one.
cotrain.device.check_computes = lambda device: print(device, end=" ")
for _ in range(2):
    print(*devices_of(Compute(), count=int(sys.argv[2])), flush=True)
input()
"""


@pytest.fixture
def start_step(tmp_path, monkeypatch):
    """Return a function that starts a step on a machine with so many GPUs, and says which it took.

    It stays alive; `steps` are their processes.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def start(gpus: int, count: int = 1) -> str:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        words = [sys.executable, "-c", STEP, str(gpus), str(count)]
        start.steps.append(subprocess.Popen(words, **pipes))
        first, again = (start.steps[-1].stdout.readline().split() for _ in range(2))
        assert first == again
        current, *taken = first
        assert current == taken[0]
        return " ".join(taken)

    start.steps = []
    yield start
    for step in start.steps:
        step.kill()
        step.communicate()


def test_steps_at_a_time_take_different_gpus_and_a_finished_one_frees_its_own(start_step):
    assert [start_step(2) for _ in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    start_step.steps[1].kill()
    start_step.steps[1].wait()
    assert start_step(2) == "cuda:1"


def test_trainings_of_several_gpus_and_other_steps_share_no_gpu(start_step):
    assert start_step(5, 2) == "cuda:0 cuda:1"
    assert start_step(5) == "cuda:2"
    assert start_step(5, 2) == "cuda:3 cuda:4"
    # More at a time than there are GPUs: the first are shared.
    assert start_step(5, 2) == "cuda:0 cuda:1"


def test_a_gpu_that_torch_was_not_built_for_is_refused_with_its_name(monkeypatch):
    def refuse(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "ones", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(
        InputError,
        match=r"sees Tesla V100 on .* \(CUDA error: no kernel image is available\); take",
    ):
        check_computes(torch.device("cuda", 0))


def out_of_memory(*size, device=None):
    raise torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB ..."
    )


@pytest.mark.parametrize(
    "said", ["out of memory", "CUDA-capable device(s) is/are busy or unavailable"]
)
def test_a_gpu_on_which_cuda_itself_cannot_start_is_told_as_another_processs(monkeypatch, said):
    def refuse(device):
        # The class that torch has for it, which is no OutOfMemoryError.
        raise torch.AcceleratorError(f"CUDA error: {said}\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(InputError) as raised:
        make_current(torch.device("cuda", 0))
    assert "before this step has begun (CUDA error: " in str(raised.value)
    assert "end that one" in str(raised.value)


def test_a_gpu_that_another_process_fills_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "ones", out_of_memory)
    with pytest.raises(InputError, match=r"before this step has begun \(CUDA out of .*end that"):
        check_computes(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("network", "less"), [("2d", r"network_2d\.batch_size"), ("3d", r"network_3d\.gpu_memory_gb")]
)
def test_a_network_that_does_not_fit_is_told_with_what_takes_less(network, less):
    found = r"\(CUDA out of memory\. Tried to allocate 2\.00 GiB\)"
    with (
        pytest.raises(InputError, match=rf"The {network} network does not fit .* {found}.* {less}"),
        telling_what_takes_less(network),
    ):
        out_of_memory()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_slurm_gave_and_torch_does_not_see_is_told_before_all_else(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InputError, match=r"SLURM gave this job the GPU 0 .* exclude that node"):
        devices_of(Compute(device=device), count=1)


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"gpus_per_training is 2, but torch sees 1 GPUs"):
        devices_of(Compute(), count=2)


@pytest.mark.parametrize(
    ("capabilities", "is_faster"),
    [
        ({"cpu_name": "Intel Xeon Platinum 8488C", "avx512_bf16": True, "amx_bf16": True}, True),
        # The same CPU in a virtual machine that hides AMX.
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC 7R13", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "aarch64", "bf16": True}, False),
    ],
)
def test_a_cpu_trains_in_bf16_only_where_that_is_faster(monkeypatch, capabilities, is_faster):
    assert is_bf16_faster(capabilities) is is_faster
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    wanted = "bf16" if is_faster else "fp32"
    assert precision_of(Compute(), cpu, training=True) == wanted
    assert precision_of(Compute(), cpu, training=False) == "fp32"
    assert precision_of(Compute(precision="bf16"), cpu, training=True) == "bf16"
