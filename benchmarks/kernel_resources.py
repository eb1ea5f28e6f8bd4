"""What the CUDA kernels take of a multiprocessor: registers of a thread, shared memory, spills.

python benchmarks/kernel_resources.py [--architectures sm_80,sm_90,sm_100] [--json FILE.json]

Compiles, with NVRTC and for no device in particular, every kernel that a step of SmallConv, VGG8
and MobileNetV1 launches, and what the odd cases launch: images whose cells overlap, many classes,
channels that no wide access fits. Needs the extra locallearn[cuda], and no driver. Ends with 1
where a kernel spills.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import locallearn.kernels.cuda as kernels
from locallearn import LocalLearner, build_model
from locallearn.engine.environment import describe_environment
from locallearn.engine.files import write_json
from locallearn.kernels import ChannelStats, Crops, PeriodicBasis, ScheduleFreeState
from locallearn.kernels.cuda import launching
from locallearn.kernels.cuda.compilation import Program, options_for, source_text

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Name, height and width of the images, and rule: DRTP has no latent, and so other kernels. At 28
# VGG8's cells overlap.
MODELS = (
    ("smallconv", 32, "lls"),
    ("smallconv", 32, "drtp"),
    ("vgg8", 32, "lls"),
    ("vgg8", 28, "lls"),
    ("mobilenet-v1", 128, "lls"),
)
_BATCH_SIZE = 4  # what a kernel is compiled for does not depend on it
_REPORT = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


class Launched(NamedTuple):
    """A kernel, and what it is compiled from."""

    program: Program
    kernel: str


class Resources(NamedTuple):
    """Of one kernel for one architecture: registers of a thread, and bytes."""

    kernel: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int  # without what a launch adds


@contextmanager
def noted(launches: list[Launched]) -> Iterator[None]:
    """Launches are noted meanwhile, and not done: what the ops return is not written."""

    def note(program: Program, name: str, *others: object) -> None:
        launches.append(Launched(program, name))

    with (
        mock.patch.object(launching, "run", note),
        mock.patch.object(launching, "_current_device", return_value=-1),  # the CPU's number
    ):
        yield


def launches_of_models() -> list[Launched]:
    """What a step of each model launches, each once."""
    launches: list[Launched] = []
    on_no_device = mock.patch("locallearn.engine.learner.choose_backend", return_value="cuda")
    with noted(launches), on_no_device:
        for name, size, rule in MODELS:
            for precision in ("fp32", "bf16"):
                model = build_model(name, image_size=size)
                learner = LocalLearner(
                    model, rule, precision=precision, backend="cuda", recalibration_batches=0
                )
                learner.step(torch.zeros(_BATCH_SIZE, 3, size, size), torch.arange(_BATCH_SIZE))
    return list(dict.fromkeys(launches))


def launches_of_odd_cases() -> list[Launched]:
    """Overlapping cells, large max-pools, channels that fit no wide access, bases made on the fly,
    many classes, many rows, float16, crops; each once."""
    launches: list[Launched] = []
    with noted(launches):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for num_channels in (3, 2, 4, 8):
                for max_pool in (1, 2, 3):
                    _launch_block(dtype, num_channels, max_pool)
            _launch_crops(dtype)
        parameters = [torch.empty(10), torch.empty(8)[1:]]  # the second lies on no 16 bytes
        for group in (parameters[:1], parameters):
            kernels.schedulefree_step(
                *[group] * 4,
                ScheduleFreeState(*torch.empty(4, dtype=torch.float64)),
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=0.0,
            )
    return list(dict.fromkeys(launches))


def _launch_block(dtype: torch.dtype, num_channels: int, max_pool: int) -> None:
    z = torch.empty(64, num_channels, 65, 65, dtype=dtype)
    z = z.contiguous(memory_format=torch.channels_last)
    of_channel = torch.empty(num_channels)
    stats = ChannelStats(of_channel, of_channel)
    options = {"negative_slope": 0.01}
    kernels.channel_stats(z, eps=1e-5)
    kernels.norm_backward(z, z, stats, of_channel, of_channel, **options)
    labels = torch.zeros(len(z), dtype=torch.int64)
    for latent_size in (2, 5):  # cells that overlap, and that don't
        _, moments = kernels.block_forward(
            z, stats, *[of_channel] * 2, latent_size=latent_size, max_pool=max_pool, **options
        )
        kernels.block_backward(z, moments.s0, stats, *[of_channel] * 4, **options)
        length = num_channels * latent_size**2
        for num_classes in (10, 1000):
            phases = torch.empty(num_classes, dtype=torch.float64)
            for projection in (
                PeriodicBasis(phases, phases, length, is_square=True),
                torch.zeros(num_classes, length),
            ):
                kernels.local_head(
                    moments,
                    *[of_channel] * 2,
                    projection,
                    labels,
                    normalize=True,
                    temperature=0.5,
                )


def _launch_crops(dtype: torch.dtype) -> None:
    numbers = torch.zeros(_BATCH_SIZE, dtype=torch.int64)
    crops = Crops(
        pixels=torch.empty(1000, 3, dtype=torch.uint8),
        offsets=numbers,
        heights=numbers,
        widths=numbers,
        top=numbers,
        left=numbers,
        flip=numbers > 0,
        box=torch.empty(_BATCH_SIZE, 4, dtype=torch.int32),
    )
    kernels.augment(crops, torch.empty(3), torch.empty(3), size=(32, 32), dtype=dtype)


def programs_of(launches: Sequence[Launched]) -> list[Program]:
    return list(dict.fromkeys(launched.program for launched in launches))


def parse_report(report: str) -> list[Resources]:
    """What ptxas says with -v, a line of values for each kernel and architecture."""
    found = []
    for kernel, architecture, *numbers, rest in _REPORT.findall(report):
        stack, stores, loads, registers = map(int, numbers)
        shared = _SHARED.search(rest)
        found.append(
            Resources(
                kernel,
                architecture,
                registers,
                stack,
                stores + loads,
                int(shared[1]) if shared else 0,
            )
        )
    return found


def compile_for(program: Program, architecture: str, *more: str) -> tuple[bytes, list[Resources]]:
    """The machine code, and of each of its kernels what it takes.

    Arguments:
        program: what.
        architecture: for what, as "sm_90".
        more: options of ptxas.
    """
    from cuda.core import Program as Source

    options = options_for(program, architecture, ptxas_options=("-v", *more))
    log = io.StringIO()
    code = Source(source_text(program.source), "c++", options).compile("cubin", logs=log)
    resources = parse_report(log.getvalue())
    assert resources, log.getvalue()
    return code.code, resources


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--json")
    given = parser.parse_args()
    from cuda.bindings import nvrtc

    of_models = launches_of_models()
    launches = list(dict.fromkeys([*of_models, *launches_of_odd_cases()]))
    _, *version = nvrtc.nvrtcVersion()
    record: dict[str, Any] = {
        "environment": describe_environment("cpu", "nvidia-cuda-nvrtc"),
        "nvrtc": ".".join(map(str, version)),
        "kernels": [],
    }
    for program in programs_of(launches):
        for architecture in given.architectures.split(","):
            for resources in compile_for(program, architecture)[1]:
                launched = Launched(program, resources.kernel)
                if launched not in launches:  # its neighbours in the file are
                    continue
                record["kernels"].append(
                    {"source": program.source, "constants": dict(program.constants)}
                    | resources._asdict()
                    | {"by_a_model": launched in of_models}
                )
    if given.json is not None:
        write_json(Path(given.json), record)
    spilling = [k for k in record["kernels"] if k["spill_bytes"] or k["stack_bytes"]]
    most = max(k["registers"] for k in record["kernels"])
    print(
        f"{len(record['kernels'])} kernels of {len(programs_of(launches))} sets of constants: at "
        f"most {most} registers, {len(spilling)} spill"
    )
    for kernel in spilling:
        print(kernel)
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
