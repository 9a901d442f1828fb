"""The command itself: what it warns of, beside which others it may run, what its jobs go by."""

import asyncio
import difflib
import itertools
import os
import re
import shutil
import sys
import threading
from types import SimpleNamespace

from cotrain import slurm
from cotrain.errors import InputError
from cotrain.files import write_json
from cotrain.takeover import take_over
from snakemake.exceptions import WorkflowError

LONGEST_RUNTIME = 60 * 24 * 30
"""Minutes of a job that are hardly meant."""


def say_what_is_easily_missed():
    """Warn of settings that are allowed and hardly meant, before anything is computed."""
    for experiment, settings in SETTINGS.items():
        scheduled = settings.cotraining.schedule_rounds
        if settings.rounds < scheduled and anneals_over_other_rounds(experiment):
            logger.warning(
                f"{experiment}: the rate anneals to 0 over {scheduled} rounds "
                f"(cotraining.schedule_rounds), but only {settings.rounds} are run (rounds)."
            )
        if not taught_in(experiment):
            logger.warning(
                f"{experiment}: no network is taught by masks of unlabelled cases in so few "
                "rounds; set `rounds` to 2 at least."
            )
        for channel in settings.channels:
            if channel.casefold() != "ct" and re.search(
                r"(?<![a-z])ct(?![a-z])", channel.casefold()
            ):
                logger.warning(
                    f"{experiment}: nnU-Net normalises a channel as CT only where it is called CT, "
                    f"and {channel!r} image by image; rename it in `channels` if it is one."
                )
        say_what_will_be_made_again(experiment)
        if not REVIEWS[experiment]:
            continue
        heard = {
            folder
            for network, round in taught_in(experiment)
            for folder in mask_sets_heard(experiment, network, round)
        }
        for row in REVIEWS[experiment]:
            if mask_set_judged(experiment, row) not in heard:
                logger.warning(
                    f"{settings.review}: the verdict on {row['masks']} of {row['case']} in round "
                    f"{row['round']} changes nothing, because these masks teach no network."
                )
            elif not os.path.isdir(mask_set_judged(experiment, row)):
                logger.warning(
                    f"{settings.review}: {experiment} has not made the masks yet on which the "
                    f"verdict on {row['masks']} of {row['case']} in round {row['round']} is given; "
                    "verdicts on another experiment's masks do not belong here."
                )


def say_what_will_be_made_again(experiment):
    """Warn where another setting than before will replace trainings, which may have taken days."""
    results = Path("results", experiment)
    finished = len(list(results.glob("*/round-*/train_*/checkpoint.pth")))
    changes = changes_since(SETTINGS[experiment], results / "settings")
    if finished and changes:
        logger.warning(
            f"{experiment}: {'; '.join(changes)}. What was made with the old value is made again, "
            f"in place of what is there ({finished} finished trainings in all); give the file "
            "another `experiment` to keep that."
        )


def refuse_more_verdicts_than_a_command_holds():
    """Refuse what would end as `Argument list too long`: verdicts are written by a shell."""
    for experiment in SETTINGS:
        for network, round in taught_in(experiment):
            audit = SimpleNamespace(experiment=experiment, network=network, round=round)
            # Linux allows 131,072 bytes an argument, quotation marks and the command included.
            if len(verdicts_as_text(audit).encode()) > 120_000:
                raise WorkflowError(
                    f"{SETTINGS[experiment].review}: {len(verdicts_on(audit))} verdicts are on "
                    f"masks that teach the {network} network in round {round}, more than a command "
                    "holds (some 2,000 short rows); take cases that shall not teach out of "
                    f"{SETTINGS[experiment].cases} instead of excluding their masks."
                )


def refuse_needs_of_no_rule():
    """Refuse threads and resources for a rule's misspelt name: Snakemake ignores them."""
    rules = {rule.name for rule in workflow.rules}
    asked = workflow.resource_settings
    for name in {*asked.overwrite_resources, *asked.overwrite_threads} - rules:
        said = (
            f"set-resources or set-threads is for a rule `{name}`, which there is not; "
        )
        near = difflib.get_close_matches(name, rules, n=1)
        if near:
            raise WorkflowError(f"{said}did you mean `{near[0]}`?")
        # A person's profile may serve other workflows, too.
        logger.warning(f"{said}there are {', '.join(sorted(rules))}.")


