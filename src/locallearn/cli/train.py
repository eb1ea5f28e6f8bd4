"""`locallearn train`."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locallearn.cli.console import make_observer
from locallearn.cli.launching import Sharing, is_restart, may_be_restarted, sharing_work
from locallearn.cli.naming import file_name
from locallearn.cli.signals import noting_signals
from locallearn.errors import UserError

if TYPE_CHECKING:
    from locallearn.engine import RunDirectory, Trainer
    from locallearn.engine.team import Team

_OF_SHARING = ("parallel", "balance", "sync_batch_norm", "replay", "hang_timeout")
_NOT_SETTINGS = (*_OF_SHARING, "out", "resume", "quiet")
_MAX_MODEL_LENGTH = 80  # of a run directory's name: a model's options may be long


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


_DATA, _MODEL, _RULE, _OPTIM = "Data", "Model", "Rule", "Training"
_COMPUTE, _SHARE, _RUN = "Computation", "Several processes (torchrun)", "Run"


def train(
    ctx: typer.Context,
    dataset: Annotated[
        str, _option("Dataset; `locallearn list datasets`. Default: digits.", _DATA)
    ] = "digits",
    data_dir: Annotated[
        str | None,
        _option("Where the data is, or is downloaded to. Default: ~/.cache/locallearn.", _DATA),
    ] = None,
    augment: Annotated[
        str | None,
        _option("none, basic or standard. Default: the paper's for model and dataset.", _DATA),
    ] = None,
    image_size: Annotated[
        int | None,
        _option(
            "folder and vww only: height and width to train at, pixels. "
            "Default: the files', or 128.",
            _DATA,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        _option(
            "Directory to keep decoded images in, so that later runs start in a second and never "
            "decode; for datasets of image files. Default: none.",
            _DATA,
        ),
    ] = None,
    val_split: Annotated[
        float, _option("Share of the training set held out for validation. Default: 0.", _DATA)
    ] = 0.0,
    limit_train: Annotated[
        int | None, _option("Train on so many images at most. Default: all.", _DATA)
    ] = None,
    limit_test: Annotated[
        int | None, _option("Test on so many images at most. Default: all.", _DATA)
    ] = None,
    model: Annotated[
        str,
        _option(
            "Network: one of `locallearn list models`; or torchvision:NAME, timm:NAME or "
            "FILE.py:FUNCTION, with options of its builder as NAME:OPTION=VALUE. "
            "Default: smallconv.",
            _MODEL,
        ),
    ] = "smallconv",
    blocks: Annotated[
        str,
        _option(
            "Modules that learn by themselves, by commas: names as in named_modules(), with * and "
            "?, or type:CLASS. Default: auto (the network's own blocks, or its repeated units).",
            _MODEL,
        ),
    ] = "auto",
    trained_blocks: Annotated[
        str,
        _option(
            "Blocks that learn, by commas, as in --blocks; the others stay as they are. "
            "none: the output layer alone. Default: all.",
            _MODEL,
        ),
    ] = "all",
    dropout: Annotated[
        float, _option("Dropout between blocks, probability. Default: 0.", _MODEL)
    ] = 0.0,
    width: Annotated[
        float, _option("Every block has so many times the channels. Default: 1.", _MODEL)
    ] = 1.0,
    activation: Annotated[
        str | None,
        _option(
            "leaky-relu, relu or tanh. Default: the rule's (drtp tanh, the others leaky-relu).",
            _MODEL,
        ),
    ] = None,
    norm: Annotated[
        str, _option("Of the blocks: batch, or none. Default: batch.", _MODEL)
    ] = "batch",
    rule: Annotated[
        str,
        _option(
            "Learning rule; `locallearn list rules`. An option that has no flag here is given as "
            "NAME:OPTION=VALUE. Default: lls.",
            _RULE,
        ),
    ] = "lls",
    basis: Annotated[
        str | None, _option("cosine, square or random. Default: square.", _RULE)
    ] = None,
    setting: Annotated[
        str | None,
        _option("official (the authors' code) or paper (its text). Default: official.", _RULE),
    ] = None,
    num_waves: Annotated[
        int | None, _option("lls-mxm-reduced: rows of the basis. Default: 20.", _RULE)
    ] = None,
    temperature: Annotated[
        float | None, _option("Divides the local logits. Default: 0.5.", _RULE)
    ] = None,
    label_smoothing: Annotated[
        float | None, _option("In [0, 1), of every cross-entropy. Default: 0.", _RULE)
    ] = None,
    similarity: Annotated[
        float | None,
        _option("Weight of the latents' similarity match. Default: 10 for lls-s, else 0.", _RULE),
    ] = None,
    m_start: Annotated[
        str | None,
        _option(
            "lls-m, lls-mxm: M starts official (small, random) or identity. Default: official.",
            _RULE,
        ),
    ] = None,
    local_loss: Annotated[
        str | None, _option("local-losses: pred, sim or predsim. Default: pred.", _RULE)
    ] = None,
    head_after_pool: Annotated[
        bool,
        _option("Whether a block's head reads after its max-pool. Default: before.", _RULE),
    ] = False,
    group_blocks: Annotated[
        int, _option("So many blocks at a time learn together. Default: 1.", _RULE)
    ] = 1,
    update_order: Annotated[
        str | None,
        _option(
            "pepita: update layerwise in the second forward, or at its end. Default: layerwise.",
            _RULE,
        ),
    ] = None,
    feedback_scale: Annotated[
        float | None,
        _option("pepita: scale of the error that is added to the input. Default: 0.05.", _RULE),
    ] = None,
    bp_memory: Annotated[
        str | None,
        _option("bp: plain, checkpoint, accumulate:N or fused-optimizer. Default: plain.", _RULE),
    ] = None,
    epochs: Annotated[
        int | None,
        _option(
            "Default: the paper's (smallconv 100, vgg8 300, mobilenet-v1 500); digits 40; models "
            "from elsewhere 100.",
            _OPTIM,
        ),
    ] = None,
    batch_size: Annotated[int, _option("Images a step. Default: 128.", _OPTIM)] = 128,
    test_batch_size: Annotated[
        int, _option("Images at a time in testing. Default: 128.", _OPTIM)
    ] = 128,
    optimizer: Annotated[
        str | None,
        _option(
            "schedulefree-adamw, schedulefree-sgd, adamw, adam or sgd. "
            "Default: schedulefree-adamw (pepita: sgd).",
            _OPTIM,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        _option(
            "Learning rate. Default: the optimizer's (0.005 schedulefree-adamw, 1 "
            "schedulefree-sgd, 0.001 adamw and adam, 0.05 sgd; pepita 0.01).",
            _OPTIM,
        ),
    ] = None,
    weight_decay: Annotated[float, _option("Default: 0.", _OPTIM)] = 0.0,
    schedule: Annotated[
        str,
        _option("none, cosine, multistep or plateau, by epochs. Default: none.", _OPTIM),
    ] = "none",
    seed: Annotated[int, _option("Of weights, order and augmentation. Default: 0.", _OPTIM)] = 0,
    precision: Annotated[
        str, _option("fp32, or bf16 (autocast, fp32 weights). Default: fp32.", _COMPUTE)
    ] = "fp32",
    device: Annotated[str, _option("auto, cpu, cuda or mps. Default: auto.", _COMPUTE)] = "auto",
    channels_last: Annotated[
        bool,
        _option(
            "Memory format of images and weights. Default: channels-last, the faster one.",
            _COMPUTE,
        ),
    ] = True,
    backend: Annotated[
        str,
        _option(
            "How blocks are updated: auto, autograd, or in closed form by reference, compiled, "
            "triton or cuda. Default: auto (on CUDA the faster of triton and cuda, measured at the "
            "start, which may be either from run to run: name one for the same bits again; on the "
            "CPU compiled, if the run is long).",
            _COMPUTE,
        ),
    ] = "auto",
    cuda_graph: Annotated[
        bool,
        _option(
            "On CUDA, whether to launch each step as one captured graph. Default: yes.", _COMPUTE
        ),
    ] = True,
    compile: Annotated[
        bool,
        _option(
            "Whether to run what takes no such backend (bp) through torch.compile; needs a C++ "
            "compiler on the CPU. Default: no.",
            _COMPUTE,
        ),
    ] = False,
    num_threads: Annotated[
        int | None, _option("CPU threads. Default: one a core.", _COMPUTE)
    ] = None,
    parallel: Annotated[
        str | None,
        _option(
            "How the processes that torchrun started share the work: layers, data, layers:L, "
            "data:D, or layers:L,data:D. Default: one process.",
            _SHARE,
        ),
    ] = None,
    balance: Annotated[
        str | None,
        _option(
            "layers: how many blocks each stage has, by commas. Default: balanced by a short "
            "measurement.",
            _SHARE,
        ),
    ] = None,
    sync_batch_norm: Annotated[
        bool,
        _option(
            "data: BatchNorm normalises by the whole batch, and not by each process's part of it; "
            "blocks then learn by autograd.",
            _SHARE,
            "--sync-batch-norm",
        ),
    ] = False,
    replay: Annotated[
        int | None,
        _option(
            "layers: stages never wait; where no new input has come, a stage trains once more on "
            "one of the latest N. Costs accuracy, and no run repeats. Default: stages wait.",
            _SHARE,
        ),
    ] = None,
    hang_timeout: Annotated[
        float | None,
        _option(
            "Seconds that a process may be silent within a step before it counts as hung. "
            "Default: 600.",
            _SHARE,
        ),
    ] = None,
    out: Annotated[
        str | None,
        _option("Run directory to make. Default: runs/TIME-DATASET-MODEL-RULE.", _RUN),
    ] = None,
    resume: Annotated[
        str | None,
        _option("Run directory to continue, exactly; it needs no other flag.", _RUN),
    ] = None,
    quiet: Annotated[bool, _option("Print only the result.", _RUN, "--quiet")] = False,
) -> int:
    """Train a network, by default smallconv with LLS on scikit-learn's digits."""
    given = {
        name: value
        for name, value in ctx.params.items()
        if name not in _NOT_SETTINGS and _is_from_command_line(ctx, name)
    }
    from locallearn.engine.allocator import keep_freed_memory

    keep_freed_memory()
    sharing = Sharing(parallel, balance, sync_batch_norm, replay, hang_timeout)
    with sharing_work(sharing, device) as team:
        return _train(given, out, resume, team, quiet=quiet)


