"""The peak memory of a recipe's training step, measured once and written beside its runs."""

from __future__ import annotations

from pathlib import Path

import torch

from locallearn.analysis.measured import step_path
from locallearn.engine import RunConfig, choose_device
from locallearn.engine.building import build_learner
from locallearn.engine.environment import describe_environment
from locallearn.engine.files import write_json
from locallearn.engine.graphs import NUM_WARM_UP_STEPS
from locallearn.engine.measuring import peak_memory_bytes
from locallearn.errors import UserError


def measure_peak(run: Path, config: RunConfig) -> None:
    """Take steps as such a run does, on noise, and write what the last one held at most.

    Arguments:
        run: its directory.
        config: its own.

    Raises:
        UserError: the run's device is not there, or tells nothing of its memory.
    """
    settings, inputs = config.settings, config.inputs
    place = choose_device(settings.device)
    if place == "mps":
        raise UserError("MPS does not tell how much memory a step holds.")
    assert settings.num_threads is not None
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)
    device = torch.device(place)
    num_classes = len(config.class_names)
    learner = build_learner(settings, inputs, num_classes, device=device, compile=settings.compile)
    images = torch.randn(settings.batch_size, inputs.num_channels, *inputs.image_size)
    labels = torch.arange(settings.batch_size) % num_classes
    images, labels = images.to(device), labels.to(device)
    for _ in range(NUM_WARM_UP_STEPS):  # allocate the optimizer's state, and compile
        learner.step(images, labels)
    peak = peak_memory_bytes(lambda: learner.step(images, labels), device)
    write_json(
        step_path(run),
        {
            "peak_activation_mib": peak / 2**20,
            "backend": settings.backend,
            "precision": settings.precision,
            "batch_size": settings.batch_size,
            "environment": describe_environment(place),
        },
    )
