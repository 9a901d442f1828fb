"""Shards: in, all cases; out, those of one job."""

from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


def shard_of(items: list[Item], shard: int, shards: int) -> list[Item]:
    """Return every `shards`-th item from number `shard` on, so that shards differ by one at most.

    Raises ValueError unless 0 <= shard < shards.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} is not one of 0 ... {shards - 1}")
    return items[shard::shards]


def manifests_of(folder: str | Path) -> list[Path]:
    """Return the manifests of a folder of masks or preprocessed cases; each tells of a shard's."""
    return sorted(Path(folder).glob("manifest-*.tsv"))


def remove_manifests_beyond(shards: int, folder: Path) -> None:
    """Remove the manifests that a run with more shards has left in a folder."""
    for manifest in manifests_of(folder):
        if int(manifest.stem.removeprefix("manifest-")) >= shards:
            # Another shard may be at it, too.
            manifest.unlink(missing_ok=True)
