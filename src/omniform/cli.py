"""The `omniform` command. Each body imports what it calls, so that `omniform --help` never waits for torch."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    import typer.core

    from omniform import __version__
    from omniform.console import Json, Seed, print_json
    from omniform.data_cli import data_app
    from omniform.errors import COMPLAINTS_VARIABLE, OmniformError
    from omniform.generate_cli import generate
    from omniform.inference.terminal_text import harmless
except KeyboardInterrupt:  # nothing else can answer Ctrl-C in the first moments
    print("omniform: interrupted", file=sys.stderr)
    sys.exit(130)

HELP = """One decoder transformer for every modality: tokenizers, training, generation and evaluation.

New here? `omniform demo` trains a small model on handwritten digits from scratch, in minutes, on this machine."""

# What each extra of pyproject.toml brings, for the message when it is not installed.
EXTRAS = {"sklearn": "demo", "transformers": "interop"}


class _Commands(typer.core.TyperGroup):
    """Answers Ctrl-C with one line, wherever it comes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("interrupted")
            sys.exit(130)


app = typer.Typer(
    cls=_Commands,
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Train and measure the tokenizer of a modality.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")

Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in --out and start anew.")]
Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a config that Omniform ships.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override the file, e.g. optim.lr=3e-4 steps=200.")
]
RunDir = Annotated[
    Path | None, typer.Option(help="Run folder (default: runs/NAME, with the config's name). A run in it is continued.")
]


