"""The command `elastic-hf`, also as `python -m elastic_hf`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .version import __version__


COMMANDS = {
    "prepare": "sort and split interactions that do not fit into memory",
    "train": "train a model on interactions, evaluate it and recommend",
    "evaluate": "rank what users went on to in the full catalogue, beside popularity",
    "recommend": "recommend for one history, or for all users of a file",
    "export": "write a model as ONNX programs",
    "publish": "publish a model on the Hugging Face Hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="elastic-hf",
        description="Sequential recommendation over whole histories.",
        epilog="\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()) + "\n\nEach command has a --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"elastic-hf {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of these:")
    name = parser.parse_args(argv[:1]).command
    # Of the commands only the one that is asked for is imported.
    try:
        import_module(f".commands.{name}", __package__).main(argv[1:])
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        print(f"elastic-hf {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"elastic-hf {name}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
