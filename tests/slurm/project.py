"""A folder like a user's clone, where the literal command is typed: in, words; out, its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml
from cluster import Cluster, wait_until

RESULTS = Path("results/tiny")
TRAINED = RESULTS / "cotrain/round-00/train_2d/checkpoint.pth"
MASKS = RESULTS / "cotrain/round-00/pseudo_2d/manifest-0.tsv"
EPOCHS = 12


class Project:
    """A clone with settings in which the literal command is typed.

    folder: where it lies. cluster: where its jobs go. seconds_more: what each epoch and each case
    of its jobs lasts longer than it would. looks: options that say when the command looks at its
    jobs; by default often, because they are short.
    """

    LOOKS = (
        *("--slurm-init-seconds-before-status-checks", "1"),
        *("--seconds-between-status-checks", "1"),
    )

    def __init__(
        self,
        folder: Path,
        cluster: Cluster,
        *,
        seconds_more: float = 0,
        looks: tuple[str, ...] = LOOKS,
    ) -> None:
        self.folder = folder
        self.cluster = cluster
        self.looks = looks
        self.environment = {**cluster.environment, "SECONDS_MORE": str(seconds_more)}

    def command(self, *targets: object, options: tuple[str, ...] = ()) -> list[str]:
        """Return the words of `snakemake --profile slurm`."""
        return [
            *(sys.executable, "-m", "snakemake", "--profile", "slurm"),
            *options,
            *("--configfile", "settings.yaml", "--set-threads", "train=1", "infer_pseudo_masks=1"),
            *(*self.looks, "--latency-wait", "5"),
            *map(str, targets),
        ]

    def start(self, *targets: object, options: tuple[str, ...] = ()) -> subprocess.Popen:
        """Type the command and return the controller, in a group of its own."""
        # Tests that were started in the background have SIGINT ignored, and pass that on.
        words = ["env", "--default-signal=INT", *self.command(*targets, options=options)]
        log = open(self.folder / "controller.log", "ab")  # noqa: SIM115
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def run(self, *targets: object, options: tuple[str, ...] = ()) -> None:
        """Type the command and wait for its good end."""
        code = self.start(*targets, options=options).wait(900)
        assert code == 0, self.said()[-4000:]

    def said(self) -> str:
        """Return what all controllers in this folder said."""
        return (self.folder / "controller.log").read_text()

    def log(self, stage: str = "train_2d") -> str:
        """Return the log of a stage of round 00."""
        path = self.folder / f"logs/tiny/cotrain/round-00/{stage}.log"
        return path.read_text() if path.is_file() else ""

    def epochs_done(self) -> int:
        """Return how many epochs the training has finished."""
        path = self.folder / TRAINED.parent / "work/step.progress.json"
        return json.loads(path.read_text())["epochs_done"] if path.is_file() else 0

    def wait_for_epochs(self, count: int) -> None:
        """Wait until the training has finished so many epochs."""
        wait_until(
            lambda: self.epochs_done() >= count,
            seconds=300,
            what=f"{count} epochs in {self.folder}",
        )

    def job(self, rule: str = "train") -> dict[str, str]:
        """Return the one job of a rule that is in the queue and belongs to this folder."""
        (found,) = [job for job in self.jobs() if f"rule_{rule}_" in job["comment"]]
        return found

    def jobs(self) -> list[dict[str, str]]:
        """Return this folder's jobs in the queue."""
        return [job for job in self.cluster.jobs() if job["folder"] == str(self.folder)]

    def change(self, **settings: object) -> None:
        """Change settings of the project, whole sections at a time."""
        path = self.folder / "settings.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))

    def starts(self) -> list[int]:
        """Return after how many finished epochs each process began that trained."""
        path = self.folder / TRAINED.parent / "work/step.starts.tsv"
        return pd.read_csv(path, sep="\t")["done"].tolist()

    def fingerprint(self) -> dict[str, str]:
        """Return the hashes of the trained weights and of each mask made by them."""
        provenance = json.loads((self.folder / TRAINED.parent / "provenance.json").read_text())
        found = {"weights": provenance["weights_hash"]}
        if (self.folder / MASKS).is_file():
            for row in pd.read_csv(self.folder / MASKS, sep="\t", dtype=str).to_dict("records"):
                found[row["case"]] = row["mask_sha256"] + row["soft_sha256"]
        return found

    def kill(self, controller: subprocess.Popen, number: int, *, seconds: float = 60) -> None:
        """Send the controller a signal, and wait for its end."""
        os.kill(controller.pid, number)
        controller.wait(seconds)
