"""Provenance: in, what a step used; out, a JSON file beside what it made."""

import importlib.metadata
import platform
import resource
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cotrain import __version__
from cotrain.files import sha256_of, write_json, write_text
from cotrain.settings import Section

PACKAGES = (
    "nnunetv2",
    "torch",
    "timm",
    "segmentation-models-pytorch",
    "peft",
    "batchgeneratorsv2",
    "blosc2",
    "nibabel",
    "numpy",
    "pandas",
    "snakemake",
)


def commit_of_code() -> str:
    """Return the commit this code is at, with `-modified` for uncommitted changes.

    Where the package was installed from elsewhere than a git clone: `release <version>`. Without
    git nobody can tell: `unknown, no git here, release <version>`.
    """
    here = Path(__file__).parent
    # A clone that a colleague owns is fine to be asked for its commit.
    git = ["git", "-c", "safe.directory=*", "-C", str(here)]
    is_tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = [*git, "describe", "--always", "--dirty=-modified", "--abbrev=40", "--exclude=*"]
    try:
        # Installed into an environment inside another clone, that one's commit says nothing.
        subprocess.run(is_tracked, capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError:
        return f"unknown, no git here, release {__version__}"
    except subprocess.CalledProcessError:
        return f"release {__version__}"


def cpu_seconds() -> float:
    """Return the processor time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def write_provenance(
    path: str | Path,
    *,
    settings: Section,
    seed: int | None,
    inputs: Iterable[Path],
    cpu_seconds_before: float = 0,
    **facts: object,
) -> None:
    """Write settings, seed, input hashes, package versions and commit of a step to `path`.

    inputs: files; each is recorded with the SHA-256 of its bytes. cpu_seconds_before: that of
    earlier, interrupted processes, which `cpu_seconds` holds beside this one's processor time.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    write_json(
        {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit_of_code(),
            "seed": seed,
            "settings": settings.model_dump(mode="json"),
            "inputs": {str(each): sha256_of(each) for each in inputs},
            "python": platform.python_version(),
            "packages": versions,
            "cpu_seconds": round(cpu_seconds_before + cpu_seconds(), 1),
            **facts,
        },
        path,
    )


def keep_provenance(kept: Path, path: Path, *, is_repeat: bool, **provenance: object) -> None:
    """Write a step's provenance to `path`, as `write_provenance` does, and keep it in `kept`.

    is_repeat: nothing was left to do, as Snakemake had a finished step repeated. It is still what
    it was made by, and gets the provenance that was kept.
    """
    if not (is_repeat and kept.is_file()):
        write_provenance(kept, **provenance)
    write_text(kept.read_text(), path)
