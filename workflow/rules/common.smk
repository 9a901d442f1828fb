"""What the rules ask: in, the settings and the case table; out, who needs which files.

Everything here is looked up by the wildcard {experiment}, and rounds are text ("00", "01", ...) as
in the paths. A network is *taught* in a round where it also learns from masks of unlabelled cases.
"""

import hashlib
import itertools
import json
import os
import shlex
import sys

import pandas as pd

from cotrain.cases import SPLITS, cases_of, read_cases
from cotrain.errors import InputError
from cotrain.experiments import experiments_of
from cotrain.review import masks_of, read_review
from cotrain.settings import (
    as_yaml,
    changes_since,
    check,
    refuse_missing_files,
    refuse_repeated_keys,
)
from snakemake.exceptions import WorkflowError


def profile_asked_for():
    """Return the profile of this command in a list: none where the path given does not hold it."""
    profile = os.environ.get("SNAKEMAKE_PROFILE", "")
    for word, following in itertools.pairwise([*sys.argv, ""]):
        if word.partition("=")[0] == "--profile":
            profile = word.partition("=")[2] or following
    path = Path(profile, "config.yaml")
    return [path] if profile and path.is_file() else []


def checked_settings():
    """Return {experiment: settings} from the configfile, and {experiment: group}."""
    if not config:
        # `snakemake --lint` needs no settings, and is known by leaving the environment unchecked.
        if not workflow.check_envvars:
            return {}, {}
        ready = sorted(
            path.name for path in Path(workflow.basedir, "config").glob("*.yaml")
        )
        raise InputError(
            "No settings were given; add --configfile with a file of your own or one of "
            f"{', '.join(ready)} in {Path(workflow.basedir, 'config')}."
        )
    source = ", ".join(map(os.path.relpath, workflow.configfiles)) or "--config"
    settings, groups = experiments_of(config, source=source)
    if workflow.is_main_process:
        for path in [*workflow.configfiles, *profile_asked_for()]:
            refuse_repeated_keys(path)
        for each in settings.values():
            refuse_missing_files(each, source=source)
    return settings, groups


def checked_cases():
    """Return {experiment: {split: rows of results/<experiment>/cases/<split>.tsv}}.

    Only the first reading looks for the files: the jobs of a cluster need not ask the file system
    again.
    """
    cases = {}
    for experiment, settings in SETTINGS.items():
        table = read_cases(
            settings.cases, settings.data_folder, check_files=workflow.is_main_process
        )
        transductive = settings.pool == "transductive"
        rows = {
            split: cases_of(table, split, transductive=transductive) for split in SPLITS
        }
        channels = table["image"].iloc[0].count(";") + 1
        if channels != len(settings.channels):
            raise InputError(
                f"{settings.cases} has {channels} image channels a case, `channels` names "
                f"{len(settings.channels)} ({', '.join(settings.channels)}); name each channel once."
            )
        if experiment in GROUPS and (rows["test"]["label"] == "").all():
            raise InputError(
                f"{experiment} has no test case with a label, and cannot be compared; give it one "
                f"in {settings.cases}, or leave it out of {config['experiments']}."
            )
        cases[experiment] = rows
    return cases


def last_round_of(experiment):
    """Return the round of the last training of 3D, which follows the others; None without one."""
    settings = SETTINGS[experiment]
    return f"{settings.rounds:02d}" if settings.cotraining.last_epochs else None


def rounds_of(experiment):
    """Return the rounds, "00", "01", ...; the last training of 3D counts as one more."""
    settings = SETTINGS[experiment]
    count = settings.rounds + bool(settings.cotraining.last_epochs)
    return [f"{number:02d}" for number in range(count)]


def checked_reviews():
    """Return {experiment: a person's verdicts, as rows}; none where there is no review table."""
    reviews = {}
    for experiment, settings in SETTINGS.items():
        cases = set(CASES[experiment]["unlabelled"]["case"])
        reviews[experiment] = read_review(settings.review, cases).to_dict("records")
        rounds = rounds_of(experiment)
        for row in reviews[experiment]:
            # As in the paths or without the zero; an empty cell is no round.
            if row["round"] not in {*rounds, *(str(int(round)) for round in rounds)}:
                raise InputError(
                    f"{settings.review}, case {row['case']}: there is no round {row['round']!r}, "
                    f"wanted one of {', '.join(rounds)}; correct it, or the verdict would go "
                    "unheard."
                )
    return reviews


