"""`locallearn export`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from locallearn.cli.options import CacheOption, DataDirOption, WeightsArgument
from locallearn.cli.run_data import load_run, load_run_data
from locallearn.errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from locallearn.data import Dataset, ImageSource, InputSpec
    from locallearn.engine import Trained
    from locallearn.engine.exits import EarlyExits
    from locallearn.export.description import Description
    from locallearn.export.files import ExportedModel
    from locallearn.export.verification import Checked, Comparison, Reference

_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
_INPUTS = ("pixels", "normalized")
_NUM_CALIBRATION = 256  # training images that an int8 file's ranges are measured on
_BATCH_SIZE = 128
_NUM_NOISE = 32  # images, where there are to be no real ones


def export(
    run: WeightsArgument,
    format: Annotated[str, typer.Option(help="onnx or torch-export.")] = "onnx",
    out: Annotated[
        str | None,
        typer.Option(
            help="File to write. Default: model.onnx or model.pt2 in the run directory.",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    exits: Annotated[
        bool,
        typer.Option(
            "--exits", help="One more output for each block that classifies by itself: its logits."
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="Write FILE.int8.onnx too, and say what accuracy that costs (onnx)."
        ),
    ] = False,
    input: Annotated[
        str,
        typer.Option(
            help="What the file takes: pixels, uint8 (N, H, W, C), which it normalises by itself; "
            "or normalized, float32 (N, C, H, W)."
        ),
    ] = "pixels",
    images: Annotated[
        int,
        typer.Option(help="Test images to compare the file with the network on; 0 for noise."),
    ] = 1000,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a logit between file and network.")
    ] = 1e-4,
    opset: Annotated[
        int | None,
        typer.Option(help="Version of ONNX's operators. Default: 18.", show_default=False),
    ] = None,
    data_dir: DataDirOption = None,
    cache: CacheOption = None,
    json: Annotated[
        str | None, typer.Option(help="Write all figures as JSON.", metavar="FILE.json")
    ] = None,
) -> None:
    """The trained network as a file that runs without this package, checked on real images."""
    if format not in _SUFFIXES:
        raise unknown_name("format", format, _SUFFIXES)
    if input not in _INPUTS:
        raise unknown_name("input", input, _INPUTS)
    if images < 0:
        raise UserError(f"--images must be at least 0, got {images}.")
    if format != "onnx" and (int8 or opset is not None):
        raise UserError(
            f"{'--int8' if int8 else '--opset'} is of ONNX files; give --format onnx, or leave it "
            f"out."
        )
    if int8 and images == 0:
        raise UserError(
            "--int8 is calibrated, and its accuracy measured, on real images; leave out --images 0."
        )

    from locallearn.engine.files import check_target, write_atomically, write_json
    from locallearn.export.exporting import check_file, check_tolerance, make_file
    from locallearn.export.files import DEFAULT_OPSET, check_opset, load_onnx_package
    from locallearn.export.quantization import int8_content
    from locallearn.export.verification import Reference, batches_of_sizes, compare

    suffix = _SUFFIXES[format]
    target = _default_target(run, suffix) if out is None else Path(out)
    check_file(target, suffix, "--out")
    if json is not None:
        check_target(Path(json), "--json")
    check_tolerance(tolerance)
    if format == "onnx":
        opset = DEFAULT_OPSET if opset is None else opset
        check_opset(opset)
        load_onnx_package("onnxruntime")
    trained = load_run(run)
    takes_pixels = input == "pixels"
    data = _open_data(trained, run, data_dir, cache, images, takes_pixels)
    found, threshold = _find_exits(trained, run, data) if exits else (None, None)
    description = _describe(trained, takes_pixels, found, threshold)

    first = data.first()
    content, model = make_file(trained.learner, found, description, first.images, opset)
    reference = Reference(trained.learner, found)
    answers: list[dict[str, Tensor]] = []

    def answer(inputs: Tensor) -> dict[str, Tensor]:
        answers.append(reference(inputs))
        return answers[-1]

    comparison = compare(model, answer, data.batches())
    comparison.check(tolerance)
    compare(model, reference, batches_of_sizes(first)).check(tolerance)
    write_atomically(target, content)
    files = [_File(target, len(content), model, comparison)]
    is_real = data.dataset is not None
    _print_checked(trained, files[0], tolerance, is_real=is_real)
    if int8:
        assert data.dataset is not None
        calibration = [batch.images for batch in data.calibration()]
        num = sum(map(len, calibration))
        small = target.with_name(f"{target.stem}.int8{suffix}")
        quantized, model = int8_content(content, description, calibration, num)
        write_atomically(small, quantized)
        again = iter(answers)  # of the same batches
        comparison = compare(model, lambda inputs: next(again), data.batches())
        files.append(_File(small, len(quantized), model, comparison))
    times = _times(reference, files, first)
    _print_table(files, times)
    if json is not None:
        write_json(Path(json), _figures(trained, files, times, is_real=is_real))
        print(f"figures written to {json}")


@dataclass(frozen=True)
class _File:
    """A file that was written, and what came out of comparing it."""

    path: Path
    num_bytes: int
    model: ExportedModel
    comparison: Comparison


@dataclass(frozen=True)
class _Images:
    """What a file is compared on: images of the test part, or noise.

    Arguments:
        inputs: what the network sees of an image.
        takes_pixels: what the file does.
        num: images.
        dataset: the run's; None for noise.
    """

    inputs: InputSpec
    takes_pixels: bool
    num: int
    dataset: Dataset | None

    def batches(self) -> Iterator[Checked]:
        """All of them."""
        if self.dataset is None:
            yield self._noise()
        else:
            yield from self._of(self.dataset.test, self.num)

    def first(self) -> Checked:
        """A batch of them."""
        return next(self.batches())

    def calibration(self) -> Iterator[Checked]:
        """Of the training part, as it is tested on."""
        assert self.dataset is not None
        return self._of(self.dataset.train, _NUM_CALIBRATION)

    def _of(self, source: ImageSource, num: int) -> Iterator[Checked]:
        """The first images in an order that has the classes in their proportions."""
        import torch

        from locallearn.data.dataset import DATA_SEED, stratified_order
        from locallearn.engine.building import evaluation_loader
        from locallearn.export.verification import Checked

        assert self.dataset is not None
        chosen = source.subset(stratified_order(source.labels, DATA_SEED)[:num])
        loader = evaluation_loader(chosen, self.dataset, _BATCH_SIZE, torch.device("cpu"))
        for images, labels in loader.epoch():
            given = self._pixels(images) if self.takes_pixels else images
            yield Checked(given, images, labels)

    def _pixels(self, images: Tensor) -> Tensor:
        """What the loader has made these of, uint8 (N, H, W, C)."""
        import torch

        mean, std = torch.tensor(self.inputs.mean), torch.tensor(self.inputs.std)
        values = images.permute(0, 2, 3, 1) * std + mean
        return (255 * values).round().to(torch.uint8).contiguous()

    def _noise(self) -> Checked:
        import torch

        from locallearn.export.exporting import normalized
        from locallearn.export.verification import Checked

        generator = torch.Generator().manual_seed(0)
        shape = (_NUM_NOISE, *self.inputs.image_size, self.inputs.num_channels)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        inputs = normalized(pixels, self.inputs.mean, self.inputs.std)
        return Checked(pixels if self.takes_pixels else inputs, inputs, None)


def _default_target(run: str, suffix: str) -> Path:
    path = Path(run)
    return (path if path.is_dir() else path.parent) / f"model{suffix}"


def _open_data(
    trained: Trained,
    run: str,
    data_dir: str | None,
    cache: str | None,
    num_images: int,
    takes_pixels: bool,
) -> _Images:
    """The images to compare on; BatchNorm's statistics fit the weights after it."""
    import torch

    from locallearn.engine.building import recalibrate, training_loader

    inputs = trained.config.inputs
    if num_images == 0:
        trained.check_statistics(run)
        return _Images(inputs, takes_pixels, 0, None)
    try:
        dataset = load_run_data(trained, data_dir, cache)
    except UserError as error:
        raise UserError(
            f"{error} The file is compared with the network on the run's test images; --images 0 "
            f"does it on noise."
        ) from error
    if trained.needs_recalibration:
        # The run's own backend may be of another device; what it makes of the images is the same.
        settings = replace(trained.config.settings, backend="reference")
        loader = training_loader(settings, dataset, torch.device("cpu"))
        recalibrate(trained.learner, loader)
    return _Images(inputs, takes_pixels, num_images, dataset)


