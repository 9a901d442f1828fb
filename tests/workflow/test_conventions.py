"""Conventions: in, the files of the repository; out, whether rules, pins and formats hold them."""

import argparse
import importlib.util
import inspect
import json
import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_executor_plugin_slurm import Executor, submit_string
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

from cotrain.__main__ import parsed
from cotrain.schema import settings_table
from cotrain.settings import Settings

CLONE = Path(__file__).parents[2]
WRITERS = ("write_settings", "write_verdicts")
"""Rules that print a few words into a file: there is nothing to measure."""
RULE_FILES = sorted((CLONE / "workflow/rules").glob("*.smk"))


def rules() -> dict[str, str]:
    """Return {name: text} of every rule under workflow/rules, all of which compute."""
    found = {}
    for path in RULE_FILES:
        for block in re.split(r"^rule ", path.read_text(), flags=re.MULTILINE)[1:]:
            found[block.split(":", 1)[0]] = block
    return found


def directives(rule: str) -> set[str]:
    """Return the names of a rule's directives."""
    return set(re.findall(r"^    (\w+):", rule, flags=re.MULTILINE))


@pytest.mark.parametrize("name", rules())
def test_every_rule_says_what_it_does_and_needs(name: str):
    rule = rules()[name]
    assert rule.split("\n", 1)[1].lstrip().startswith('"""')
    wanted = {"output", "params", "log", "conda", "shell"}
    if name not in WRITERS:
        wanted |= {"input", "benchmark", "threads", "resources"}
        assert "mem_mb=" in rule
        assert "runtime=" in rule
    assert wanted <= directives(rule)
    assert "script" not in directives(rule)


@pytest.mark.parametrize("name", [name for name in rules() if name not in WRITERS])
def test_every_rule_calls_one_command_with_one_option_a_line(name: str):
    shell = rules()[name].split('r"""\n', 1)[1].split('"""', 1)[0]
    if name == "describe_data":
        # What follows the command only shows what it has found.
        shell = shell.split("        # A log is not")[0]
    first, *lines = shell.strip().splitlines()
    assert re.fullmatch(r"cotrain [a-z-]+ \\", first)
    *options, log = [line.strip() for line in lines]
    assert log == ">{log:q} 2>&1"
    for option in options:
        assert re.fullmatch(r"(--[a-z-]+ \S+|\{params\.\w+\}) \\", option), option


@pytest.mark.parametrize("name", rules())
def test_every_path_is_quoted(name: str):
    shell = rules()[name].split("    shell:", 1)[1]
    assert re.findall(r"\{(?:input|output|log)[.\w]*\}", shell) == []
    paths_in_params = set(re.findall(r"^        (\w+)=subpath", rules()[name], flags=re.MULTILINE))
    unquoted = set(re.findall(r"\{params\.(\w+)\}", shell))
    assert not paths_in_params & unquoted


@pytest.mark.parametrize("name", rules())
def test_every_path_starts_with_its_experiment(name: str):
    for path in re.findall(r'"((?:results|logs|benchmarks)/[^"]*)"', rules()[name]):
        assert path.split("/")[1] in ("{experiment}", "{comparison}")


def test_the_pins_of_conda_and_pip_are_equal():
    project = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((CLONE / "envs/cotrain.yaml").read_text())
    (from_pip,) = [each["pip"] for each in environment["dependencies"] if isinstance(each, dict)]
    assert sorted(from_pip) == sorted(project["dependencies"])
    assert all("==" in each for each in from_pip)


def test_the_schema_is_that_of_the_settings():
    """Mend it with `cotrain schema > config/schema.json`."""
    assert json.loads((CLONE / "config/schema.json").read_text()) == Settings.model_json_schema()


def test_every_ready_config_is_valid():
    from cotrain.settings import load

    for path in (CLONE / "config").glob("*.yaml"):
        load(path)


def test_the_ready_configs_follow_the_built_in_recipe_but_for_its_length():
    for path in (CLONE / "config").glob("*.yaml"):
        cotraining = yaml.safe_load(path.read_text()).get("cotraining", {})
        assert cotraining.keys() <= {"last_epochs", "schedule_rounds"}, path


