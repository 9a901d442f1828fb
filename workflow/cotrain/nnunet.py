"""nnU-Net's objects for one experiment: in, its preprocessed folder; out, plans and networks.

The folder holds `plans.json`, `dataset.json` and `dataset_fingerprint.json`. Both networks are
configurations of that one plans file on one preprocessed grid.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cotrain.errors import InputError
from cotrain.files import read_table, sha256_of
from cotrain.shards import manifests_of

if TYPE_CHECKING:
    from torch import nn

CONFIGURATIONS = {"2d": "2d_cotrain", "3d": "3d_fullres"}
"""Network → configuration of the plans."""


@contextmanager
def nnunet_folders() -> Iterator[Path]:
    """Give nnU-Net its three folders inside a temporary one, for this process and block only."""
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            os.environ[name] = str(Path(folder, name))
            Path(folder, name).mkdir()
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def make_importable(folder: str | Path, plans: dict) -> None:
    """Let nnU-Net find a network's class in a Python file that lies beside the plans.

    Raises InputError where the file is not the one that was planned with.
    """
    for configuration in plans["configurations"].values():
        architecture = configuration["architecture"]
        if "file_sha256" not in architecture:
            continue
        path = Path(folder, f"{architecture['network_class_name'].split('.')[0]}.py")
        if not path.is_file() or sha256_of(path) != architecture["file_sha256"]:
            raise InputError(
                f"{path}, the file of the 3D network, is missing or was changed after planning; "
                "change the original that network_3d.architecture names, and plan again."
            )
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class Planned:
    """The frozen plans of an experiment.

    plans, dataset: nnU-Net's plans and dataset.json as dictionaries.
    """

    plans: dict
    dataset: dict

    @classmethod
    def read(cls, folder: str | Path) -> "Planned":
        """Read plans.json and dataset.json; raises InputError where one is missing."""
        content = {}
        for name in ("plans", "dataset"):
            path = Path(folder, f"{name}.json")
            if not path.is_file():
                raise InputError(
                    f"{path} does not exist; run `cotrain plan` into that folder first."
                )
            content[name] = json.loads(path.read_text())
        make_importable(folder, content["plans"])
        return cls(**content)

    @cached_property
    def manager(self):
        """nnU-Net's PlansManager; made once, because it copies the plans."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(self.plans)

    def configuration(self, network: str):
        """Return nnU-Net's ConfigurationManager of the `2d` or `3d` network."""
        return self.manager.get_configuration(CONFIGURATIONS[network])

    @property
    def labels(self):
        """nnU-Net's LabelManager."""
        return self.manager.get_label_manager(self.dataset)

    @property
    def class_count(self) -> int:
        """Number of classes, background included."""
        return self.labels.num_segmentation_heads

    @property
    def channel_count(self) -> int:
        """Number of image channels."""
        return len(self.dataset["channel_names"])

    def adjacent_slices(self, network: str) -> int:
        """Number of slices on each side of a slice that the network sees as further channels."""
        arguments = self.configuration(network).network_arch_init_kwargs
        return arguments.get("adjacent_slices", 0) if network == "2d" else 0

    def build_network(self, network: str, *, deep_supervision: bool) -> "nn.Module":
        """Build the `2d` or `3d` network with nnU-Net's own builder, randomly initialised."""
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        configuration = self.configuration(network)
        return get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            self.channel_count,
            self.class_count,
            allow_init=True,
            deep_supervision=deep_supervision,
        )

    def has_deep_supervision(self, network: str) -> bool:
        """True for nnU-Net's own architectures, whose decoders give an output at each scale."""
        name = self.configuration(network).network_arch_class_name
        return name.startswith("dynamic_network_architectures.")


def arrays_in(folder: str | Path) -> pd.DataFrame:
    """Return the rows of all manifests of a folder (case, shape, origin), sorted by case."""
    tables = [read_table(path) for path in manifests_of(folder)]
    return pd.concat(tables).sort_values("case", ignore_index=True)


def arrays_of(folder: str | Path, case: str) -> str:
    """Return the path of a preprocessed case without suffix."""
    return str(Path(folder, case))
