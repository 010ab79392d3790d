"""The command line: which command, on what."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

logger = logging.getLogger("keras_ebft")

FAULTS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: list of strings; by default those of the process.

    Returns:
        int, 0; 1 after an error, which is printed; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        _check_packages()
        from keras_ebft.cli import commands

        getattr(commands, options.command)(options)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    except FAULTS as error:
        if options.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check_packages() -> None:
    for name in ("pydantic", "yaml"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                "Expected the packages pydantic and PyYAML for the command line. "
                f"Received: {error}. Install them: "
                'pip install "keras_ebft[cli]".'
            ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-ebft",
        description="Energy-Based Fine-Tuning of KerasHub language models. The backend "
        "is that of KERAS_BACKEND.",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error comes from"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="train as a file says; the same again resumes"
    )
    train.add_argument("file", help="YAML, see docs/command_line.md")
    _add_overrides(train)
    evaluate = commands.add_parser("evaluate", help="measure a run on documents")
    evaluate.add_argument("folder", help="the output folder of a run")
    _add_overrides(evaluate)
    generate = commands.add_parser("generate", help="complete prompts with a run")
    generate.add_argument("folder", help="the output folder of a run")
    generate.add_argument(
        "prompts", nargs="*", help="by default the lines of the standard input"
    )
    generate.add_argument("--max-length", type=int, default=128, metavar="TOKENS")
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--num-samples", type=int, default=1)
    generate.add_argument("--seed", type=int, default=0)
    report = commands.add_parser("report", help="write a page about runs")
    report.add_argument("folders", nargs="+", help="output folders of runs")
    report.add_argument("--output", default="report.html", metavar="FILE")
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings in place of the file's, such as optimizer.learning_rate=1e-4",
    )