def _find_exits(trained: Trained, run: str, data: _Images) -> tuple[EarlyExits, float | None]:
    """The blocks that are outputs, and the threshold that was chosen for the run's exits."""
    from locallearn.engine import load_exits

    record = load_exits(trained, Path(run))
    found = trained.learner.early_exits(data.first().inputs)
    missing = [name for name in found.names if name not in trained.learner.exit_temperatures]
    if missing:
        print(
            f"note: not calibrated, and so with temperature 1 in the file: {', '.join(missing)}; "
            f"`locallearn evaluate {run} --early-exit` fits them"
        )
    return found, None if record is None else record.threshold


def _describe(
    trained: Trained, takes_pixels: bool, exits: EarlyExits | None, threshold: float | None
) -> Description:
    from locallearn.engine.config import data_name, model_name
    from locallearn.export.description import Description, Origin
    from locallearn.export.exporting import described_exits

    config = trained.config
    inputs, settings = config.inputs, config.settings
    size, channels = inputs.image_size, inputs.num_channels
    origin = Origin(
        model=model_name(settings),
        rule=settings.rule,
        dataset=data_name(settings),
        run=trained.origin.resolve().parent.name,
        num_epochs=settings.epochs if trained.num_epochs is None else trained.num_epochs,
        resize=inputs.resize,
        class_names=config.class_names,
    )
    return Description(
        origin,
        takes_pixels,
        (*size, channels) if takes_pixels else (channels, *size),
        len(config.class_names),
        inputs.mean,
        inputs.std,
        *described_exits(trained.learner, exits),
        exit_threshold=threshold,
    )


