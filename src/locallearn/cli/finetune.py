"""`locallearn finetune`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from locallearn.cli.console import make_observer
from locallearn.cli.launching import check_is_alone
from locallearn.cli.naming import file_name
from locallearn.cli.signals import noting_signals
from locallearn.errors import UserError

if TYPE_CHECKING:
    from locallearn.engine import RunConfig, Trainer
    from locallearn.engine.finetuning import FineTuning

_NOT_SETTINGS = ("source", "out", "resume", "quiet", "balance", "image_cache", "cache")
_MAX_CLASSES_ON_A_LINE = 12


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


_SOURCE, _DATA, _FIT, _OPTIM = "Weights", "Data", "Memory", "Training"
_COMPUTE, _RUN = "Computation", "Run"


def finetune(
    ctx: typer.Context,
    source: Annotated[
        str | None,
        _option(
            "Where the weights come from: a run directory, checkpoint.pt or model.safetensors; or "
            "torchvision:NAME@WEIGHTS, timm:NAME@WEIGHTS, where WEIGHTS is the name of published "
            "ones (DEFAULT, IMAGENET1K_V1; pretrained) or a file with a state dict. Without @: "
            "fresh weights.",
            _SOURCE,
            "--from",
        ),
    ] = None,
    blocks: Annotated[
        str,
        _option(
            "Modules that learn by themselves, as `locallearn train` has them. Default: the "
            "source's, or auto.",
            _SOURCE,
        ),
    ] = "auto",
    rule: Annotated[
        str,
        _option(
            "Learning rule, with options as NAME:OPTION=VALUE. Default: the source's, or lls-mxm.",
            _SOURCE,
        ),
    ] = "lls-mxm",
    dataset: Annotated[
        str, _option("Dataset; `locallearn list datasets`. Default: folder.", _DATA)
    ] = "folder",
    data_dir: Annotated[
        str | None,
        _option("The images: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*.", _DATA),
    ] = None,
    image_size: Annotated[
        int | None,
        _option(
            "Height and width to see images at, pixels. Default: as the source was trained; 224, "
            "or what the weights say.",
            _DATA,
        ),
    ] = None,
    augment: Annotated[str, _option("none, basic or standard. Default: basic.", _DATA)] = "basic",
    val_split: Annotated[
        float,
        _option(
            "Share of each class's training images held out for validation, at least one. "
            "Default: 0.2.",
            _DATA,
        ),
    ] = 0.2,
    balance: Annotated[
        str,
        _option(
            "Draw batches in which classes come equally often: on, off or auto (where the largest "
            "has over 1.5 times the images of the smallest). Default: auto.",
            _DATA,
        ),
    ] = "auto",
    image_cache: Annotated[
        str | None,
        _option(
            "Directory to keep decoded images in: what `locallearn train` calls --cache. "
            "Default: none.",
            _DATA,
        ),
    ] = None,
    limit_train: Annotated[
        int | None, _option("Train on so many images at most. Default: all.", _DATA)
    ] = None,
    limit_test: Annotated[
        int | None, _option("Test on so many images at most. Default: all.", _DATA)
    ] = None,
    memory_limit: Annotated[
        str | None,
        _option(
            "Activations, gradients and optimizer state together stay below it, as in 256MiB: "
            "blocks and batch size are chosen so. Default: no limit.",
            _FIT,
        ),
    ] = None,
    trained_blocks: Annotated[
        str,
        _option(
            "Blocks that learn, by commas, as in --blocks; the others stay as they are. none: the "
            "output layer alone. Default: all, or what fits --memory-limit.",
            _FIT,
        ),
    ] = "all",
    batch_size: Annotated[
        int,
        _option("Images a step. Default: 32, or what fits --memory-limit.", _FIT),
    ] = 32,
    test_batch_size: Annotated[
        int,
        _option("Images at a time in testing. Default: 128, or what fits --memory-limit.", _FIT),
    ] = 128,
    cache: Annotated[
        str | None,
        _option(
            "Directory to keep what the frozen blocks in front make of the images, so that they "
            "run once and not at every step. Default: none.",
            _FIT,
        ),
    ] = None,
    cache_views: Annotated[
        int,
        _option(
            "--cache keeps so many differently augmented copies of each training image. "
            "Default: 1, without augmentation.",
            _FIT,
        ),
    ] = 1,
    cache_dtype: Annotated[
        str, _option("--cache keeps float32, or bf16, half the size. Default: float32.", _FIT)
    ] = "float32",
    epochs: Annotated[
        int | None,
        _option("Default: as many as make 400 steps, within 5 and 100.", _OPTIM),
    ] = None,
    optimizer: Annotated[
        str | None,
        _option(
            "schedulefree-adamw, schedulefree-sgd, adamw, adam or sgd. "
            "Default: schedulefree-adamw.",
            _OPTIM,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        _option(
            "Learning rate. Default, with BatchNorm that has learned: 0.001 schedulefree-adamw, "
            "0.2 schedulefree-sgd, 0.0002 adamw and adam, 0.01 sgd; else as `locallearn train`.",
            _OPTIM,
        ),
    ] = None,
    weight_decay: Annotated[float, _option("Default: 0.", _OPTIM)] = 0.0,
    schedule: Annotated[
        str,
        _option("none, cosine, multistep or plateau, by epochs. Default: none.", _OPTIM),
    ] = "none",
    keep: Annotated[
        str,
        _option(
            "Weights of which epoch are the result: last, or best by balanced validation "
            "accuracy. Default: last.",
            _OPTIM,
        ),
    ] = "last",
    seed: Annotated[
        int, _option("Of new weights, order, augmentation and validation. Default: 0.", _OPTIM)
    ] = 0,
    precision: Annotated[
        str, _option("fp32, or bf16 (autocast, fp32 weights). Default: fp32.", _COMPUTE)
    ] = "fp32",
    device: Annotated[str, _option("auto, cpu, cuda or mps. Default: auto.", _COMPUTE)] = "auto",
    backend: Annotated[
        str,
        _option(
            "How blocks are updated: auto, autograd, or in closed form by reference, compiled, "
            "triton or cuda. Default: auto.",
            _COMPUTE,
        ),
    ] = "auto",
    num_threads: Annotated[
        int | None, _option("CPU threads. Default: one a core.", _COMPUTE)
    ] = None,
    out: Annotated[
        str | None,
        _option("Run directory to make. Default: runs/TIME-finetune-DATA-MODEL.", _RUN),
    ] = None,
    resume: Annotated[
        str | None,
        _option("Run directory to continue, exactly; it needs no other flag.", _RUN),
    ] = None,
    quiet: Annotated[bool, _option("Print only the result.", _RUN, "--quiet")] = False,
) -> int:
    """Train a trained network further, on your own images, within a memory limit."""
    check_is_alone("finetune")
    # Measuring memory has torch warn of what is freed within that was made before.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from locallearn.engine import Interrupted, RunDirectory, Trainer
    from locallearn.engine.allocator import keep_freed_memory
    from locallearn.engine.finetuning import plan_finetuning, read_source

    given = {
        name: value
        for name, value in ctx.params.items()
        if name not in _NOT_SETTINGS and _is_given(ctx, name)
    }
    given |= {
        setting: value
        for setting, value in (("cache", image_cache), ("feature_cache", cache))
        if value is not None
    }
    keep_freed_memory()
    observer = make_observer(quiet=quiet)
    if resume is not None:
        trainer = _resumed(Path(resume), ctx, given, observer)
        if trainer is None:
            return 0
    else:
        if source is None:
            raise UserError(
                "--from is missing: the run, or the package's model, that training starts from. "
                "Or give --resume RUN."
            )
        if out == "":
            raise UserError("--out is empty; give a directory, or leave it out.")
        if out is not None:
            RunDirectory(Path(out)).check_free()
        start = read_source(source, image_size)
        plan = plan_finetuning(start, given, balance=balance, listener=observer)
        path = Path(out) if out is not None else _free_path(plan)
        trainer = Trainer.start(plan.settings, path, observer, plan)
        for note in plan.notes:
            observer.on_note(note)
    if not quiet:
        for line in plan_lines(trainer.config):
            print(line, flush=True)
    try:
        with contextlib.closing(observer), noting_signals(trainer.request_stop):
            summary = trainer.fit()
    except Interrupted as interruption:
        step, epoch = trainer.step, trainer.epoch
        print(
            f"Stopped after {f'step {step} of epoch {epoch + 1}' if step else f'epoch {epoch}'}; "
            f"all is saved. "
            f"Continue with: locallearn finetune --resume {trainer.run.path}",
            file=sys.stderr,
        )
        return 128 + interruption.signal_number
    _print_result(summary, trainer, quiet=quiet)
    return 0


def _resumed(
    path: Path, ctx: typer.Context, given: dict[str, Any], observer: Any
) -> Trainer | None:
    """The run to go on with; None, and a line, where it is finished."""
    from locallearn.engine import RunDirectory, Trainer
    from locallearn.engine.trainer import check_same_settings

    for name, option in (("source", "--from"), ("out", "--out"), ("balance", "--balance")):
        if _is_given(ctx, name):
            raise UserError(
                f"--resume and {option} exclude each other: a resumed run goes on as it began."
            )
    run = RunDirectory(path)
    config = check_same_settings(run, given)
    if config.settings.start_from is None:
        raise UserError(
            f"{path} is no fine-tuning. Continue it with `locallearn train --resume {path}`."
        )
    results = run.read_summary()
    if results is not None:
        print(
            f"{path} is finished: test accuracy {results['test_acc']:.2f} %, balanced "
            f"{results['test_balanced_acc']:.2f} %. Nothing to do."
        )
        return None
    return Trainer.resume(run.path, observer, given)


def _is_given(ctx: typer.Context, name: str) -> bool:
    found = ctx.get_parameter_source(name)
    return found is not None and found.name == "COMMANDLINE"


def _free_path(plan: FineTuning) -> Path:
    """runs/TIME-finetune-DATA-MODEL, numbered where that is taken."""
    from locallearn.engine.config import data_name, model_name

    settings = plan.settings
    name = file_name("finetune", data_name(settings), model_name(settings))[:100]
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    path, number = Path("runs") / stem, 2
    while path.exists():
        path = Path("runs") / f"{stem}-{number}"
        number += 1
    return path


def plan_lines(config: RunConfig) -> list[str]:
    """From what, onto what, and what fits."""
    record = config.data["finetune"]
    loaded, counts = record["loaded"], record["class_counts"]
    settings = config.settings
    lines = [f"from     {settings.start_from}"]
    if settings.start_digest is None:
        lines.append("weights  freshly drawn")
    else:
        new = ", ".join(loaded["new"]) or "nothing"
        lines.append(f"weights  {loaded['num_loaded']:,} numbers loaded; new: {new}")
        if loaded["left_out"]:
            lines.append(f"         left out: {', '.join(loaded['left_out'])}")
    if loaded["heads"] or loaded["new_heads"]:
        lines.append(
            f"heads    loaded: {', '.join(loaded['heads']) or 'none'}; "
            f"new: {', '.join(loaded['new_heads']) or 'none'}"
        )
    for part, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        if part in counts:
            lines.append(f"classes  {name}: {_counts_line(counts[part])}")
    share = record["largest_to_smallest"]
    how = "equally often in every batch" if settings.balance == "on" else "as often as they are"
    lines.append(f"balance  the largest class has {share:.1f}x the smallest; shown {how}")
    return lines + fit_lines(config)


def fit_lines(config: RunConfig) -> list[str]:
    """What was chosen to fit the limit, and what backpropagation would need."""
    fit = config.data["finetune"]["fit"]
    return [] if fit is None else list(fit["lines"])


def _counts_line(counts: dict[str, int]) -> str:
    """Each class's images; of many classes the fewest and the most."""
    total = sum(counts.values())
    if len(counts) <= _MAX_CLASSES_ON_A_LINE:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        return f"{total:,} images: {each}"
    least, most = (choose(counts, key=counts.__getitem__) for choose in (min, max))
    return (
        f"{total:,} images of {len(counts)} classes, from {counts[least]:,} ({least}) to "
        f"{counts[most]:,} ({most})"
    )


