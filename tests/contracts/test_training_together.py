"""Two processes that train one network together do what one does, on a CPU, by gloo."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from cotrain.losses import DiceAndSoftCrossEntropy
from cotrain.networks import TimmSegmentationNetwork
from cotrain.settings import Compute
from cotrain.team import Place, team
from cotrain.training import convert_sync_batchnorm


def together(experiment):
    """Return the experiment with two processes for each training."""
    compute = Compute(device="cpu", precision="fp32", gpus_per_training=2)
    return replace(experiment, settings=experiment.settings.model_copy(update={"compute": compute}))


def test_each_process_has_its_own_share_of_a_batch():
    assert [list(Place(rank, 3).share_of(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert list(Place().share_of(2)) == [0, 1]
    with pytest.raises(ValueError, match="batch of 2 cannot be divided among 3"):
        Place(0, 3).share_of(2)


@pytest.fixture(scope="module")
def two_together(tiny, train, audit_table, tmp_path_factory):
    """Return the 3D network of round 00, trained by two processes."""
    folder = tmp_path_factory.mktemp("together") / "train_3d"
    options = ("--arm", "cotrain", "--round", 0, "--audit", audit_table)
    return train(together(tiny), "3d", folder, *options)


def test_two_processes_train_on_the_batches_of_one(
    tiny, two_together, train, audit_table, tmp_path
):
    compute = Compute(device="cpu", precision="fp32")
    alone = replace(tiny, settings=tiny.settings.model_copy(update={"compute": compute}))
    options = ("--arm", "cotrain", "--round", 0, "--audit", audit_table)
    one = train(alone, "3d", tmp_path, *options)
    curves = [pd.read_csv(each.folder / "curve.csv") for each in (one, two_together)]
    # The same samples and the mean of the same gradients, summed in another order; the weights of
    # the coarsest output, 1e-6 for two, are the other difference.
    assert curves[1]["loss"].tolist() == pytest.approx(curves[0]["loss"].tolist(), abs=2e-3)
    assert curves[1]["share_realised"].tolist() == curves[0]["share_realised"].tolist()
    assert curves[0]["loss"].iloc[-1] < curves[0]["loss"].iloc[0] - 0.1


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_two_processes_train_the_2d_network(tiny_with_2d, train, tmp_path, adaptation):
    # With adapters most weights are frozen: DDP waits for every gradient that it was told of.
    experiment = together(tiny_with_2d(adaptation=adaptation))
    done = train(experiment, "2d", tmp_path, "--arm", "labels_only", "--round", 0)
    curve = pd.read_csv(done.folder / "curve.csv")
    assert curve["epoch"].tolist() == [0, 1]
    assert curve["loss"].iloc[1] < curve["loss"].iloc[0]


def logits_and_target() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of a batch of 4 and its target; in the second half a label is rare."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4, 8, 8), generator=generator)
    labels[2:] = labels[2:].clamp(max=1)
    target = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    return torch.randn(4, 3, 8, 8, generator=generator), target


def gradient_of(place: Place) -> torch.Tensor:
    """Return the gradient of a scale of the logits, averaged over the processes as DDP does."""
    scale = torch.ones(3, 1, 1, requires_grad=True)
    own = list(place.share_of(4))
    logits, target = (each[own] for each in logits_and_target())
    loss = DiceAndSoftCrossEntropy(batch_dice=True, ddp=place.size > 1)
    loss(scale * logits, target).backward()
    if place.size > 1:
        torch.distributed.all_reduce(scale.grad)
    return scale.grad / place.size


def test_batch_dice_is_over_the_batch_of_all_processes():
    with team([torch.device("cpu")] * 2, gradient_of) as place:
        together = gradient_of(place)
    alone = gradient_of(Place())
    assert together.flatten().tolist() == pytest.approx(alone.flatten().tolist(), rel=1e-5)
    # What an average of each half's own Dice would give.
    halves = [gradient_of_half(half) for half in (slice(0, 2), slice(2, 4))]
    assert not torch.allclose(sum(halves) / 2, alone, rtol=1e-2)


def gradient_of_half(half: slice) -> torch.Tensor:
    scale = torch.ones(3, 1, 1, requires_grad=True)
    logits, target = (each[half] for each in logits_and_target())
    DiceAndSoftCrossEntropy(batch_dice=True)(scale * logits, target).backward()
    return scale.grad


def test_norms_that_are_synchronised_keep_their_activations():
    network = TimmSegmentationNetwork(1, 3).eval()
    image = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = network(image)
        after = convert_sync_batchnorm(network).eval()(image)
    assert any(isinstance(each, torch.nn.SyncBatchNorm) for each in network.modules())
    assert torch.allclose(before, after, atol=1e-5)


def test_a_killed_training_of_two_processes_ends_in_the_same_bits(
    two_together, kill_once, cotrain, tmp_path
):
    words = [str(tmp_path) if w == str(two_together.folder) else w for w in two_together.words]
    kill_once(words, tmp_path / "work" / "latest.pth")
    cotrain(*words)
    ours, undisturbed = (
        torch.load(folder / "checkpoint.pth", weights_only=True)["network_weights"]
        for folder in (tmp_path, two_together.folder)
    )
    assert all(torch.equal(ours[name], undisturbed[name]) for name in undisturbed)


def processes_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that compute with it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
    return [child for child, command in commands.items() if "spawn_main" in command]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def two_at_work(two_together, folder) -> tuple[subprocess.Popen, int]:
    """Train in `folder`; return the step and the other process, once an epoch is saved."""
    words = [str(folder) if w == str(two_together.folder) else w for w in two_together.words]
    process = subprocess.Popen(
        [sys.executable, "-m", "cotrain", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "work" / "latest.pth").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    (other,) = processes_of(process.pid)
    return process, other


@pytest.mark.parametrize("killed", ["the step", "the other"])
def test_no_process_outlives_the_other(two_together, tmp_path, killed):
    process, other = two_at_work(two_together, tmp_path)
    os.kill(process.pid if killed == "the step" else other, signal.SIGKILL)
    assert process.wait(60) != 0
    deadline = time.monotonic() + 60
    while alive(other) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(other)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_cancelled_job_releases_the_lock_whichever_process_hears_it_first(two_together, tmp_path):
    process, other = two_at_work(two_together, tmp_path)
    os.kill(other, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "trains along" not in said
    assert not alive(other)
    assert not list((tmp_path / "work").glob("*.lock"))


def test_a_process_that_fails_while_they_meet_ends_the_step(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "import os\n"
        "import torch\n"
        "from cotrain import team\n"
        "def fail(*words):\n"
        "    os._exit(3)\n"
        "if __name__ == '__main__':\n"
        "    with team.team([torch.device('cpu')] * 2, print):\n"
        "        pass\n"
        "else:\n"
        "    team._meet = fail\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "A process that trains along ended with 3" in ran.stderr
