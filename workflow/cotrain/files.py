"""Reading and writing of small files: in, a path; out, a whole file or none."""

import hashlib
import io
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from cotrain.errors import InputError

SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}


def unique_prefix() -> str:
    """Return a prefix for unfinished files that no other process on any machine uses."""
    return f".writing-{socket.gethostname()}-{os.getpid()}-"


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well.

    The temporary name keeps the suffixes of `path`, because NIfTI and Blosc2 writers choose the
    format by them. After an error the temporary file is removed and `path` is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(unique_prefix() + path.name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(text: str, path: str | Path) -> None:
    """Write `text` to `path` in one step."""
    with write_atomically(path) as temporary:
        temporary.write_text(text)


def write_json(content: dict, path: str | Path) -> None:
    """Write `content` to `path` as indented JSON in one step."""
    write_text(json.dumps(content, indent=2) + "\n", path)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a TSV (or a CSV, by its name) with every column as text; an empty cell is ''.

    Lines that start with # are comments; a # elsewhere is part of its cell.

    Raises InputError where the file is missing, no table, or separated by what its name does not
    say, or where a quotation mark makes one cell of two lines: verdicts would go unheard.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"The table {path} does not exist in {Path.cwd()}; give the path of a TSV or CSV file."
        )
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        # Spreadsheets begin a "CSV UTF-8" with a mark, which would hide the # of a comment.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_table(path, error) from None
    # Not splitlines: a note pasted from a PDF may hold separators that are no line's end.
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if separator == "," and lines and ";" in lines[0] and "," not in lines[0]:
        # As spreadsheets write a CSV in countries where the comma is in numbers.
        separator = ";"
    there = [name for sign, name in SEPARATORS.items() if lines and sign in lines[0]]
    if there and SEPARATORS[separator] not in there:
        raise InputError(
            f"{path} has {there[0]} between its columns, wanted {SEPARATORS[separator]}; save it "
            "as UTF-8 text with tabs (.tsv) or commas (.csv)."
        )
    if not there and lines and len(lines[0].split()) > 1:
        raise InputError(
            f"{path} has blanks between its columns ({lines[0].strip()[:40]}), wanted "
            f"{SEPARATORS[separator]}; an editor may write blanks for the Tab key."
        )
    try:
        frame = pd.read_csv(
            io.StringIO("\n".join(lines)), sep=separator, dtype=str, keep_default_na=False
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        surplus = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if surplus is None:
            raise _no_table(path, error) from None
        headings, line, cells = map(int, surplus.groups())
        raise InputError(
            f"{path}, row {line - 1}: it has {cells} cells, wanted {headings} as in the heading; "
            "remove the surplus separator."
        ) from None
    # pandas takes surplus cells for an index, which shifts every column by one.
    if not isinstance(frame.index, pd.RangeIndex):
        raise InputError(
            f"{path}: the rows have more cells than the {len(frame.columns)} headings; remove the "
            "surplus separators."
        )
    torn = frame.map(lambda cell: "\n" in cell).any(axis=1)
    if torn.any():
        raise InputError(
            f"{path}, row {torn.idxmax() + 1}: a cell goes on in the next line; remove the line "
            'break in it, or the quotation mark (") that opens it and is never closed.'
        )
    # Spreadsheets save rows below the last one.
    return frame[(frame != "").any(axis=1)].reset_index(drop=True)


def _no_table(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a table that can be read ({str(error).strip()}); save it as UTF-8 text "
        "with tabs (.tsv) or commas (.csv) between the columns."
    )


def write_table(frame: pd.DataFrame, path: str | Path) -> None:
    """Write `frame` as TSV (or CSV, by its name) without its index, in one step."""
    separator = "," if Path(path).suffix == ".csv" else "\t"
    with write_atomically(path) as temporary:
        frame.to_csv(temporary, sep=separator, index=False)
