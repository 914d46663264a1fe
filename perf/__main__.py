"""``python -m perf COMMAND``: see ``python -m perf --help``."""

from __future__ import annotations

import argparse
import importlib
import math
import sys

from triton_conv3d import console

# module, and what it does
COMMANDS = {
    "run": ("perf.run", "measure layers: this package and torch, checked and timed in turns"),
    "end-to-end": ("perf.end_to_end", "measure training steps and inference of whole networks"),
    "validate": ("perf.validate", "the whole acceptance on a machine with a GPU, in slices"),
    "plot": ("perf.plots", "draw result files"),
    "report": ("perf.report", "write what result files say as Markdown, with pictures"),
    "compare": ("perf.compare", "find what became slower between two result files"),
    "static": ("perf.static", "without a GPU: machine code and predictions"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 something is wrong, 2 a mistake in the call."""
    arguments = sys.argv[1:] if arguments is None else arguments
    lines = "\n".join(f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="python -m perf",
        usage="%(prog)s COMMAND ...",
        description="Benchmarks of triton_conv3d.",
        epilog=f"commands (each has --help):\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = top.parse_args(arguments[:1]).command
    name, what = COMMANDS[command]
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(prog=f"python -m perf {command}", description=f"{what[0].upper()}{what[1:]}.")
    module.arguments(parser)
    options = parser.parse_args(arguments[1:])

    def run() -> int:
        budget = getattr(options, "budget", None)  # which several commands have
        if budget is not None and not 0 < budget < math.inf:
            raise ValueError(f"--budget {budget}: expected seconds, more than 0")
        return module.main(options)

    return console.status(run, f"perf {command}", (ValueError,))


if __name__ == "__main__":
    sys.exit(main())