def refuse_walltimes_in_slurms_notation():
    """Refuse a walltime of more than a month, which is hardly meant."""
    for name, needs in workflow.resource_settings.overwrite_resources.items():
        minutes = needs["runtime"].value if "runtime" in needs else 0
        if isinstance(minutes, int) and minutes > LONGEST_RUNTIME:
            raise WorkflowError(
                f"The runtime of {name} is {minutes} minutes, which is {minutes // 1440} days; give "
                "it in minutes or as 24h or 2d (YAML takes 24:00:00 for a number of base 60)."
            )


def names_of_results():
    """Return the names that folders of results have: of all experiments, and of their comparison."""
    return [*SETTINGS, *([config["experiment"]] if GROUPS else [])]


def refuse_targets_of_another_experiment():
    """Refuse a file of an experiment that the settings do not name: no rule makes it."""
    known = names_of_results()
    for before, word in itertools.pairwise(sys.argv):
        parts = Path(word).parts
        # What follows an option directly is its value.
        if parts[:1] == ("results",) and len(parts) > 2 and not before.startswith("-"):
            if known and parts[1] not in known:
                raise WorkflowError(
                    f"{word} is of the experiment {parts[1]}, but the settings are those of "
                    f"{', '.join(known)}; correct the target, or `experiment`."
                )


def refuse_a_path_without_the_package():
    """Refuse to start where no job would find the command `cotrain`."""
    if not (shutil.which("cotrain") or workflow.deployment_settings.deployment_method):
        raise WorkflowError(
            "The command cotrain is not on the path, and all steps need it; activate its "
            "environment first (. .venv/bin/activate)."
        )


def runs_here():
    """Return whether jobs run on this machine, and not on a cluster's."""
    return not workflow.executor_plugin.common_settings.non_local_exec


def say_where_threads_are_cut():
    """Warn where a cluster's jobs get fewer threads because the login node has few cores."""
    if runs_here() or "train" in workflow.resource_settings.overwrite_threads:
        return
    for experiment, settings in SETTINGS.items():
        threads = threads_of_training_with(settings)
        if workflow.cores < threads:
            logger.warning(
                f"A training of {experiment} gets {workflow.cores} of {threads} threads, because "
                f"this machine has no more cores; give --cores {threads}, or more."
            )
            return


def say_that_jobs_run_here():
    """Warn of trainings on a cluster's login node, where --profile slurm was forgotten."""
    may_be_forgotten = shutil.which("sbatch") and "SLURM_JOB_ID" not in os.environ
    if not (runs_here() and may_be_forgotten):
        return
    if any(job.rule.name == "train" for job in workflow.dag.needrun_jobs()):
        logger.warning(
            "All steps run on this machine, and none in SLURM's queue; on a login node end this "
            "by Ctrl+C and add --profile slurm."
        )


def say_how_gpus_are_used():
    """Warn where this machine's jobs may share a GPU and its memory, or leave GPUs unused."""
    if not runs_here():
        return
    devices = {settings.compute.device for settings in SETTINGS.values()}
    if not shutil.which("nvidia-smi"):
        if "cuda" in devices:
            logger.warning(
                "compute.device is cuda, but this machine has no nvidia-smi: without a GPU the "
                "first training will stop; on a login node add --profile slurm."
            )
        return
    if "cpu" in devices and len(devices) == 1:
        return
    if "gpu" not in workflow.global_resources:
        logger.warning(
            "As many jobs as there are cores may share a GPU, and run out of its memory; give "
            "--resources gpu=1, or as many as this machine has."
        )
        return
    if "train" in workflow.resource_settings.overwrite_threads:
        return
    gpus, cores = workflow.global_resources["gpu"].value, workflow.cores
    # Experiments of a table mostly train alike: what holds for all of them is said of the first.
    trained_alike = {}
    for experiment, settings in SETTINGS.items():
        threads = min(cores, threads_of_training_with(settings))
        trained_alike.setdefault(
            (settings.compute.gpus_per_training, threads), experiment
        )
    for (each, threads), experiment in trained_alike.items():
        at_a_time = cores // threads
        if at_a_time < gpus // each:
            logger.warning(
                f"Of {gpus} GPUs {at_a_time * each} can be used at a time: a training of "
                f"{experiment} takes {threads} of {cores} cores; give --set-threads "
                f"train={max(1, cores // (gpus // each))}."
            )


