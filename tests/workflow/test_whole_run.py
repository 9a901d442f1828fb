"""One tiny run of the whole workflow with the real commands, undisturbed and killed on its way.

Slow parts are kept small: two rounds and a last training, two epochs of two batches each, random 2D
weights.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import yaml

CLONE = Path(__file__).parents[2]
EPOCH = {"iterations_per_epoch": 2, "warmup_epochs": 2, "epochs_per_round": 2}


def command(folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(CLONE / "Snakefile")),
        *("--profile", str(CLONE / "profiles" / "default"), "--directory", str(folder)),
        *("--configfile", str(folder / "settings.yaml"), "--cores", "2"),
        *("--set-threads", "train=1", "infer_pseudo_masks=1", "infer_test_masks=1"),
    ]


def environment() -> dict[str, str]:
    """Return the environment with the commands of this Python's environment first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path}


def write_settings(folder: Path, tiny, *, splits: tuple[str, ...]) -> None:
    """Write the settings and the case table of a tiny run into `folder`."""
    rows = [{**row, "split": split} for split in splits for row in tiny.rows(split)]
    pd.DataFrame(rows).to_csv(folder / "cases.tsv", sep="\t", index=False)
    settings = {
        "experiment": "tiny",
        "cases": str(folder / "cases.tsv"),
        "labels": tiny.settings.labels,
        "rounds": 2,
        "network_2d": {"weights": "random", "patch_size": [32, 32], "batch_size": 2},
        "network_3d": {"features_per_stage": [4, 8]},
        "training_2d": EPOCH,
        "training_3d": EPOCH,
        "cotraining": {"schedule_rounds": 2, "ema_decay": 0.5, "last_epochs": 2},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny) -> Path:
    """Return the folder of a whole run: both arms, two rounds, evaluation, export."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_settings(folder, tiny, splits=("labelled", "unlabelled", "test"))
    done = subprocess.run(command(folder), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "results" / "tiny"


def fingerprint(results: Path) -> dict[str, str]:
    """Return the hash of each co-trained network's weights and of each pseudo-mask."""
    found = {}
    for path in sorted(results.glob("cotrain/round-*/train_*/provenance.json")):
        name = str(path.parent.relative_to(results))
        found[name] = json.loads(path.read_text())["weights_hash"]
    for path in sorted(results.glob("cotrain/round-*/pseudo_*/manifest-*.tsv")):
        for row in pd.read_csv(path, sep="\t", dtype=str).to_dict("records"):
            name = f"{path.parent.relative_to(results)}/{row['case']}"
            found[name] = row["mask_sha256"] + row["soft_sha256"]
    return found


def test_a_run_makes_all_that_the_readme_promises(undisturbed: Path):
    summary = (undisturbed / "summary" / "summary.txt").read_text()
    assert "labels alone" in summary
    for name in ("dice_per_round.png", "training_curves.png", "montage.png", "scores.tsv"):
        assert (undisturbed / "summary" / name).stat().st_size > 0
    scores = pd.read_csv(undisturbed / "summary" / "scores.tsv", sep="\t")
    # Both arms, two networks, two rounds and the last training, and both means after it.
    assert len(scores) == 2 * 2 * 3 + 2
    assert (undisturbed / "cotrain" / "round-01" / "audit" / "train_3d.html").is_file()
    assert len(fingerprint(undisturbed)) == 5 + 5 * 4
    model = undisturbed / "model" / "Dataset001_cotrain"
    assert list(model.glob("*/fold_all/checkpoint_final.pth"))


def test_the_control_took_the_same_steps(undisturbed: Path):
    taught = pd.read_csv(undisturbed / "cotrain/round-02/train_3d/curve.csv")
    control = pd.read_csv(undisturbed / "labels_only/round-02/train_3d/curve.csv")
    assert taught["learning_rate"].tolist() == control["learning_rate"].tolist()
    assert taught["share_realised"].sum() > 0
    assert control["share_realised"].sum() == 0


def test_new_images_are_segmented_by_the_mean_of_both_networks(undisturbed, tmp_path, tiny):
    images = tmp_path / "images"
    images.mkdir()
    for row in tiny.rows("test"):
        shutil.copy(row["image"], images / f"{row['case']}_0000.nii.gz")
    words = ["predict", "--experiment", "results/tiny", "--images", images]
    words += ["--out-dir", tmp_path / "masks", "--channel-suffix", "_0000"]
    predict = [sys.executable, "-m", "cotrain", *map(str, words)]
    # From where the workflow ran, as its own paths start there.
    done = subprocess.run(predict, cwd=undisturbed.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "round-01/train_2d" in done.stdout
    assert "round-02/train_3d" in done.stdout
    for row in tiny.rows("test"):
        made = nibabel.load(tmp_path / "masks" / f"{row['case']}.nii.gz")
        of_the_run = undisturbed / "cotrain" / "round-02" / "test_mean" / f"{row['case']}.nii.gz"
        assert np.array_equal(made.dataobj, nibabel.load(of_the_run).dataobj)
        assert np.array_equal(made.affine, nibabel.load(row["image"]).affine)


def test_prediction_refuses_what_it_cannot_use(undisturbed, tmp_path, tiny):
    images, row = tmp_path / "images", tiny.rows("test")[0]
    images.mkdir()
    image = nibabel.load(row["image"])
    broken = np.full(image.shape, np.nan, dtype=np.float32)
    nibabel.save(nibabel.Nifti1Image(broken, image.affine), images / "broken.nii.gz")
    out = ["--images", str(images), "--out-dir", str(tmp_path / "masks")]
    for words, said in (
        (["--experiment", str(undisturbed), *out], "broken.nii.gz"),
        (["--experiment", str(tmp_path), *out], "not the folder of a finished experiment"),
        (
            ["--experiment", str(undisturbed), *out, "--channel-suffix", "_0000,_0001"],
            "end in none of _0000, _0001",
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cotrain", "predict", *words], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "masks").exists()


def kill_when(folder: Path, sign: str) -> bool:
    """Run the command, kill it and all its jobs once `sign` is there; False if it ended before."""
    started = subprocess.Popen(
        command(folder), env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while started.poll() is None and not list(folder.glob(sign)):
        time.sleep(0.05)
    killed = started.poll() is None
    if killed:
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    return killed


def test_a_run_killed_in_every_stage_ends_in_the_same_bits(undisturbed, tmp_path, tiny):
    # Without test cases the control is left out; co-training does not depend on it.
    write_settings(tmp_path, tiny, splits=("labelled", "unlabelled"))
    results, latest = "results/tiny", os.path.join("work", "latest.pth")
    for sign in (
        f"{results}/preprocessed/unlabelled/*.pkl",
        f"{results}/cotrain/round-00/train_2d/{latest}",
        f"{results}/cotrain/round-00/pseudo_2d/*.nii.gz",
        f"{results}/cotrain/round-02/train_3d/{latest}",
    ):
        assert kill_when(tmp_path, sign), f"the run was over before {sign}"
    done = subprocess.run(command(tmp_path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert fingerprint(tmp_path / results) == fingerprint(undisturbed)
