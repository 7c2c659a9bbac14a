# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-musc``: a folder of images to a page of results; models side by side."""

import argparse
import difflib
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from anomalib_musc.inference import command


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and what was perhaps meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}{self._meant(message)} See {self.prog} --help.\n")

    def _meant(self, message: str) -> str:
        options = re.findall(r"(?<!\S)--[a-z-]+", self.format_help())
        wrong = re.search(r"unrecognized arguments:.*?(--[^\s=]+)", message)
        close = difflib.get_close_matches(wrong[1], options, n=1) if wrong else []
        return f": did you mean {close[0]}?" if close else "."


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command, for completion and help too."""
    parser = _Parser(prog="anomalib-musc", description="Find defects in unlabelled images of one product.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    formatter: Any = argparse.RawDescriptionHelpFormatter
    predict = commands.add_parser(
        "predict",
        help="score a folder of images: a table, a page and pictures",
        description="Find defects in unlabelled images of one product.",
        epilog=command.EXAMPLES,
        formatter_class=formatter,
        allow_abbrev=False,
        usage="anomalib-musc predict IMAGES ... [options]",
    )
    command.add_arguments(predict)
    benchmark = commands.add_parser("benchmark", help="run models side by side and write a report")
    benchmark.add_argument("--config", type=Path, required=True, help="YAML file, see configs/benchmark")
    benchmark.add_argument("--output", type=Path, help="folder for the results, in place of the file's")
    completion = commands.add_parser("completion", help="print what completes this command in a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    for name, run in (("predict", _predict), ("benchmark", _benchmark), ("completion", _complete)):
        commands.choices[name].set_defaults(run=run, parser=commands.choices[name])
    return parser


def main() -> None:
    """Run a subcommand; exits with 0 if it did well, with 1 if it failed, with 2 if an argument is wrong."""
    arguments, unknown = make_parser().parse_known_args()
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        sys.exit(arguments.run(arguments))
    except KeyboardInterrupt:
        sys.stderr.write("\nerror: interrupted\n")
        sys.exit(128 + signal.SIGINT)


def _complete(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        sys.stderr.write("error: completion needs shtab: pip install 'anomalib-musc[completion]'.\n")
        return 1
    sys.stdout.write(shtab.complete(make_parser(), arguments.shell) + "\n")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    try:
        return command.predict(arguments)
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        if arguments.verbose:
            traceback.print_exc()
        message = " ".join(str(error).split()).replace("default_root_dir", "--output")
        sys.stderr.write(f"error: {message}\n")
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1


def _benchmark(arguments: argparse.Namespace) -> int:
    from anomalib_musc.benchmark.pipeline import SideBySide

    try:
        records = SideBySide().run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    failed = [record for record in records if record.failure is not None]
    for record in failed:
        name = f"{record.model} on {record.dataset} {record.category}"
        sys.stderr.write(f"failed: {name}: {record.failure}\n")
    return 1 if failed else 0
