"""What a config stands for: its data, its learner, its loaders."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.data import (
    SILENT,
    DataListener,
    Dataset,
    ImageLoader,
    ImageSource,
    InputSpec,
    MemoryImages,
    load_dataset,
)
from locallearn.data.dataset import free_memory_bytes
from locallearn.data.loader import EpochLoader
from locallearn.engine.config import TrainConfig
from locallearn.engine.learner import LocalLearner
from locallearn.engine.optimizers import optimizer_spec
from locallearn.engine.statistics import BATCH_STATISTICS_FROM
from locallearn.errors import UserError
from locallearn.models import build_model, is_foreign
from locallearn.models.sources import check_foreign, check_logits, model_digest

# Batches that BatchNorm's running statistics are re-estimated on before an evaluation, where the
# optimizer evaluates at other weights than it trains at (as the authors do).
RECALIBRATION_BATCHES = 50

_DIGEST_DIGITS = 12  # shown of a sha256


def check_model(settings: TrainConfig) -> None:
    """Whether the run's model can be built here, as far as that is known without building it.

    Arguments:
        settings: resolved.

    Raises:
        UserError: no such model, package or file, or a file that has changed since it was noted.
    """
    if is_foreign(settings.model):
        check_foreign(settings.model)
    if change := changed_file(settings):
        raise UserError(f"{change}. Restore the file, or start a new run with --out.")


def changed_file(settings: TrainConfig) -> str | None:
    """What to say of a model's file that is not what it was when the run was started; None of one
    that is, or that is not there.

    Arguments:
        settings: resolved when the run was started.
    """
    digest = model_digest(settings.model)
    if digest is None or digest == settings.model_digest:
        return None
    return (
        f"the file of model {settings.model} has changed since the run was started (sha256 "
        f"{digest[:_DIGEST_DIGITS]}, was {str(settings.model_digest)[:_DIGEST_DIGITS]})"
    )


def load_data(
    settings: TrainConfig,
    *,
    data_dir: str | None = None,
    cache: str | None = None,
    in_memory: bool | None = None,
    view: InputSpec | None = None,
    listener: DataListener = SILENT,
) -> Dataset:
    """The run's dataset.

    Arguments:
        settings: resolved.
        data_dir: where the files have moved.
        cache: where decoded images are kept instead; empty for nowhere.
        in_memory: whether its images were kept decoded when the run was started, which is to stay
            so; None decides by the memory that is free now, on the host and on the device.
        view: what the network sees, of a run that started from trained weights.
        listener: is told of downloads and of whatever else takes long.
    """
    limit = free_memory_bytes() // 4
    if settings.device == "cuda" and torch.cuda.is_available():  # it may be looked at elsewhere
        limit = min(limit, torch.cuda.mem_get_info()[0] // 4)
    if in_memory is not None:
        limit = sys.maxsize if in_memory else 0
    return load_dataset(
        settings.dataset,
        memory_limit_bytes=limit,
        data_dir=data_dir or settings.data_dir,
        augment=settings.augment,
        image_size=settings.image_size,
        limit_train=settings.limit_train,
        limit_test=settings.limit_test,
        val_split=settings.val_split,
        seed=settings.seed,
        cache=(settings.cache if cache is None else cache) or None,
        view=view if settings.start_from is not None else None,
        holds_out_every_class=settings.start_from is not None,
        listener=listener,
    )


def build_network(settings: TrainConfig, inputs: InputSpec, num_classes: int) -> nn.Module:
    """A fresh network as the settings say, on the device that is torch's default."""
    of_own_networks: dict[str, Any] = {}
    if not is_foreign(settings.model):
        of_own_networks = {
            "dropout": settings.dropout,
            "width": settings.width,
            "style": settings.block_style(),
        }
    return build_model(
        settings.model,
        num_classes=num_classes,
        in_channels=inputs.num_channels,
        image_size=inputs.image_size,
        **of_own_networks,
    )


def build_learner(
    settings: TrainConfig,
    inputs: InputSpec,
    num_classes: int,
    *,
    device: torch.device | None = None,
    compile: bool = False,
) -> LocalLearner:
    """A fresh learner as the settings say.

    Arguments:
        settings: resolved.
        inputs: what the network will see.
        num_classes: K.
        device: where it trains; the CPU where None.
        compile: whether to compile; not needed for inference alone.

    Raises:
        UserError: a model that can't be built, or does not fit the images or the classes.
    """
    network = build_network(settings, inputs, num_classes).to(device)
    example = example_input(inputs).to(device)
    if is_foreign(settings.model):
        check_logits(settings.model, network, example, num_classes)
        check_logits(settings.model, network, example, num_classes)
    return LocalLearner(
        network,
        settings.build_rule(),
        num_classes=num_classes,
        blocks=settings.blocks,
        trained_blocks=settings.trained_blocks,
        example_input=example,
        optimizer=settings.optimizer,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        group_blocks=settings.group_blocks,
        head_after_pool=settings.head_after_pool,
        precision=settings.precision,
        channels_last=settings.channels_last,
        backend="autograd" if device is None else settings.backend,
        compile=compile,
        recalibration_batches=0,  # the training loop does it, on more of them
    )


def example_input(inputs: InputSpec) -> Tensor:
    """A few images of noise, as the network will see them, on the CPU."""
    noise = torch.Generator().manual_seed(0)
    return torch.rand(3, inputs.num_channels, *inputs.image_size, generator=noise)


def training_loader(settings: TrainConfig, dataset: Dataset, device: torch.device) -> ImageLoader:
    """Shuffled and augmented batches of the training set."""
    return ImageLoader(
        dataset.train,
        dataset.inputs,
        batch_size=settings.batch_size,
        device=device,
        augmentation=dataset.augmentation,
        shuffle=True,
        seed=settings.seed,
        balance=settings.balance == "on",
        backend=settings.backend,
    )


def resident_inputs(loader: ImageLoader) -> list[Tensor]:
    """What is the same in all batches of a loader: a captured step reads it where it lies."""
    return [loader.source.pixels] if isinstance(loader.source, MemoryImages) else []


def evaluation_loader(
    source: ImageSource, dataset: Dataset, batch_size: int, device: torch.device
) -> ImageLoader:
    """Batches of a part in its own order, cropped at the centre."""
    return ImageLoader(source, dataset.inputs, batch_size=batch_size, device=device)


def needs_recalibration(settings: TrainConfig) -> bool:
    """Whether BatchNorm's running statistics are not those to evaluate with: of a schedule-free
    optimizer's training point, in batches that are large enough to be normalised by.

    Arguments:
        settings: resolved.
    """
    assert settings.optimizer is not None
    is_schedule_free = optimizer_spec(settings.optimizer).is_schedule_free
    return is_schedule_free and settings.batch_size >= BATCH_STATISTICS_FROM


def recalibrate(learner: LocalLearner, loader: EpochLoader[Any], epoch: int = 0) -> None:
    """Re-estimate BatchNorm's running statistics on the first batches of a training epoch."""
    batches = itertools.islice(loader.epoch(epoch), RECALIBRATION_BATCHES)
    # Of a loader for one of several replicas a batch may be empty.
    learner.recalibrate(images for images, labels in batches if len(labels))