def _times(reference: Reference, files: list[_File], batch: Checked) -> dict[int, dict[str, float]]:
    """Batch size -> "network" or file name -> median time of an image, ms."""
    import torch

    from locallearn.export.verification import TIMED_BATCH_SIZES, times_in_turn_ms

    found = {}
    for size in TIMED_BATCH_SIZES:
        places = torch.arange(size) % len(batch.images)
        images, inputs = batch.images[places], batch.inputs[places]
        calls: dict[str, Any] = {"network": lambda inputs=inputs: reference(inputs)}
        for file in files:
            calls[file.path.name] = lambda model=file.model, images=images: model(images)
        found[size] = {name: ms / size for name, ms in times_in_turn_ms(calls).items()}
    return found


def _print_checked(trained: Trained, file: _File, tolerance: float, *, is_real: bool) -> None:
    """At once, since int8 and the times take a while."""
    from locallearn.export.verification import BATCH_SIZES

    first, description = file.comparison, file.model.description
    what = "test images" if is_real else "images of noise"
    shape = ", ".join(map(str, ("batch", *description.shape)))
    dtype = str(description.input_dtype).removeprefix("torch.")
    print(f"{file.path}: images, {dtype} ({shape}) -> {', '.join(description.output_names)}")
    largest = max(first.max_difference.values())
    print(
        f"beside the network on {first.num_images:,} {what}: logits differ by {largest:.1e} at "
        f"most (tolerance {tolerance:g}), {_same(first)} in the same class; batches of "
        f"{', '.join(map(str, BATCH_SIZES))} too"
    )
    if first.num_other_class:
        print(
            f"note: {first.num_other_class} images change class, between two whose logits are "
            f"closer than twice the tolerance"
        )
    if not is_real:
        print("note: nothing was checked on real images (--images 0)")
    if trained.config.settings.precision != "fp32":
        print(
            f"note: the run computes in {trained.config.settings.precision}; the file, and the "
            f"network that it is compared with, compute in float32"
        )


def _print_table(files: list[_File], times: dict[int, dict[str, float]]) -> None:
    import torch

    from locallearn.data.listening import readable_size
    from locallearn.engine.environment import device_name

    first = files[0].comparison
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for heading in ("size", "same class", "accuracy", *(f"batch {size}" for size in times)):
        table.add_column(heading, justify="right", no_wrap=True)
    network = [_percent(first.model_accuracy), *(_ms(each["network"]) for each in times.values())]
    table.add_row("network", "", "", *network)
    for file in files:
        name, comparison = file.path.name, file.comparison
        cells = [readable_size(file.num_bytes), _same(comparison), _percent(comparison.accuracy)]
        table.add_row(escape(name), *cells, *(_ms(each[name]) for each in times.values()))
    print()
    Console(highlight=False).print(table)
    threads = torch.get_num_threads()
    print(
        f"time: ms an image, medians, measured in turn here on {device_name('cpu')}, {threads} "
        f"{'thread' if threads == 1 else 'threads'}"
    )
    for file in files[1:]:
        assert file.comparison.accuracy is not None
        assert first.accuracy is not None
        points = file.comparison.accuracy - first.accuracy
        print(
            f"{file.path.name}: accuracy {points:+.2f} points against {files[0].path.name}; "
            f"{file.model.description.quantization}"
        )


def _same(comparison: Comparison) -> str:
    num = comparison.num_images
    return f"{num - comparison.num_other_class:,} of {num:,}"


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f} %"


def _ms(time_ms: float) -> str:
    return f"{time_ms:.3f}"


def _figures(
    trained: Trained, files: list[_File], times: dict[int, dict[str, float]], *, is_real: bool
) -> dict[str, Any]:
    import torch

    from locallearn.cli.command import running_command
    from locallearn.engine.environment import describe_environment

    return {
        "command": running_command(),
        "run": str(trained.origin),
        "images": "test" if is_real else "noise",
        "num_threads": torch.get_num_threads(),
        "time_ms_per_image": {str(size): each for size, each in times.items()},
        "files": [
            {
                "file": file.path.name,
                "num_bytes": file.num_bytes,
                "outputs": file.model.description.output_names,
                "quantization": file.model.description.quantization,
                "accuracy": file.comparison.accuracy,
                "network_accuracy": file.comparison.model_accuracy,
                **asdict(file.comparison),
            }
            for file in files
        ],
        "environment": describe_environment("cpu", "onnx", "onnxscript", "onnxruntime"),
    }
