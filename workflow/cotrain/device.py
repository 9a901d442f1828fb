"""Device and number format: in, the compute settings; out, where and how networks run."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TextIO

import torch
from torch import nn
from torch.nn.functional import batch_norm

from cotrain import slurm
from cotrain.errors import InputError
from cotrain.settings import Compute, Network


def device_of(compute: Compute) -> torch.device:
    """Return the device to run on: the first GPU that no other step on this machine has taken.

    Raises InputError as `devices_of` does.
    """
    return devices_of(compute, count=1)[0]


def devices_of(compute: Compute, *, count: int) -> list[torch.device]:
    """Return a device for each of so many processes: GPUs that no other step here has taken.

    The first is this process's own, and is made its current one.

    Raises InputError where cuda is asked for and not there, where there are fewer GPUs, where torch
    cannot compute on the first, or where SLURM gave the job a GPU that torch does not see: a
    training on the CPU there would take days.
    """
    if compute.device == "cpu":
        return [torch.device("cpu")] * count
    if torch.cuda.is_available():
        if count > torch.cuda.device_count():
            raise InputError(
                f"compute.gpus_per_training is {count}, but torch sees "
                f"{torch.cuda.device_count()} GPUs here; ask for fewer, or for another node."
            )
        devices = [torch.device("cuda", number) for number in free_gpus(count)]
        make_current(devices[0])
        return devices
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if slurm.own_job() and given not in ("", "-1", "NoDevFiles"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise InputError(
            f"SLURM gave this job the GPU {given} of {socket.gethostname()}, but torch sees none; "
            f"torch is built {built}, for which the node's driver may be too old (nvidia-smi "
            "tells): exclude that node, install a build for an older CUDA (docs/slurm.md, 3.), or "
            "set compute.device to cpu."
        )
    if compute.device == "cuda":
        raise InputError(
            "compute.device is cuda, but torch sees no GPU here; ask the scheduler for one, "
            "install a CUDA build of torch, or set compute.device to auto or cpu."
        )
    return [torch.device("cpu")] * count


def make_current(device: torch.device) -> None:
    """Make a GPU this process's own; raises InputError as `check_computes` does."""
    check_computes(device)
    # As nnU-Net does, because all patches of a network have one shape.
    torch.backends.cudnn.benchmark = True


def check_computes(device: torch.device) -> None:
    """Raise InputError where torch sees a GPU but cannot compute on it: it is full, or taken
    by a process that shares it with nobody, or torch was not built for its kind.
    """
    try:
        # Else the threads that pin memory would open the first GPU, too.
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        # A full GPU has no room for CUDA itself, which is not torch's OutOfMemoryError.
        if "out of memory" in said or "busy or unavailable" in said:
            raise InputError(
                f"The GPU of {socket.gethostname()} is full, or another process's own, before this "
                f"step has begun ({said}; nvidia-smi tells by whom); end that one, or ask for a "
                "GPU of your own."
            ) from None
        raise InputError(
            f"torch {torch.__version__} sees {torch.cuda.get_device_name(device)} on "
            f"{socket.gethostname()} but cannot compute there ({said}); take another kind of GPU, "
            "or install a build of torch for it (docs/slurm.md, 3.)."
        ) from None