def _print_result(summary: dict[str, Any], trainer: Trainer, *, quiet: bool) -> None:
    kept = f", weights of epoch {summary['kept_epoch']}" if trainer.settings.keep == "best" else ""
    print(
        f"test accuracy {summary['test_acc']:.2f} %, balanced accuracy "
        f"{summary['test_balanced_acc']:.2f} % after {summary['epochs']} epochs{kept}, "
        f"{summary['train_seconds']:.1f} s of training"
    )
    if "val_balanced_acc" in summary:
        print(
            f"validation accuracy {summary['val_acc']:.2f} %, balanced "
            f"{summary['val_balanced_acc']:.2f} %"
        )
    if not quiet:
        _print_classes(summary)
    if "peak_memory_mib" in summary:
        limit = trainer.settings.memory_limit
        against = f" of the {limit} allowed" if limit else ""
        print(
            f"measured peak of activations, gradients and optimizer state: "
            f"{summary['peak_memory_mib']:.1f} MiB{against}"
        )
    print(f"written to {trainer.run.path}")
    if not quiet:
        print(f"next: locallearn predict {trainer.run.path} IMAGE...")


def _print_classes(summary: dict[str, Any]) -> None:
    counts = summary["class_counts"]
    table = Table(title="accuracy by class", title_justify="left")
    for heading in ("class", "training images", "test images", "test accuracy"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, accuracy in summary["test_class_acc"].items():
        num = counts["test"][name]
        said = f"{accuracy:.2f} %" if num else "-"
        table.add_row(escape(name), f"{counts['train'][name]:,}", f"{num:,}", said)
    Console(highlight=False).print(table)