def main() -> None:
    """Run the command line: status 2 and one line for what the user can mend, 130 after Ctrl-C."""
    try:
        app(prog_name="omniform")
    except OmniformError as error:
        _complain(str(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _complain(f"this needs the {extra!r} extra: pip install 'omniform[{extra}]'")
        sys.exit(2)


def _complain(message: str) -> None:
    """Print a message on standard error; of the processes of one launch, only the first that has it to say does."""
    folder = Path(os.environ.get(COMPLAINTS_VARIABLE, ""))
    if folder.name and folder.is_dir():
        try:
            (folder / hashlib.sha256(message.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return
    print(f"omniform: {harmless(message)}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"omniform {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options before the command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on where --out stands.")] = False,
    size: Annotated[
        Literal["full", "tiny"], typer.Option(help="tiny: a few steps of everything, to try out the machinery.")
    ] = "full",
) -> None:
    """Build data, train tokenizers and a model, evaluate them and write a report: from nothing, in minutes.

    Text becomes pictures and pictures become text, with one small transformer trained on real handwritten digits.
    Every stage that is already done in --out is skipped, so an interrupted demo goes on where it was.
    """
    from omniform.demo import run_demo

    run_demo(out, fresh=fresh, size=size)


app.command()(generate)


@app.command()
def chat(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Model folder, e.g. runs/demo/model.", show_default=False)
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="Modalities to answer with, in order, such as text,image; or any. (default: text)"),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option(help="Folder for the files of replies. (default: chat-DATE-TIME, once it is needed)")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of every reply. (default: a new one each time)")
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="File that keeps what you type from chat to chat. (default: none does)")
    ] = None,
) -> None:
    """Talk with a model: type text and @files, see its texts and pictures, find its sounds and videos in files.

    omniform chat runs/demo/model --to image

    printf 'a seven\\n/quit\\n' | omniform chat runs/demo/model --to image
    """
    if model is None:
        raise OmniformError("chat needs a model folder: omniform chat MODEL; `omniform demo` makes runs/demo/model")
    from omniform.inference.chat import run_chat

    raise typer.Exit(run_chat(model, to, out_dir, seed, history))


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder.")],
    data: Annotated[Path, typer.Option(help="World that holds the held-out data.")] = Path("runs/demo/data"),
    suite: Annotated[Literal["any-to-any"], typer.Option(help="What to measure.")] = "any-to-any",
    split: Annotated[Literal["validation", "test"], typer.Option(help="Held-out items to prompt with.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Write metrics.json here, and samples.json beside it.")] = None,
    cells: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE->TARGET", help="Score this cell alone; repeat it for several. (default: all)"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only so many items per cell. (default: all, of speech 100)")
    ] = None,
    second_judge: Annotated[
        bool | None,
        typer.Option(
            "--second-judge/--no-second-judge",
            help="Let Whisper hear some speech too. (default: where installed, without --limit)",
        ),
    ] = None,
    direct: Annotated[bool, typer.Option("--direct", help="Let no reply go by way of another modality.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that score at the same time, on a thread each.")] = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Score what a model makes of each modality from each other, with judges that it never trained with.

    omniform eval runs/demo/model --cells "speech->video" --cells "video->text"
    """
    from omniform.cell_report import cells_as_text
    from omniform.inference.evaluation import evaluate_any_to_any
    from omniform.inference.generate import load

    keywords: dict[str, Any] = {"split": split, "cells": cells, "seed": seed, "limit": limit, "workers": workers}
    metrics = evaluate_any_to_any(load(model), data, **keywords, direct=direct, second_judge=second_judge, out=out)
    if as_json:
        print_json(metrics)
    else:
        print(cells_as_text(metrics))


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    out: RunDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only forecast parameters, memory, FLOPs, time and disk.")
    ] = False,
    fresh: Fresh = False,
) -> None:
    """Train a model in one process; the same command continues a run that was stopped.

    omniform train digits steps=200 stages.0.steps=50 optim.lr=1e-3 --out runs/try
    """
    from omniform.preview import draw_samples
    from omniform.training.run import train as run
    from omniform.training.run_folder import is_first_process

    folder = run(_config_file(config), overrides or [], out, dry_run=dry_run, fresh=fresh, preview=draw_samples)
    if not dry_run and is_first_process():
        print(f"model: {folder}")


@app.command()
def launch(
    command: Annotated[list[str], typer.Argument(metavar="-- train CONFIG ...", help="What every process runs.")],
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine.")] = 1,
    show: Annotated[bool, typer.Option("--print", help="Print what would be run, and run nothing.")] = False,
) -> None:
    """Run `omniform train` in several processes of this machine.

    omniform launch --nproc 2 -- train digits --out runs/two
    """
    from omniform.training.launcher import launch as run

    raise typer.Exit(run(nproc, command, dry_run=show))


@tokenizer_app.command("train")
def tokenizer_train(config: Config, overrides: Overrides = None, out: RunDir = None, fresh: Fresh = False) -> None:
    """Fit the tokenizer of one modality; the same command continues a run that was stopped."""
    from omniform.training.tokenizer_task import train_tokenizer

    print(train_tokenizer(_config_file(config), overrides or [], out, fresh=fresh))


@tokenizer_app.command("eval")
def tokenizer_eval(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Tokenizer folder.")],
    data: Annotated[Path, typer.Option(help="World that holds the held-out data.")] = Path("runs/demo/data"),
    split: Annotated[Literal["validation", "test"], typer.Option(help="Held-out items to encode.")] = "test",
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Encode those of the world's folder SPLIT-NAME.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for figures, items before and after, and report.html.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many samples.")] = None,
    as_json: Json = False,
) -> None:
    """Encode and decode held-out items: rates, distortion, code use, and judges' accuracy after the round trip."""
    from omniform.inference.tokenizer_evaluation import evaluate_tokenizer
    from omniform.tokenizer_report import figures_as_text, write_tokenizer_report

    figures = evaluate_tokenizer(folder, data, split=split, subset=subset, limit=limit, out=out)
    report = None if out is None else write_tokenizer_report(out)
    if as_json:
        print_json(figures)
    else:
        print(harmless(figures_as_text(figures)))
        if report is not None:
            print(f"report: {report}")


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A file of benchmarks/ without .py, such as attention or objectives; any other name lists them.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Measure two ways of doing the same work, in turns in one process, and print the ratio of their times.

    The workloads are in benchmarks/ of a source checkout.
    """
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    known = sorted(path.stem for path in folder.glob("*.py") if "\ndef run(" in path.read_text(encoding="utf-8"))
    if name not in known:
        where = f"expected one of {', '.join(known)}" if known else "benchmarks/ is only in a source checkout"
        raise OmniformError(f"no benchmark {name!r}: {where}")
    import runpy

    sys.path.insert(0, str(folder))
    result = runpy.run_path(str(folder / f"{name}.py"))["run"]()
    if as_json:
        print_json(result)
    else:
        print(result.pop("text"))


def _config_file(name: str) -> Path:
    """Return the file of that name, or else the shipped config of that name."""
    path = Path(name)
    if path.suffix or path.is_file():
        return path
    shipped = Path(__file__).parent / "configs"
    known = sorted(str(file.relative_to(shipped).with_suffix("")) for file in shipped.rglob("*.yaml"))
    if name not in known:
        raise OmniformError(
            f"no file and no shipped config is named {name!r}: expected a YAML file, or {', '.join(known)}"
        )
    return shipped / f"{name}.yaml"


if __name__ == "__main__":
    main()
