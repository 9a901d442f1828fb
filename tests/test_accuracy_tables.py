"""The tables of the accuracy benchmark: which cases each labelled set has."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "accuracy.py"


@pytest.fixture
def made(tmp_path):
    """Return the folder of tables for sets of 2 and 1 labelled cases out of 6, two methods."""
    splits = ["labelled", "unlabelled", "labelled", "unlabelled", "unlabelled", "test"]
    rows = [(f"c{n}", f"c{n}.nii", f"l{n}.nii", split) for n, split in enumerate(splits)]
    cases = pd.DataFrame(rows, columns=["case", "image", "label", "split"])
    cases.sample(frac=1, random_state=0).to_csv(tmp_path / "cases.tsv", sep="\t", index=False)
    words = [sys.executable, SCRIPT, "--cases", tmp_path / "cases.tsv", "--labelled", "1", "2"]
    words += ["--sets", "0", "1", "--methods", "own", "paper:recipe=paper,rounds=5"]
    subprocess.run([*map(str, words), "--out", str(tmp_path / "heart")], check=True)
    return tmp_path / "heart"


def test_a_set_is_a_block_of_the_cases_in_order(made):
    for name, labelled in (("2_set0", "c0 c1"), ("2_set1", "c2 c3"), ("1_set1", "c1")):
        table = pd.read_csv(made / f"cases_{name}.tsv", sep="\t")
        assert " ".join(table[table["split"] == "labelled"]["case"]) == labelled
        assert table[table["split"] == "test"]["case"].tolist() == ["c5"]
        assert len(table) == 6


def test_methods_share_cases_and_seed_of_a_set(made):
    table = pd.read_csv(made / "experiments.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert len(table) == 2 * 2 * 2
    own, paper = table[table["cases"].str.contains("2_set1")].to_dict("records")
    assert own["experiment"] == "heart_2_set1_own"
    assert (own["group"], paper["group"]) == ("own, 2 labelled", "paper, 2 labelled")
    assert own["seed"] == paper["seed"] == "1"
    assert (own["recipe"], paper["recipe"], paper["rounds"]) == ("", "paper", "5")
