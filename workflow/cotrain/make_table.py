"""Command `make-table`: in, folders of images and labels; out, a case table to look over and use.

Understands the names of nnU-Net (`case_0000.nii.gz`, `case_0001.nii.gz` for channels, label
`case.nii.gz`) and of the Medical Segmentation Decathlon (image and label have the same name).
"""

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from cotrain.cases import CASE_NAME, COLUMNS, SPLITS, SUFFIXES, read_cases
from cotrain.errors import InputError
from cotrain.files import write_table

OF_A_MASK = re.compile(r"[._-](seg|mask|label|segmentation|gt)$", re.IGNORECASE)
"""What follows the case in the name of a mask that lies among the images."""


def images_and_labels(
    images: Iterable[str | Path], labels: Iterable[str | Path], *, channel_suffixes: Sequence[str]
) -> pd.DataFrame:
    """Return the columns case, image, label (absolute paths), sorted by case, of whole folders.

    `channel_suffixes` such as ("_0000", "_0001") follow the case in an image's file name, in the
    order of the channels; empty: one file a case, named as its label. A case without a label file
    has the label ''. Raises InputError where a channel is missing or a label has no image.
    """
    channels_of = images_of(images, channel_suffixes=channel_suffixes)
    unfit = [case for case in channels_of if not re.fullmatch(CASE_NAME, case)]
    if unfit:
        raise InputError(
            f"{len(unfit)} images cannot name a case, first {channels_of[unfit[0]][0]}: a case is "
            "named as its files, with letters a to z, digits, `_`, `-` and `.` and without blanks; "
            "rename the images and their masks."
        )
    label_files = _nifti_files(labels)
    orphans = sorted(set(label_files) - set(channels_of))
    if orphans:
        remedy = "rename them, or say with --channel-suffix what follows the case in image names"
        ends = {found[0] for name in orphans if (found := OF_A_MASK.search(name))}
        if len(ends) == 1 and all(OF_A_MASK.sub("", name) in channels_of for name in orphans):
            end = ends.pop()
            remedy = (
                f"name them as their images, without `{end}`; in a copy of their folder: "
                f'for f in *{end}.nii*; do mv "$f" "${{f/{end}.nii/.nii}}"; done'
            )
        raise InputError(
            f"{len(orphans)} labels have no image of the same case, first "
            f"{label_files[orphans[0]]}; {remedy}."
        )
    return pd.DataFrame(
        {
            "case": case,
            "image": ";".join(channels_of[case]),
            "label": label_files.get(case, ""),
        }
        for case in sorted(channels_of)
    )


def images_of(
    images: Iterable[str | Path], *, channel_suffixes: Sequence[str]
) -> dict[str, list[str]]:
    """Return case -> absolute paths of its channels, of all images in some folders.

    Raises InputError where names look like nnU-Net's and no suffixes are given, a channel of a
    case is missing, or a table could not name a case.
    """
    image_files = _nifti_files(images)
    if hidden := [path for name, path in image_files.items() if name.startswith("#")]:
        raise InputError(
            f"The name of {hidden[0]} begins with #, as a comment does in a case table; rename it."
        )
    if channel_suffixes:
        return _channels_of_cases(image_files, channel_suffixes)
    # nnU-Net counts channels from 0: a number without that is the case's own.
    first_channels = {re.sub(r"_\d{4}$", "_0000", name) for name in image_files}
    if first_channels <= set(image_files) and all(re.search(r"_\d{4}$", n) for n in image_files):
        raise InputError(
            f"Every image is named like {next(iter(image_files))}, as nnU-Net numbers channels; "
            "add --channel-suffix _0000 (or _0000,_0001 ... for more channels); where it is the "
            "number of a case, rename the images (case-0000 instead of case_0000)."
        )
    return {case: [path] for case, path in image_files.items()}