def remembered(path):
    """Return SETTINGS, GROUPS, CASES and REVIEWS as the command wrote them."""
    read = json.loads(path.read_text())
    settings, groups, cases, reviews = {}, {}, {}, {}
    for experiment, each in read.items():
        settings[experiment] = check(each["settings"], source=str(path))
        if each["group"]:
            groups[experiment] = each["group"]
        cases[experiment] = {
            split: pd.DataFrame(rows, dtype=str)
            for split, rows in each["cases"].items()
        }
        reviews[experiment] = each["review"]
    return settings, groups, cases, reviews


try:
    command_has_read = Path(os.environ.get("COTRAIN_READ", ""))
    if command_has_read.is_file() and not workflow.is_main_process:
        SETTINGS, GROUPS, CASES, REVIEWS = remembered(command_has_read)
    else:
        SETTINGS, GROUPS = checked_settings()
        CASES = checked_cases()
        REVIEWS = checked_reviews()
except (InputError, PermissionError) as error:
    raise WorkflowError(str(error)) from None


# Lets envs/cotrain.post-deploy.sh find the package, wherever Snakemake is called from.
os.environ.update(COTRAIN_CLONE=str(workflow.basedir))


# ------------------------------------------------------------------------------- small words


def settings_of(wildcards):
    """Return the settings of the experiment."""
    return SETTINGS[wildcards.experiment]


def trained_in(experiment, rounds):
    """Return (network, round) of what is trained in these rounds."""
    return [
        (network, round)
        for round in rounds
        for network in ("2d", "3d")
        if network == "3d" or round != last_round_of(experiment)
    ]


def round_before(round):
    """Return the round before; round 00 has none, and asking for it is an error of ours."""
    if round == "00":
        raise ValueError("round 00 has no round before it")
    return f"{int(round) - 1:02d}"


def option(name, value):
    """Return `name value`, quoted for the shell, or nothing where there is no value."""
    return f"{name} {shlex.quote(str(value))}" if value else ""


def options(name, values):
    """Return `name value value ...`, quoted for the shell, or nothing where there are no values."""
    return f"{name} {shlex.join(map(str, values))}" if values else ""


def labels_of(wildcards):
    """Return the labels as name=value words."""
    return [f"{name}={value}" for name, value in settings_of(wildcards).labels.items()]


# ------------------------------------------------------------------------- cases and shards


def data_folder_of(wildcards):
    """Return where the case table's relative paths start: by default, beside the table."""
    settings = settings_of(wildcards)
    return str(settings.data_folder or settings.cases.parent)


def transductive_or_not(wildcards):
    """Return the option that counts test images as unlabelled ones, where the settings do."""
    return "--transductive" if settings_of(wildcards).pool == "transductive" else ""


def fingerprint_of(wildcards):
    """Return a hash that is another one wherever the list of a split is, or one of its files.

    As inputs, each job would ask the file system for all of them. This is asked for where the
    command was typed, and in jobs that check the data.
    """
    rows = CASES[wildcards.experiment][wildcards.split]
    files = images_and_truths_of(wildcards.experiment, wildcards.split)
    told = rows.to_csv(index=False) + as_they_lie(files)
    return hashlib.sha256(told.encode()).hexdigest()


def as_they_lie(paths):
    """Return size and time of files, for a parameter: what was moved into place is seen.

    As inputs, Snakemake would see only newer ones.
    """
    paths = [paths] if isinstance(paths, str) else paths
    return str([(each.st_size, each.st_mtime_ns) for each in map(os.stat, paths)])


def lists_of_cases(wildcards):
    """Return the lists of all splits."""
    return [f"results/{wildcards.experiment}/cases/{split}.tsv" for split in SPLITS]


def list_before(wildcards):
    """Return the list of the split before this one in labelled, unlabelled, test."""
    return lists_of_cases(wildcards)[: SPLITS.index(wildcards.split)][-1:]