@contextmanager
def telling_what_takes_less(network: Network) -> Iterator[None]:
    """Turn the lack of a GPU's memory into an InputError that says what takes less of it."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:2])
        less = "network_2d.batch_size or network_2d.patch_size"
        if network == "3d":
            less = "network_3d.gpu_memory_gb, network_3d.batch_size or network_3d.patch_size"
        raise InputError(
            f"The {network} network does not fit into the GPU's memory ({said}); ask for a larger "
            f"GPU, or give a smaller {less}, with which all is planned and trained anew."
        ) from error


@cache
def free_gpus(count: int) -> list[int]:
    """Return the numbers of visible GPUs that no other step of this user has taken, and take them.

    A step takes a GPU by a lock on a file, which the system releases when the process ends. Where
    too few are free, because a run was allowed more steps at a time than there are GPUs, the first
    of the others are shared. SLURM gives a job of its own its own GPUs, and there is nothing to
    choose.
    """
    visible = range(torch.cuda.device_count())
    free = []
    for number in visible if len(visible) > count else []:
        name = f"cotrain-{os.getuid()}-{torch.cuda.get_device_properties(number).uuid}.lock"
        file = open(Path(tempfile.gettempdir(), name), "w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _TAKEN.append(file)
        free.append(number)
        if len(free) == count:
            return free
    return [*free, *(number for number in visible if number not in free)][:count]


_TAKEN: list[TextIO] = []
"""Locked files, open for as long as this process lives."""


def precision_of(compute: Compute, device: torch.device, *, training: bool) -> str:
    """Return fp32, bf16 or fp16 for a device.

    auto is fp16 on a GPU, as nnU-Net trains and infers. On a CPU, training takes bf16 where that is
    faster, else fp32; inference takes fp32 as stock nnU-Net does, so that the exported model makes
    the same masks there.
    """
    if compute.precision != "auto":
        return compute.precision
    if device.type == "cuda":
        return "fp16"
    return "bf16" if training and is_bf16_faster(torch.cpu.get_capabilities()) else "fp32"


def is_bf16_faster(capabilities: Mapping[str, object]) -> bool:
    """Whether a CPU trains faster in bf16 than in fp32, by what torch says of it.

    With AMX it does, and with AMD's AVX-512 BF16: an EPYC trains 1.6 (2D) to 1.8 times (3D) as fast
    as in fp32. Intel's has not: a Xeon whose virtual machine hides its AMX multiplies matrices in
    bf16 at half the speed of fp32, and trains 1.2 (2D) to 1.4 times (3D) as long. Emulated bf16 is
    slower, too.
    """
    is_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return bool(capabilities.get("amx_bf16") or (is_amd and capabilities.get("avx512_bf16")))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision; switched off for fp32."""
    number = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=number, enabled=number is not None)


class _FullPrecision:
    """Mixed into a layer's class: computes in fp32 inside autocast."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


class _FullPrecisionWhenThin(_FullPrecision):
    """Mixed into a convolution's class: in fp32 where an axis is shorter than its kernel, or 3.

    There oneDNN's bf16 gradient of a 3D convolution's weights reads uninitialised memory, up to
    NaN or a crash (seen with torch 2.14.1 on a CPU with AVX-512 BF16).
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        axes = zip(features.shape[2:], self.kernel_size, strict=True)
        if any(size < max(3, kernel) for size, kernel in axes):
            return super().forward(features)
        return super(_FullPrecision, self).forward(features)


class _SampleBySample:
    """Mixed into an instance norm's class: normalises each sample as a batch of its own.

    The same function. torch's instance norm takes volumes of the channels-last layout only by
    copying them to the plain one and back; its batch norm takes them as they are.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                batch_norm(each, None, None, self.weight, self.bias, training=True, eps=self.eps)
                for each in features.split(1)
            ]
        )


def arrange_for_cpu(network: nn.Module) -> None:
    """Arrange a network so that a CPU trains it fastest and soundly; it computes the same.

    Measured with oneDNN 3.12 on a CPU with AVX-512: backward through narrow 3D convolutions is 2 to
    4 times faster in the channels-last layout, and through depthwise ones in fp32.
    """
    volumes = any(isinstance(module, nn.Conv3d) for module in network.modules())
    layout = torch.channels_last_3d if volumes else torch.channels_last
    network.to(memory_format=layout)
    for module in network.modules():
        kind = type(module)
        # The exact class: another one may compute more in its own forward.
        if kind is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = type(f"SampleBySample{kind.__name__}", (_SampleBySample, kind), {})
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.__class__ = type(f"FullPrecision{kind.__name__}", (_FullPrecision, kind), {})
        if isinstance(module, nn.Conv3d):
            module.__class__ = type(f"Thin{kind.__name__}", (_FullPrecisionWhenThin, kind), {})
