"""Tables for judging methods over labelled sets: in, a case table; out, tables of experiments.

    python benchmarks/accuracy.py --cases config/cases/left_atrium_4.tsv --out data/left_atrium
    snakemake --configfile config/left_atrium_4.yaml --set-threads train=1 --config \\
        data_folder=/path/to/LeftAtrium_1.25mm experiment=left_atrium_sets \\
        experiments=data/left_atrium/experiments.tsv

Which cases are labelled moves a result more than the method does, so a method is judged over sets:
of the cases that are not for testing, in the order of their names, set k labels the k-th block of
n. Each set has its own seed, k, the same one for every method. The workflow does all else, and
`results/<experiment>/comparison/` says what came out.
"""

import argparse
from pathlib import Path

import pandas as pd

from cotrain.errors import InputError
from cotrain.files import read_table, write_table


def labelled_block(cases: pd.DataFrame, *, labelled: int, block: int) -> pd.DataFrame:
    """Return a case table with the `block`-th block of so many cases labelled, the rest not.

    Raises InputError where there are not as many cases.
    """
    test = cases[cases["split"] == "test"]
    others = cases[cases["split"] != "test"].sort_values("case", ignore_index=True)
    if (block + 1) * labelled > len(others):
        raise InputError(
            f"Set {block} of {labelled} labelled cases needs {(block + 1) * labelled} cases that "
            f"are not for testing, but there are {len(others)}; ask for fewer sets."
        )
    others["split"] = "unlabelled"
    others.loc[block * labelled : (block + 1) * labelled - 1, "split"] = "labelled"
    return pd.concat([others, test], ignore_index=True)


def method_of(word: str) -> tuple[str, dict[str, str]]:
    """Return name and settings of `name` or `name:setting=value,setting=value`."""
    name, _, settings = word.partition(":")
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    for setting, equals, _ in pairs:
        if not equals:
            raise InputError(f"The method {word!r} has {setting!r}, wanted setting=value.")
    return name, {setting: value for setting, _, value in pairs}


def main() -> None:
    """Write `cases_<n>_set<k>.tsv` and `experiments.tsv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=Path, required=True, help="case table with labels for all")
    parser.add_argument("--labelled", type=int, nargs="+", default=[4], help="labelled cases")
    parser.add_argument("--sets", type=int, nargs="+", default=[0, 1, 2], help="blocks of cases")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["own"],
        help="name, or name:setting=value,...; e.g. own paper:recipe=paper",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args()
    cases = read_table(arguments.cases)
    rows = []
    for labelled in arguments.labelled:
        for block in arguments.sets:
            table = arguments.out / f"cases_{labelled}_set{block}.tsv"
            write_table(labelled_block(cases, labelled=labelled, block=block), table)
            for word in arguments.methods:
                method, settings = method_of(word)
                rows.append(
                    {
                        "experiment": f"{arguments.out.name}_{labelled}_set{block}_{method}",
                        "group": f"{method}, {labelled} labelled",
                        "seed": block,
                        "cases": table,
                        **settings,
                    }
                )
    write_table(pd.DataFrame(rows).fillna(""), arguments.out / "experiments.tsv")
    print(f"{len(rows)} experiments in {arguments.out / 'experiments.tsv'}")


if __name__ == "__main__":
    main()
