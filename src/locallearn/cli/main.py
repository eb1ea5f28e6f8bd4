"""The program's entry: runs a subcommand, and turns what it raises into a line and a code."""

from __future__ import annotations

import errno
import io
import signal
import sys
from collections.abc import Sequence

import typer

from locallearn.cli import (
    analyze,
    bench,
    blocks,
    cost,
    doctor,
    evaluate,
    export,
    finetune,
    listing,
    plan,
    predict,
    report,
    reproduce,
    train,
)
from locallearn.cli.command import running
from locallearn.errors import Silent, UserError

BAD_INPUT = UserError.exit_code

app = typer.Typer(
    name="locallearn",
    help="Train deep networks with local learning rules.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("finetune")(finetune.finetune)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("reproduce")(reproduce.reproduce)
app.command("bench")(bench.bench)
app.command("blocks")(blocks.blocks)
app.command("cost")(cost.cost)
app.command("plan")(plan.plan)
app.add_typer(analyze.app, name="analyze")
app.command("report")(report.report)
app.command("list")(listing.list_names)
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
    if version:
        from locallearn._version import __version__

        typer.echo(f"locallearn {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Arguments:
        arguments: without the program's name; those of the process where None.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal's encoding lacks is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with running(given):
            code = app(args=given or ["--help"], prog_name="locallearn", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Silent as error:
        return error.exit_code
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(_say_os_error(error))
    except (KeyboardInterrupt, typer.Abort):
        print("Interrupted; nothing was left half-written.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        # Typer's own errors (an unknown option, a number that is none) know how to say
        # themselves; typer brings its own copy of click or the package, so there is no one class.
        say = getattr(error, "format_message", None)
        if say is not None:
            where = getattr(getattr(error, "ctx", None), "command_path", "locallearn")
            return _fail(f"{say()} See `{where} --help`.")
        if type(error).__name__ == "OutOfMemoryError":
            return _fail("the device ran out of memory. Use a smaller --batch-size.")
        raise


def _fail(message: str, code: int = BAD_INPUT) -> int:
    print("Error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _say_os_error(error: OSError) -> str:
    where = f" {error.filename}" if error.filename else ""
    what = error.strerror or str(error)
    advice = {
        errno.ENOSPC: "Free some space and go on with --resume, or choose another --out.",
        errno.EDQUOT: "Free some space and go on with --resume, or choose another --out.",
        errno.EFBIG: "Lift the file size limit and go on with --resume, or choose another --out.",
        errno.EACCES: "Choose a directory you may write to.",
        errno.EPERM: "Choose a directory you may write to.",
        errno.EROFS: "Choose a directory you may write to.",
    }.get(error.errno or 0, "")
    return f"can't use{where}: {what}. What was written before is whole. {advice}".strip()