def _train(
    given: dict[str, Any], out: str | None, resume: str | None, team: Team, *, quiet: bool
) -> int:
    from locallearn.engine import Interrupted, RunDirectory, TrainConfig, Trainer

    with team.together("checking the flags"):
        if resume is not None and out is not None:
            raise UserError("--resume and --out exclude each other: a resumed run stays in place.")
        if out == "":
            raise UserError("--out is empty; give a directory, or leave it out.")
        if resume is None and out is None and may_be_restarted():
            raise UserError(
                "torchrun --max-restarts starts this command again after a failure, which can go "
                "on with the run only where it knows it: give --out DIRECTORY."
            )
    observer = make_observer(quiet=quiet or not team.is_first)
    if resume is None and out is not None and is_restart():
        resume = team.first(
            lambda: out if RunDirectory(Path(out)).config_path.exists() else None,
            "looking for the run",
        )
    if resume is not None:
        run = RunDirectory(Path(resume))
        accuracy = team.first(lambda: _finished(run, given), "reading the run")
        if accuracy is not None:
            if team.is_first:
                print(f"{resume} is finished: test accuracy {accuracy:.2f} %. Nothing to do.")
            return 0
        trainer = Trainer.resume(run.path, observer, given, team)
    else:
        config = TrainConfig(**given)
        path = team.first(
            lambda: Path(out) if out is not None else _free_path(config), "choosing a directory"
        )
        trainer = Trainer.start(config, path, observer, team=team)

    try:
        with contextlib.closing(observer), noting_signals(trainer.request_stop):
            summary = trainer.fit()
    except Interrupted as interruption:
        step, epoch = trainer.step, trainer.epoch
        if team.is_first:
            print(
                f"Stopped after "
                f"{f'step {step} of epoch {epoch + 1}' if step else f'epoch {epoch}'}; "
                f"all is saved. "
                f"Continue with: {team.resume_command(trainer.run.path)}",
                file=sys.stderr,
            )
        return 128 + interruption.signal_number
    if team.is_first:
        _print_summary(summary, trainer)
    return 0