def has_test_cases(experiment):
    """Return whether anything can be evaluated: test cases with a label."""
    return (CASES[experiment]["test"]["label"] != "").any()


def shards_of(experiment, split):
    """Return how many jobs share the cases of a split: never more than there are cases."""
    return max(1, min(SETTINGS[experiment].shards, len(CASES[experiment][split])))


def manifests_in(folders, experiment, split):
    """Return the manifests of all shards in folders of masks or of preprocessed cases."""
    shards = range(shards_of(experiment, split))
    return [f"{folder}/manifest-{shard}.tsv" for folder in folders for shard in shards]


def images_and_truths_of(experiment, split):
    """Return all channels of a split's images, and the labels of those that have one."""
    rows = CASES[experiment][split]
    images = [path for channels in rows["image"] for path in channels.split(";")]
    return images + [path for path in rows["label"] if path]


def labelled_arrays(wildcards):
    """Return the manifests of the preprocessed labelled cases."""
    folder = f"results/{wildcards.experiment}/preprocessed/labelled"
    return manifests_in([folder], wildcards.experiment, "labelled")


# ------------------------------------------------------------------------- who teaches whom


def is_taught(experiment, arm, network, round):
    """Return whether masks of unlabelled cases teach this network in this round."""
    if arm == "labels_only":
        return False
    cotraining = SETTINGS[experiment].cotraining
    if round == "00":
        return network == "3d" and cotraining.first_teacher == "2d"
    return network == "3d" or cotraining.teacher != "2d"


def folder_of_round(experiment, arm, network, round):
    """Return the folder of a round in which `network` of this arm was trained.

    A training that nobody has taught so far is the same in both arms: the control reuses it.
    """
    if network == "2d" and round == last_round_of(experiment):
        # Only 3D is trained then; the 2D network is still that of the round before.
        round = round_before(round)
    so_far = rounds_of(experiment)[: int(round) + 1]
    if not any(is_taught(experiment, "cotrain", network, each) for each in so_far):
        arm = "cotrain"
    return f"results/{experiment}/{arm}/round-{round}"


def mask_sets_behind(experiment, network, round):
    """Return the one or two folders of pseudo-masks that teach `network` in `round`."""
    cotrain = f"results/{experiment}/cotrain"
    if round == "00":
        return [f"{cotrain}/round-00/pseudo_2d"]
    before = round_before(round)
    last = round == last_round_of(experiment)
    # 2D is first in a round: it learns from masks of the round before, 3D from its newest ones.
    of_2d = f"{cotrain}/round-{before if network == '2d' or last else round}/pseudo_2d"
    of_3d = f"{cotrain}/round-{before}/pseudo_3d"
    teacher = SETTINGS[experiment].cotraining.teacher
    if teacher == "mean" or (last and teacher == "other"):
        return [of_2d, of_3d]
    if teacher == "2d" or (network == "2d") == (teacher == "self"):
        return [of_2d]
    return [of_3d]


def mask_set_teaching(experiment, network, round):
    """Return the folder of the masks that teach `network`: one set's own, or a mean of two."""
    behind = mask_sets_behind(experiment, network, round)
    if len(behind) == 1:
        return behind[0]
    return f"results/{experiment}/cotrain/round-{round}/teacher_{network}"


def training_settings_of(wildcards):
    """Return the settings that a training depends on."""
    last = wildcards.round == last_round_of(wildcards.experiment)
    stage = "train_last" if last else f"train_{wildcards.network}"
    return f"results/{wildcards.experiment}/settings/{stage}.yaml"


def audited_masks_for(wildcards):
    """Return the audit table of the masks that the network learns from, if it is taught."""
    experiment, arm, round = wildcards.experiment, wildcards.arm, wildcards.round
    if not is_taught(experiment, arm, wildcards.network, round):
        return []
    return (
        f"results/{experiment}/{arm}/round-{round}/audit/train_{wildcards.network}.tsv"
    )


def checkpoint_before(wildcards):
    """Return the network's checkpoint of the round before; round 00 starts without one."""
    if wildcards.round == "00":
        return []
    folder = folder_of_round(
        wildcards.experiment,
        wildcards.arm,
        wildcards.network,
        round_before(wildcards.round),
    )
    return f"{folder}/train_{wildcards.network}/checkpoint.pth"


