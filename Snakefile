"""Co-training of a 2D and a 3D network: in, a case table and settings; out, everything in results/.

One command runs it all: snakemake --configfile config/<name>.yaml
Every path starts with results/<experiment>; a round has two digits; two arms run side by side:
`cotrain`, and `labels_only`, its control. What a job needs is asked of workflow/rules/common.smk.
Every cluster job parses this file again: nothing heavier than pandas and pydantic is imported.
"""

import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.0")

# The rules run the installed package; parsing must also work where it is not installed.
sys.path.insert(0, str(Path(workflow.basedir, "workflow")))


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/command.smk"


wildcard_constraints:
    experiment="|".join(SETTINGS) or "[^/]+",
    comparison="[^/]+",
    arm="cotrain|labels_only",
    network="2d|3d",
    round=r"\d\d",
    shard=r"\d+",
    split="labelled|unlabelled|test",


localrules:
    all,
    write_settings,
    write_verdicts,
    fetch_weights,


rule all:
    """Everything that the settings ask for."""
    default_target: True
    input:
        everything_asked_for,


include: "workflow/rules/prepare.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/pseudo.smk"
include: "workflow/rules/audit.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


if workflow.is_main_process:
    refuse_needs_of_no_rule()
    refuse_walltimes_in_slurms_notation()
    refuse_targets_of_another_experiment()
    refuse_more_verdicts_than_a_command_holds()
    say_what_is_easily_missed()


onstart:
    if workflow.is_main_process:
        refuse_a_path_without_the_package()
        take_over_from_a_dead_command()
        say_that_jobs_run_here()
        say_where_threads_are_cut()
        say_how_gpus_are_used()
        remember_what_was_read()
        look_at_jobs_as_often_as_asked()
        bear_with_a_silent_slurm()


onsuccess:
    if workflow.is_main_process:
        for result in (
            *(
                f"results/{experiment}/summary/summary.txt"
                for experiment in SETTINGS
            ),
            f"results/{config['experiment']}/comparison/comparison.txt",
        ):
            if os.path.exists(result):
                print(f"Result: {result}", file=sys.stderr)