def test_the_profiles_hold_different_keys():
    """The default profile wins over `--profile slurm`, so a key in both would be dead there."""
    default = yaml.safe_load((CLONE / "profiles/default/config.yaml").read_text())
    slurm = yaml.safe_load((CLONE / "slurm/config.yaml").read_text())
    assert not default.keys() & slurm.keys()


def test_the_library_never_imports_snakemake():
    for path in (CLONE / "workflow/cotrain").glob("*.py"):
        assert not re.search(r"^\s*(import|from) snakemake", path.read_text(), re.MULTILINE), path


def test_the_speed_benchmark_gives_every_command_the_options_it_needs(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("speed", CLONE / "benchmarks/speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    called = []

    def parse(*words: object) -> None:
        called.append(parsed([str(word) for word in words]).command)

    monkeypatch.setattr(speed, "cotrain", parse)
    monkeypatch.setattr(speed, "read_table", lambda path: pd.DataFrame({"case": ["a"]}))
    arguments = argparse.Namespace(
        **{"threads": 1, "data_folder": None, "cases": None, "labels": None, "max_cases": 1},
        **{"channels": ["MRI"], "features": [8, 16]},
    )
    speed.prepare(arguments, tmp_path)
    assert {"check-data", "plan", "preprocess", "train", "export", "infer"} <= set(called)


def test_the_page_on_settings_has_every_setting():
    """Mend it with `make schema`."""
    page = (CLONE / "config/README.md").read_text()
    assert page.endswith("\n".join(settings_table()) + "\n")


@pytest.mark.parametrize("page", ["README.md", *("docs", "config", "results", "benchmarks")])
def test_no_documented_command_takes_its_target_for_a_settings_file(page: str):
    """`--configfile` takes several files: an option must follow it before a target does."""
    path = CLONE / page
    for each in [path] if path.is_file() else path.glob("*.md"):
        words = re.sub(r"[\s`]+", " ", each.read_text())
        assert re.findall(r"--configfile \S+ results/\S+", words) == [], each


@pytest.mark.parametrize("page", ["*.md", "docs/*.md", "config/*.md", "results/*.md"])
def test_no_table_is_torn_in_two(page: str):
    """An empty line between two rows shows the rest of a table as text."""
    for each in CLONE.glob(page):
        for table in re.findall(r"(?:^\|.*\n?)+", each.read_text(), re.MULTILINE):
            assert re.fullmatch(r"[|: -]+", table.splitlines()[1]), f"{each}: {table[:80]}"


def test_the_pause_between_looks_at_a_clusters_jobs_is_the_executors_own_method():
    """The Snakefile exchanges it: `look_at_jobs_as_often_as_asked` in command.smk."""
    source = inspect.getsource(RemoteExecutor._wait_for_jobs)
    assert source.count("await self.sleep()") == 1
    assert inspect.iscoroutinefunction(RemoteExecutor.sleep)
    assert isinstance(RemoteExecutor.next_seconds_between_status_checks, property)


def test_the_slurm_plugin_asks_and_submits_by_what_the_snakefile_exchanges():
    """`bear_with_a_silent_slurm` in command.smk."""
    asks = inspect.getsource(Executor.check_active_jobs)
    assert asks.count("await query_job_status(\n") == 1
    assert "if status_of_jobs is None and sacct_query_duration is None:" in asks
    assert vars(inspect.getmodule(Executor))["query_job_status"].__name__ == "query_job_status"
    assert "executor.submit(self.run_job, job)" in inspect.getsource(Executor._submit_job)
    of_arrays = inspect.getsource(Executor._submit_array_jobs)
    assert "executor.submit(self.run_array_jobs, jobs)" in of_arrays
    assert "self._executor.cancel()" in inspect.getsource(JobScheduler)


def test_jobs_in_the_queue_are_called_what_their_command_notes():
    """`take_over_from_a_dead_command` in command.smk notes the executor's `run_uuid`."""
    assert "--job-name {safe_quote(params.run_uuid)}" in inspect.getsource(submit_string)
    assert '"run_uuid": self.run_uuid,' in inspect.getsource(Executor.run_job)
    assert '"run_uuid": self.run_uuid,' in inspect.getsource(Executor.run_array_jobs)