def encoder_weights_for(wildcards):
    """Return the pretrained weights that the 2D network starts from; later rounds go on."""
    starts = wildcards.network == "2d" and wildcards.round == "00"
    if not starts or settings_of(wildcards).network_2d.weights == "random":
        return []
    return f"results/{wildcards.experiment}/weights/encoder.safetensors"


def weights_given_as_file(wildcards):
    """Return the path of the user's own weight file, where the weights are one."""
    return settings_of(wildcards).network_2d.weights_file or []


def own_network_of(wildcards):
    """Return the Python file of the user's own 3D network, where there is one."""
    return settings_of(wildcards).network_3d.architecture_file or []


def test_masks_to_average(wildcards):
    """Return all manifests of both networks' masks of the test cases."""
    experiment, arm, round = wildcards.experiment, wildcards.arm, wildcards.round
    folders = [
        f"{folder_of_round(experiment, arm, network, round)}/test_{network}"
        for network in ("2d", "3d")
    ]
    return manifests_in(folders, experiment, "test")


# ------------------------------------------------------------------------------------- audit


def manifests_of_teaching_masks(wildcards):
    """Return all manifests of the masks to audit; WorkflowError where none teach."""
    experiment, network, round = (
        wildcards.experiment,
        wildcards.network,
        wildcards.round,
    )
    if not is_taught(experiment, "cotrain", network, round):
        first = audits_of(experiment, ".html")[:1]
        raise WorkflowError(
            f"No masks teach {network} in round {round} of {experiment}, so that there is nothing "
            f"to audit; the first audit is {first[0] if first else 'in no round'}."
        )
    masks = mask_set_teaching(experiment, network, round)
    return manifests_in([masks], experiment, "unlabelled")


def folders_of(manifests):
    """Return the folders that manifests lie in, each once, in their order."""
    return list(dict.fromkeys(os.path.dirname(manifest) for manifest in manifests))


def manifests_behind_teaching_masks(wildcards):
    """Return all manifests of the pseudo-masks that the masks to audit come from."""
    folders = mask_sets_behind(wildcards.experiment, wildcards.network, wildcards.round)
    return manifests_in(folders, wildcards.experiment, "unlabelled")


def verdicts_on(wildcards):
    """Return a person's verdicts on the masks of this audit, or on those they come from."""
    experiment = wildcards.experiment
    folders = mask_sets_heard(experiment, wildcards.network, wildcards.round)
    return [
        row
        for row in REVIEWS[experiment]
        if mask_set_judged(experiment, row) in folders
    ]


def mask_sets_heard(experiment, network, round):
    """Return the folders of masks on which a verdict decides what `network` learns in `round`."""
    behind = mask_sets_behind(experiment, network, round)
    return {*behind, mask_set_teaching(experiment, network, round)}


def mask_set_judged(experiment, row):
    """Return the folder of the masks that a person's verdict is about."""
    return f"results/{experiment}/cotrain/{masks_of(row)}"


def review_for(wildcards):
    """Return the option with the verdicts on these masks, where there are any.

    Not the review table itself, in which a person may be writing while the audit runs.
    """
    folder = f"results/{wildcards.experiment}/cotrain/round-{wildcards.round}/audit"
    verdicts = f"{folder}/verdicts_{wildcards.network}.txt"
    return option("--review", verdicts if verdicts_on(wildcards) else None)


def verdicts_as_text(wildcards):
    """Return the verdicts on these masks as a table, for Snakemake to see when they change."""
    verdicts = pd.DataFrame(verdicts_on(wildcards))
    return "" if verdicts.empty else verdicts.to_csv(sep="\t", index=False)


def corrected_masks_for(wildcards):
    """Return the masks with which a person replaced some of these."""
    return [
        row["mask"] for row in verdicts_on(wildcards) if row["verdict"] == "replace"
    ]


# ------------------------------------------------------------------------------- evaluation