def folders_to_make(experiment):
    """Return the folders in which this command will make files: what is there now is outdated."""
    return sorted(
        {
            os.path.dirname(path)
            for job in workflow.dag.needrun_jobs()
            for path in job.output
            if path.startswith(f"results/{experiment}/")
        }
    )


def take_over_from_a_dead_command():
    """Refuse to run beside a living command; cancel what a dead one left in the cluster's queue."""
    # What the SLURM plugin calls all jobs of this command; a local executor has none.
    run = getattr(workflow.scheduler._executor, "run_uuid", "")
    try:
        take_over(
            {name: folders_to_make(name) for name in names_of_results()},
            run=run,
            say=logger.warning,
        )
    except InputError as error:
        raise WorkflowError(str(error)) from None


def look_at_jobs_as_often_as_asked():
    """Let --seconds-between-status-checks bound the pause between two looks at a cluster's jobs.

    Version 2.8.0 of the SLURM plugin waits 10 s longer each time, up to 180 s, whatever that option
    says (its issue 319), so that the end of each step of a round is noticed late.
    """
    if not runs_here():
        executor = workflow.scheduler._executor
        longest = workflow.remote_execution_settings.seconds_between_status_checks
        executor.sleep = lambda: asyncio.sleep(
            min(longest, executor.next_seconds_between_status_checks)
        )


def bear_with_a_silent_slurm():
    """Ask for the jobs' states until SLURM answers, and wait before a job is submitted again.

    Version 2.8.0 of the plugin asks five times in a second, then forgets all jobs and waits for
    ever; and Snakemake submits a job that was not taken again at once, so that a controller that is
    started anew would use up all retries.
    """
    if workflow.executor_plugin.name != "slurm":
        return
    executor = workflow.scheduler._executor
    plugin = sys.modules[type(executor).__module__]
    query, cancel = plugin.query_job_status, executor.cancel
    pause = workflow.remote_execution_settings.seconds_between_status_checks
    squeue = plugin.query_job_status_squeue(executor.run_uuid)
    interrupted = threading.Event()

    async def query_until_answered(command, log):
        while not interrupted.is_set():
            # When the controller is away, the plugin asks sacct, which a cluster may not have.
            for each in (command, squeue):
                answer = await query(each, log)
                if answer != (None, None):
                    return answer
            log.warning("SLURM does not say how the jobs are; asking again.")
            await asyncio.sleep(pause)
        return None, None

    def wait_and_submit(submit, asked, attempt):
        interrupted.wait((attempt - 1) * pause)
        while not (interrupted.is_set() or slurm.answers()):
            logger.warning("SLURM does not answer; what is to be submitted waits.")
            interrupted.wait(pause)
        if not interrupted.is_set():
            submit(asked)

    def again_later(submit):
        def submit_or_wait(asked):
            jobs = asked if isinstance(asked, list) else [asked]
            attempt = max(job.attempt for job in jobs)
            if attempt == 1:
                submit(asked)
            else:
                # Not in the plugin's few threads, where the submissions of others would wait, too.
                words = (submit, asked, attempt)
                threading.Thread(
                    target=wait_and_submit, args=words, daemon=True
                ).start()

        return submit_or_wait

    def cancel_and_ask_no_more():
        interrupted.set()
        cancel()
        # Asked for just now, jobs are not in the plugin's list.
        trouble = slurm.cancel_run(executor.run_uuid)
        if trouble:
            logger.warning(
                f"Jobs may run on ({trouble}); the next command cancels them."
            )

    plugin.query_job_status = query_until_answered
    executor.run_job = again_later(executor.run_job)
    executor.run_array_jobs = again_later(executor.run_array_jobs)
    executor.cancel = cancel_and_ask_no_more


def remember_what_was_read():
    """Write the settings, and the rows of the case and review tables, for this command's jobs.

    A cluster's jobs read the Snakefile again, when a person may be editing these files: a row half
    typed would fail all that start, and fewer cases or more shards would share them out anew.
    """
    read = {
        experiment: {
            "settings": settings.model_dump(mode="json"),
            "group": GROUPS.get(experiment),
            "cases": {
                split: rows.to_dict("list") for split, rows in CASES[experiment].items()
            },
            "review": REVIEWS[experiment],
        }
        for experiment, settings in SETTINGS.items()
    }
    path = Path(".snakemake", f"read-{config['experiment']}.json").absolute()
    write_json(read, path)
    # Jobs do not go by the name alone: what lies there may be from an earlier command.
    os.environ.update(COTRAIN_READ=str(path))