def _finished(run: RunDirectory, given: dict[str, Any]) -> float | None:
    """The test accuracy of a run that has results; None of one that goes on. Settings that are
    given again must be its own."""
    from locallearn.engine.trainer import check_same_settings

    check_same_settings(run, given)
    results = run.read_summary()
    return None if results is None else results["test_acc"]


def _is_from_command_line(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _free_path(config: Any) -> Path:
    """runs/TIME-DATASET-MODEL-RULE, numbered where that is taken."""
    from locallearn.engine.config import model_name

    model = file_name(model_name(config))[:_MAX_MODEL_LENGTH]
    rule = config.rule.partition(":")[0]
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.dataset}-{model}-{rule}"
    path = Path("runs") / stem
    number = 2
    while path.exists():
        path = Path("runs") / f"{stem}-{number}"
        number += 1
    return path


def _print_summary(summary: dict[str, Any], trainer: Trainer) -> None:
    best = summary["best_test_acc"]
    print(
        f"test accuracy {summary['test_acc']:.2f} % after {summary['epochs']} epochs "
        f"(best on the way {best:.2f} %), "
        f"{summary['images_per_second']:,.0f} images/s, "
        f"{summary['step_time_ms_median']:.1f} ms a step, "
        f"{summary['train_seconds']:.0f} s of training"
    )
    print(f"written to {trainer.run.path}")