def manifests_of_test_masks(wildcards):
    """Return all manifests of the test masks of a network, or of the mean of both."""
    experiment, arm, network, round = (
        wildcards.experiment,
        wildcards.arm,
        wildcards.network,
        wildcards.round,
    )
    if network == "mean":
        folder = f"results/{experiment}/{arm}/round-{round}"
    else:
        folder = folder_of_round(experiment, arm, network, round)
    return manifests_in([f"{folder}/test_{network}"], experiment, "test")


def evaluations_of(experiment):
    """Return the tables of scores: both arms in every round, the means of 2D and 3D in the last."""
    if not has_test_cases(experiment):
        return []
    rounds = rounds_of(experiment)
    scored = [(network, round) for round in rounds for network in ("2d", "3d")]
    scored.append(("mean", rounds[-1]))
    return [
        f"results/{experiment}/evaluation/{arm}_{network}_round-{round}.tsv"
        for arm in ("cotrain", "labels_only")
        for network, round in scored
    ]


def curves_of(experiment):
    """Return the training curves of both arms; without test cases no control is trained."""
    arms = ["cotrain", "labels_only"] if has_test_cases(experiment) else ["cotrain"]
    curves = [
        f"{folder_of_round(experiment, arm, network, round)}/train_{network}/curve.csv"
        for arm in arms
        for network, round in trained_in(experiment, rounds_of(experiment))
    ]
    return list(dict.fromkeys(curves))


def taught_in(experiment):
    """Return the (network, round) of an experiment that masks teach, each of which has an audit."""
    return [
        (network, round)
        for network, round in trained_in(experiment, rounds_of(experiment))
        if is_taught(experiment, "cotrain", network, round)
    ]


def audits_of(experiment, suffix):
    """Return the audit tables (.tsv) or pages (.html) of all rounds."""
    return [
        f"results/{experiment}/cotrain/round-{round}/audit/train_{network}{suffix}"
        for network, round in taught_in(experiment)
    ]


def pseudo_masks_of(experiment, rounds):
    """Return the manifests of all networks' pseudo-masks of these rounds."""
    folders = [
        f"results/{experiment}/cotrain/round-{round}/pseudo_{network}"
        for network, round in trained_in(experiment, rounds)
    ]
    return manifests_in(folders, experiment, "unlabelled")


# ----------------------------------------------------------------------------------- report


def anneals_over_other_rounds(experiment):
    """Return whether the rate of co-training does not end where the rounds do.

    A single round on labels alone has no such rate, and the last training one of its own.
    """
    settings, last = SETTINGS[experiment], last_round_of(experiment)
    is_taught_in_rounds = any(round != last for _, round in taught_in(experiment))
    return (
        is_taught_in_rounds and settings.rounds != settings.cotraining.schedule_rounds
    )


def note_of(wildcards):
    """Return what every summary must say about the experiment."""
    settings, notes = settings_of(wildcards), []
    if settings.pool == "transductive":
        notes.append(
            "Transductive: the test images, without their labels, were among the images that got "
            "pseudo-masks."
        )
    if anneals_over_other_rounds(wildcards.experiment):
        notes.append(
            f"The rate anneals to 0 over {settings.cotraining.schedule_rounds} rounds "
            f"(cotraining.schedule_rounds), but {settings.rounds} were run."
        )
    last = last_round_of(wildcards.experiment)
    if last:
        notes.append(
            f"Round {last} is the last training, of the 3D network alone; 2D stands as round "
            f"{round_before(last)} left it."
        )
    return " ".join(notes)


def rounds_in_montage(experiment):
    """Return the first and the last round, and at most four between them."""
    rounds = rounds_of(experiment)
    shown = min(6, len(rounds))
    last = len(rounds) - 1
    return [rounds[round(step * last / max(1, shown - 1))] for step in range(shown)]


def case_in_montage(wildcards):
    """Return the first case that got pseudo-masks."""
    return CASES[wildcards.experiment]["unlabelled"].iloc[0]


def image_in_montage(wildcards):
    """Return the image, or the first of its channels."""
    return case_in_montage(wildcards)["image"].split(";")[0]


def truth_in_montage(wildcards):
    """Return the label, where the case has one."""
    return case_in_montage(wildcards)["label"] or []