def with_splits(
    cases: pd.DataFrame,
    *,
    labelled: int | None = None,
    unlabelled: int | None = None,
    test: int = 0,
    test_names: Sequence[str] = (),
) -> pd.DataFrame:
    """Return `cases` (sorted by case) with the column split.

    Test: the cases in `test_names`, or the last `test` ones that have a label. Labelled: the first
    `labelled` of the other cases with a label, or all of them. Unlabelled: all others, or the
    first `unlabelled` of them, the rest being left out; they keep a label they have, as truth to
    score pseudo-masks with. Raises InputError where there are fewer cases than asked for.
    """
    unknown = sorted(set(test_names) - set(cases["case"]))
    if unknown:
        raise InputError(
            f"{len(unknown)} test cases have no image, first `{unknown[0]}`; correct the test list."
        )
    has_label = list(cases.loc[cases["label"] != "", "case"])
    unscored = sorted(set(test_names) - set(has_label))
    if unscored:
        print(
            f"WARNING: {len(unscored)} test cases have no label and cannot be scored, such as "
            f"{unscored[0]}."
        )
    test_cases = set(test_names) | set(has_label[max(0, len(has_label) - test) :])
    labelled_cases = [case for case in has_label if case not in test_cases][:labelled]
    taken = test_cases | set(labelled_cases)
    unlabelled_cases = [case for case in cases["case"] if case not in taken][:unlabelled]
    for wanted, found, what in (
        (test, test_cases, "test cases with a label"),
        (labelled, labelled_cases, "labelled cases beside the test cases"),
        (unlabelled, unlabelled_cases, "unlabelled cases beside the others"),
    ):
        if wanted is not None and len(found) < wanted:
            raise InputError(
                f"{wanted} {what} were asked for, but the folders have {len(found)}; ask for fewer."
            )
    split_of = (
        dict.fromkeys(labelled_cases, "labelled")
        | dict.fromkeys(unlabelled_cases, "unlabelled")
        | dict.fromkeys(test_cases, "test")
    )
    split = cases["case"].map(split_of)
    return cases.assign(split=split)[split.notna()][list(COLUMNS)]


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `images_of` takes its arguments from."""
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument(
        "--channel-suffix",
        type=_suffixes,
        default=[],
        metavar="S,S",
        help="what follows the case in image names, one a channel, e.g. _0000,_0001 (nnU-Net)",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `make-table`."""
    add_image_arguments(parser)
    parser.add_argument("--labels", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, help="the table to write (.tsv)")
    parser.add_argument(
        "--labelled",
        type=_count,
        metavar="N",
        help="a benchmark with labels for everything: only the first N cases are labelled",
    )
    parser.add_argument(
        "--unlabelled",
        type=_count,
        metavar="N",
        help="keep only the first N unlabelled cases and leave the others out",
    )
    test = parser.add_mutually_exclusive_group()
    test.add_argument(
        "--test", type=_count, default=0, metavar="N", help="the last N cases with a label are test"
    )
    test.add_argument(
        "--test-list", type=Path, metavar="FILE", help="test cases by name, one a line"
    )
    parser.add_argument(
        "--data-folder",
        type=Path,
        metavar="DIR",
        help="write paths relative to this folder (the setting data_folder); else absolute",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the table, read it back with every check, and print the number of cases by split."""
    if arguments.out.exists():
        raise InputError(
            f"{arguments.out} exists, and may hold what you wrote into it; remove it or give "
            "another --out."
        )
    if arguments.out.suffix not in (".tsv", ".csv"):
        raise InputError(f"{arguments.out} is not named .tsv or .csv; give such a name.")
    test_names = []
    if arguments.test_list is not None:
        if not arguments.test_list.is_file():
            raise InputError(f"The test list {arguments.test_list} does not exist; correct it.")
        try:
            # Editors on Windows put a mark before the first name.
            test_names = arguments.test_list.read_text(encoding="utf-8-sig").split()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{arguments.test_list} cannot be read as text ({error}); save it as UTF-8."
            ) from None
    cases = images_and_labels(
        arguments.images, arguments.labels, channel_suffixes=arguments.channel_suffix
    )
    table = with_splits(
        cases,
        labelled=arguments.labelled,
        unlabelled=arguments.unlabelled,
        test=arguments.test,
        test_names=test_names,
    )
    if arguments.data_folder is not None:
        for column in ("image", "label"):
            table[column] = [_relative(paths, arguments.data_folder) for paths in table[column]]
    write_table(table, arguments.out)
    try:
        checked = read_cases(arguments.out, arguments.data_folder)
    except InputError as error:
        arguments.out.unlink()
        raise InputError(
            f"{error} (That is about the table as it would have been; {arguments.out} was not "
            "written. Where all images have labels, say with --labelled and --test how many to "
            "use, or with --test-list which to test.)"
        ) from None
    names = set(checked["case"])
    strays = [
        (name, other)
        for name in checked["case"]
        if (other := OF_A_MASK.sub("", name)) != name and other in names
    ]
    if strays:
        print(
            f"WARNING: {len(strays)} cases look like masks of others, such as {strays[0][0]} of "
            f"{strays[0][1]}; keep masks in a folder of their own."
        )
    counts = [f"{(checked['split'] == split).sum()} {split}" for split in SPLITS]
    print(f"{arguments.out}: {', '.join(counts)}")


def _suffixes(text: str) -> list[str]:
    """Return the suffixes of a comma-separated list, for argparse."""
    return [suffix for suffix in text.split(",") if suffix]


def _count(text: str) -> int:
    """Return a whole number of cases, 0 or more, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of cases; give 0, 1, 2 ...")
    return int(text)


def _nifti_files(folders: Iterable[str | Path]) -> dict[str, str]:
    """Return name without suffix -> absolute path of the NIfTI files in some folders, sorted.

    Hidden files are left out: archives made on a Mac are full of `._case.nii.gz`.
    """
    found: dict[str, str] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            what = "is a file" if Path(folder).exists() else "does not exist"
            raise InputError(f"{folder} {what}; give the path of a folder.")
        others = []
        for entry in sorted(os.listdir(folder)):
            suffix = next((suffix for suffix in SUFFIXES if entry.endswith(suffix)), None)
            if entry.startswith("."):
                continue
            if suffix is None:
                others.append(entry)
                continue
            name = entry.removesuffix(suffix)
            path = os.path.abspath(os.path.join(folder, entry))
            if name in found:
                raise InputError(
                    f"{found[name]} and {path} have the same name; rename or remove one of them."
                )
            found[name] = path
        if others:
            print(
                f"{folder}: {len(others)} that do not end in .nii.gz or .nii are left out, such as "
                f"{others[0]}"
            )
    if not found:
        raise InputError(
            f"No file ends in .nii.gz or .nii in {', '.join(map(str, folders))}; convert the "
            "files to NIfTI and put them into the folder itself, or correct the path."
        )
    return found


def _channels_of_cases(files: dict[str, str], suffixes: Sequence[str]) -> dict[str, list[str]]:
    """Return case -> its channels' paths in the order of the suffixes."""
    strangers = [name for name in files if not name.endswith(tuple(suffixes))]
    if strangers:
        raise InputError(
            f"{len(strangers)} images end in none of {', '.join(suffixes)}, first "
            f"{files[strangers[0]]}; correct --channel-suffix."
        )
    cases = {
        name.removesuffix(suffix) for suffix in suffixes for name in files if name.endswith(suffix)
    }
    missing = [
        case + suffix for case in sorted(cases) for suffix in suffixes if case + suffix not in files
    ]
    if missing:
        raise InputError(
            f"{len(missing)} channels are missing, first {missing[0]}; add the files, or correct "
            "--channel-suffix."
        )
    return {case: [files[case + suffix] for suffix in suffixes] for case in cases}


def _relative(paths: str, folder: Path) -> str:
    """Return `;`-joined absolute paths relative to a folder; an empty cell stays empty."""
    if not paths:
        return ""
    return ";".join(os.path.relpath(path, folder.absolute()) for path in paths.split(";"))
