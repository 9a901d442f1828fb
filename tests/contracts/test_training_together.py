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

from cotrain.__main__ import main
from cotrain.settings import Compute
from cotrain.team import Place


def together(experiment):
    """Return the experiment with two processes for each training."""
    compute = Compute(device="cpu", precision="fp32", gpus_per_training=2)
    return replace(experiment, settings=experiment.settings.model_copy(update={"compute": compute}))


def test_each_process_has_its_own_share_of_a_batch():
    assert [list(Place(rank, 3).share_of(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert list(Place().share_of(2)) == [0, 1]


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


def test_a_batch_norms_network_trains_in_two_processes(tiny, train, tmp_path):
    trained = train(together(tiny), "2d", tmp_path, "--arm", "cotrain", "--round", 0)
    content = torch.load(trained.checkpoint, weights_only=True)
    # A name of DDP's own wrapper would not be found in inference.
    assert not any(name.startswith("module.") for name in content["network_weights"])
    assert content["epoch"] == 2


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


@pytest.mark.parametrize("killed", ["the step", "the other"])
def test_no_process_outlives_the_other(two_together, tmp_path, killed):
    words = [str(tmp_path) if w == str(two_together.folder) else w for w in two_together.words]
    process = subprocess.Popen(
        [sys.executable, "-m", "cotrain", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "work" / "latest.pth").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    (other,) = processes_of(process.pid)
    os.kill(process.pid if killed == "the step" else other, signal.SIGKILL)
    assert process.wait(60) != 0
    deadline = time.monotonic() + 60
    while alive(other) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(other)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_batch_that_cannot_be_divided_is_refused(tiny, two_together, tmp_path, capsys):
    compute = Compute(device="cpu", gpus_per_training=3)
    odd = replace(tiny, settings=tiny.settings.model_copy(update={"compute": compute}))
    words = [*two_together.words, "--settings", odd.stage("train_3d", tmp_path)]
    assert main([*map(str, words), "--out-dir", str(tmp_path)]) == 2
    assert "batch size 2, which cannot be divided" in capsys.readouterr().err