def masks_in_montage(wildcards, input):
    """Return name=file of the case's mask in each of the mask sets."""
    case = case_in_montage(wildcards)["case"]
    named = []
    for folder in folders_of(input.manifests):
        network, round = folder[-2:].upper(), int(os.path.dirname(folder)[-2:])
        named.append(f"{network} round {round}={folder}/{case}.nii.gz")
    return named


def everything_asked_for(wildcards):
    """Return the last files of every chain; all others are made on the way."""
    files = []
    for experiment in SETTINGS:
        files += [
            *expand(rules.describe_data.output, experiment=experiment),
            *expand(rules.summarise.output, experiment=experiment),
            *expand(rules.draw_montage.output, experiment=experiment),
            *expand(rules.export.output, experiment=experiment),
            # Not only the pages: a table that a failed audit left out would not be missed.
            *audits_of(experiment, ".tsv"),
            *audits_of(experiment, ".html"),
            *pseudo_masks_of(experiment, rounds_of(experiment)),
        ]
    if GROUPS:
        files += expand(rules.compare.output, comparison=config["experiment"])
    return files


def compared_scores(wildcards):
    """Return the tables of scores of all experiments in the table."""
    return [table for experiment in GROUPS for table in evaluations_of(experiment)]


def compared_experiments(wildcards):
    """Return group:experiment of each experiment in the table."""
    return [f"{group}:{name}" for name, group in GROUPS.items()]


def last_checkpoint(wildcards, network="3d"):
    """Return the co-trained network that was trained last; that of 3D is the product."""
    last = rounds_of(wildcards.experiment)[-1]
    folder = folder_of_round(wildcards.experiment, "cotrain", network, last)
    return f"{folder}/train_{network}/checkpoint.pth"


def last_provenance(wildcards):
    """Return how the last checkpoint was made, which the exported model says, too."""
    return f"{os.path.dirname(last_checkpoint(wildcards))}/provenance.json"


# -------------------------------------------------------------------------- needs of a job


def gpus_wanted(wildcards):
    """Return 1 unless the settings say `device: cpu`.

    A cluster gives the job a GPU. A local run ignores a resource without a limit, so that `auto`
    simply runs on the CPU where there is no GPU.
    """
    return 0 if settings_of(wildcards).compute.device == "cpu" else 1


def priority_of_arm(wildcards):
    """Return a lower priority for the control: masks to audit are wanted first."""
    return 0 if wildcards["arm"] == "labels_only" else 1


def processes_of_training(wildcards):
    """Return how many processes train one network together, each with a GPU of its own."""
    return settings_of(wildcards).compute.gpus_per_training


def threads_of_training(wildcards):
    """Return the cores that a job asks for to train."""
    return threads_of_training_with(settings_of(wildcards))


def threads_of_training_with(settings):
    """Return the cores of a training: for a GPU as many as nnU-Net makes batches with by default."""
    on_gpu = settings.compute.device == "cuda"
    return (12 if on_gpu else 4) * settings.compute.gpus_per_training


def memory(mem_mb):
    """Return a function for the main memory of a job, in MB; a retry asks for more."""
    return lambda wildcards, attempt: attempt * mem_mb


def audit_mem_mb(wildcards, attempt):
    """Return the main memory of an audit, in MB: a corrected mask is preprocessed with its image."""
    return attempt * (12000 if corrected_masks_for(wildcards) else 4000)


def merge_mem_mb(wildcards, attempt):
    """Return the main memory of averaging masks, in MB; a retry asks for more.

    Of a CT of 512 x 512 x 400 voxels the soft masks held at a time have 200 MB a label.
    """
    return attempt * (4000 + 200 * max(0, len(settings_of(wildcards).labels) - 8))


def network_mem_mb(wildcards, attempt):
    """Return the main memory of a training or inference job; a retry asks for more.

    6 GB hold the CPU configurations. A job on a GPU plans for large patches and has processes
    that make batches beside it, which hold a probability for each label. Asks of a cluster only; a
    profile's `set-resources` overrides it.
    """
    if not gpus_wanted(wildcards):
        return attempt * 6000
    return attempt * (16000 + 1500 * max(0, len(settings_of(wildcards).labels) - 2))
