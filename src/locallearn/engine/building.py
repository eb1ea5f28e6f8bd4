"""What a config stands for: its data, its learner, its loaders."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
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
    load_dataset,
)
from locallearn.data.dataset import free_memory_bytes
from locallearn.data.loader import EpochLoader
from locallearn.engine.batch_norm import check_can_synchronize
from locallearn.engine.blocks import freeze, needs_batch, plan_blocks
from locallearn.engine.config import TrainConfig
from locallearn.engine.learner import COMPILE_AFTER, LocalLearner
from locallearn.engine.optimizers import optimizer_spec
from locallearn.engine.statistics import BATCH_STATISTICS_FROM
from locallearn.errors import UserError
from locallearn.kernels import choose_backend, missing_for
from locallearn.models import Block, build_model, is_foreign
from locallearn.models.sources import check_foreign, check_logits, model_digest
from locallearn.rules import HeadSpec, LatentHead, LocalRule

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


def choose_run_backend(
    settings: TrainConfig, dataset: Dataset, *, synchronize_batch_norm: bool = False
) -> tuple[str, str]:
    """The backend of a run, "auto" made definite, and why: on the CPU compiled where it will pay.

    Arguments:
        settings: resolved.
        dataset: what it trains on; tells how many steps there will be.
        synchronize_batch_norm: whether replicas normalise by whole batches.

    Raises:
        UserError: settings that synchronized BatchNorm does not go with.
    """
    assert settings.device is not None
    assert settings.epochs is not None
    if synchronize_batch_norm:
        check_can_synchronize(
            closed_form=settings.backend not in ("auto", "autograd"),
            is_compiled=settings.compile,
            num_accumulated=getattr(settings.build_rule(), "num_accumulated", 1),
        )
        return "autograd", "BatchNorm is synchronized"
    backend = choose_backend(settings.backend, settings.device)
    if settings.backend != "auto":
        return backend, "as asked"
    if backend != "compiled":
        missing = missing_for("compiled", settings.device) if settings.device == "cpu" else None
        return backend, f"auto: compiled {missing}" if missing else "auto: the fastest here"
    num_blocks, num_values = 0, 0
    if _is_latent(settings):
        count = _count_recognized if is_foreign(settings.model) else _count_own
        num_blocks, num_values = count(settings, dataset)
    if num_blocks == 0:
        return "autograd", "auto: rule and blocks have no closed form"
    total = num_values * len(dataset.train) * settings.epochs
    if total > COMPILE_AFTER * num_blocks:
        return "compiled", "auto: the run is long enough for compiling to pay"
    return "autograd", "auto: the run is too short for compiling to pay"


def _is_latent(settings: TrainConfig) -> bool:
    """Whether the rule's heads read pooled latents, of one block each."""
    rule = settings.build_rule()
    if not isinstance(rule, LocalRule) or settings.group_blocks > 1:
        return False
    return isinstance(rule.build_head(HeadSpec(4, 2, num_channels=4)), LatentHead)


def _count_own(settings: TrainConfig, dataset: Dataset) -> tuple[int, int]:
    """How many blocks of the package's network have a closed form, and values of z an image."""
    style = settings.block_style()
    if style.norm != "batch" or style.activation == "tanh":
        return 0, 0
    with torch.device("meta"):
        model = build_network(settings, dataset.inputs, dataset.num_classes)
        image = torch.empty(1, dataset.inputs.num_channels, *dataset.inputs.image_size)
        blocks = None
        if settings.trained_blocks != "all" and not needs_batch(model, settings.blocks):
            plan = plan_blocks(model, settings.blocks)
            plan = freeze(model, plan, settings.trained_blocks, image)
            blocks = [block.module for block in plan.blocks if not block.is_frozen]
        return count_normalized(model, image, blocks)


def _count_recognized(settings: TrainConfig, dataset: Dataset) -> tuple[int, int]:
    """The same of another model, whose blocks have to be found first."""
    with torch.random.fork_rng(devices=[]):  # the run's own weights are drawn later
        model = build_network(settings, dataset.inputs, dataset.num_classes)
    plan = plan_blocks(
        model,
        settings.blocks,
        inputs=example_input(dataset.inputs),
        num_classes=dataset.num_classes,
    )
    if settings.trained_blocks != "all":
        plan = freeze(model, plan, settings.trained_blocks, example_input(dataset.inputs))
    sizes = [
        block.view_shape[1:].numel()
        for block in plan.blocks
        if block.view_shape and block.closed_form() and not block.is_frozen
    ]
    return len(sizes), sum(sizes)


def example_input(inputs: InputSpec) -> Tensor:
    """A few images of noise, as the network will see them, on the CPU."""
    noise = torch.Generator().manual_seed(0)
    return torch.rand(3, inputs.num_channels, *inputs.image_size, generator=noise)


def count_normalized(
    model: nn.Module, example_input: Tensor, blocks: Sequence[nn.Module] | None = None
) -> tuple[int, int]:
    """How many of these blocks there are (None: of locallearn's own make), and how many values
    their BatchNorms see."""
    if blocks is None:
        blocks = [module for module in model.modules() if isinstance(module, Block)]
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts.append(inputs[0].numel())

    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.register_forward_pre_hook(count)
    with torch.no_grad():
        model.eval()(example_input)
    return len(blocks), sum(counts)


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
