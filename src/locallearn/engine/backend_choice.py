"""Which backend a run takes, where it is left to us.

On the CPU by counting: compiling takes a while, and pays in a run that is long enough. On CUDA by
measuring: of kernels that are both there, which are the faster depends on network, batch size,
precision and device.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from locallearn.data import Dataset
from locallearn.engine.batch_norm import check_can_synchronize
from locallearn.engine.blocks import freeze, needs_batch, plan_blocks
from locallearn.engine.building import (
    build_learner,
    build_network,
    example_input,
    resident_inputs,
    training_loader,
)
from locallearn.engine.config import TrainConfig
from locallearn.engine.graphs import NUM_WARM_UP_STEPS, GraphedStep, is_run_graphed
from locallearn.engine.learner import COMPILE_AFTER, LocalLearner
from locallearn.engine.team import Team
from locallearn.engine.timing import elapsed_ms, order_of_round
from locallearn.errors import UserError
from locallearn.kernels import (
    GPU_BACKENDS,
    Crops,
    choose_backend,
    fastest_candidates,
    missing_for,
)
from locallearn.models import Block, is_foreign
from locallearn.rules import HeadSpec, LatentHead, LocalRule

# A turn is several steps, between which the host runs ahead of the device as it does in training.
_STEPS_A_TURN = 4
_NUM_TURNS = 9
# Of slow steps fewer turns are taken, once they have lasted so long, but not fewer than these.
_LIMIT_SECONDS = 5.0
_FEWEST_TURNS = 3


def choose_run_backend(
    settings: TrainConfig, dataset: Dataset, team: Team | None = None
) -> tuple[str, str]:
    """The backend of a run, "auto" made definite, and why.

    On the CPU compiled where it will pay. On CUDA, where several can run, they are measured on the
    run's own network and batches, which takes a few steps of each.

    Arguments:
        settings: resolved.
        dataset: what it trains on.
        team: the processes that share the work; this one alone where None.

    Raises:
        UserError: settings that synchronized BatchNorm does not go with, or a model that can't be
            built.
    """
    assert settings.device is not None
    team = team or Team()
    if team.synchronizes_batch_norm:
        check_can_synchronize(
            closed_form=settings.backend not in ("auto", "autograd"),
            is_compiled=settings.compile,
            num_accumulated=getattr(settings.build_rule(), "num_accumulated", 1),
        )
        return "autograd", "BatchNorm is synchronized"
    backend = choose_backend(settings.backend, settings.device)
    if settings.backend != "auto":
        return backend, "as asked"
    if settings.device == "cuda":
        return _choose_on_cuda(settings, dataset, team)
    if backend == "compiled":
        return _choose_by_length(settings, dataset)
    missing = missing_for("compiled", settings.device) if settings.device == "cpu" else None
    return backend, f"auto: compiled {missing}" if missing else "auto: the fastest here"


# -- by measuring ---------------------------------------------------------------------------------


def _choose_on_cuda(settings: TrainConfig, dataset: Dataset, team: Team) -> tuple[str, str]:
    rivals = fastest_candidates("cuda")
    missing = [f"{name} {why}" for name in GPU_BACKENDS if (why := missing_for(name, "cuda"))]
    if len(rivals) < 2:
        return rivals[0] if rivals else "autograd", f"auto: {'; '.join(missing)}"
    try:
        return choose_measured(rivals, settings, dataset, team)
    finally:
        # What was measured is to leave the run the whole device.
        gc.collect()
        torch.cuda.empty_cache()


def choose_measured(
    rivals: Sequence[str], settings: TrainConfig, dataset: Dataset, team: Team
) -> tuple[str, str]:
    """The fastest of several backends at the run's own steps, and its time beside the others'.

    Steps are those of the run, its batches' augmentation among them, captured in a graph where it
    will capture them. Learners are thrown away; torch's random numbers stay where they are.

    Arguments:
        rivals: two or more, the first of which is taken where there is nothing to measure, or too
            little memory for several learners beside each other.
        settings: resolved.
        dataset: what it trains on.
        team: the processes that share the work; measured is one replica's part of a batch.

    Raises:
        UserError: what each of them raised; of one alone, the reason tells it.
    """
    device = torch.device(settings.device)
    steps: dict[str, Callable[[], object]] = {}
    failures: dict[str, UserError] = {}
    try:
        resident = replace(dataset, train=dataset.train.to(device))  # once for all of them
        for backend in rivals:
            try:
                with _seeded(settings.seed, device):
                    learner, step = _run_step(replace(settings, backend=backend), resident, team)
                    if "closed form" not in learner.block_paths.values():
                        return rivals[0], "auto: rule and blocks have no closed form to be measured"
                    # One more captures, and one more replays.
                    for _ in range(NUM_WARM_UP_STEPS + 2):
                        step()
            except UserError as error:
                failures[backend] = error
            else:
                steps[backend] = step
        if not steps:
            raise failures[rivals[0]]
        with _seeded(settings.seed, device):
            times_ms = medians_in_turn(steps, device)
    except torch.OutOfMemoryError:
        # A run holds one learner: what is too large beside another may well fit alone.
        chosen, *others = (name for name in rivals if name not in failures)
        beside = f"{' and '.join(others)} beside it" if others else "it"
        said = [f"too little memory to measure {beside}"]
    else:
        chosen = min(times_ms, key=times_ms.__getitem__)
        slower = sorted((ms, name) for name, ms in times_ms.items() if name != chosen)
        said = [f"{chosen} {times_ms[chosen]:.2f} ms a step"]
        said += [f"{name} {ms:.2f}" for ms, name in slower]
    said += [f"{name} can't be used ({error})" for name, error in failures.items()]
    return chosen, f"auto: {', '.join(said)}"


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of the CPU and of this device from a seed on; afterwards as they were before.

    torch.manual_seed would reseed every other device too, for good.
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _run_step(
    settings: TrainConfig, dataset: Dataset, team: Team
) -> tuple[LocalLearner, Callable[[], object]]:
    """A fresh learner, and a step of it on the run's first batch."""
    device = torch.device(settings.device)
    learner = build_learner(
        settings, dataset.inputs, dataset.num_classes, device=device, compile=settings.compile
    )
    loader = training_loader(settings, dataset, device)
    num_images = -(-loader.batches[0].stop // team.num_replicas)
    crops, labels = next(iter(loader.crops_of([slice(0, num_images)])))

    def make_batch(crops: Crops, labels: Tensor) -> tuple[Tensor, Tensor]:
        return loader.images(crops), labels

    if is_run_graphed(settings, learner, is_alone=team.is_alone):
        graphed = GraphedStep(learner, make_batch, resident_inputs(loader))
        return learner, lambda: graphed(crops, labels)
    return learner, lambda: learner.step(*make_batch(crops, labels))


def medians_in_turn(
    steps: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, float]:
    """Name -> median time of a step in ms, of turns of a few steps, one side after the other: so
    that a machine that slows down slows all of them.

    Arguments:
        steps: by name; warm already.
        device: where they run.
    """
    turns: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    began = time.perf_counter()
    for number in range(_NUM_TURNS):
        is_late = time.perf_counter() - began > _LIMIT_SECONDS
        if is_late and number >= _FEWEST_TURNS:
            break
        for name in order_of_round(order, number):
            turn = functools.partial(_take_turn, steps[name])
            turns[name].append(elapsed_ms(turn, device) / _STEPS_A_TURN)
    return {name: statistics.median(times) for name, times in turns.items()}


def _take_turn(step: Callable[[], object]) -> None:
    for _ in range(_STEPS_A_TURN):
        step()


# -- by counting ----------------------------------------------------------------------------------


def _choose_by_length(settings: TrainConfig, dataset: Dataset) -> tuple[str, str]:
    assert settings.epochs is not None
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
