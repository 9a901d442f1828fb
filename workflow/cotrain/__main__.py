"""The `cotrain` command: one sub-command for each step of the workflow."""

import argparse
import errno
import importlib
import os
import signal
import sys

from cotrain.errors import InputError

# Threads that wait for each other must sleep, not spin: on a node shared with other jobs spinning
# made a training step five times slower. Read by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "check-data": ("cotrain.data_check", "open every image and label, report all problems"),
    "plan": ("cotrain.plan", "let nnU-Net plan on the labelled cases"),
    "preprocess": ("cotrain.preprocess", "preprocess cases onto the planned grid"),
    "fetch-weights": ("cotrain.weights", "get pretrained weights of a 2D encoder as a file"),
    "train": ("cotrain.training", "train one network for one round"),
    "infer": ("cotrain.inference", "infer masks of cases by sliding window"),
    "merge": ("cotrain.merge", "average the probabilities of two mask sets"),
    "audit": ("cotrain.audit", "decide which masks a network may learn from"),
    "overlays": ("cotrain.pictures:overlays", "make a page of pictures of audited masks"),
    "evaluate": ("cotrain.evaluate", "score masks against labels"),
    "summarise": ("cotrain.summary", "write the table and plots of an experiment"),
    "compare": ("cotrain.compare", "put experiments beside each other, with means and deviations"),
    "montage": ("cotrain.pictures:montage", "show one case through the rounds"),
    "export": ("cotrain.export", "write a model folder for stock nnUNetv2_predict"),
    "predict": ("cotrain.predict", "segment new images by the mean of both networks"),
    "status": ("cotrain.status", "print what is done, running and waiting"),
    "make-table": ("cotrain.make_table", "make a case table from folders of images"),
    "make-demo-data": ("cotrain.demo_data", "make the demo's subjects from the ICBM152 template"),
    "schema": ("cotrain.schema", "print the JSON schema of the settings"),
}
"""Command name → (module, help). A module is imported only when its command is called."""


REMEDIES = {
    errno.EACCES: "ask for permission, or give another place",
    errno.EPERM: "ask for permission, or give another place",
    errno.EROFS: "give a place that can be written to",
    errno.ENOSPC: "make room and give the same command again",
    errno.EDQUOT: "make room and give the same command again",
}
"""What to do where the file system refuses."""


def parsed(words: list[str]) -> argparse.Namespace:
    """Return the options of a command line, with the command's function as `run`."""
    parser = argparse.ArgumentParser(prog="cotrain", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = words[0] if words else None
    for name, (where, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if name == called:
            module_name, _, prefix = where.partition(":")
            module = importlib.import_module(module_name)
            suffix = f"_{prefix}" if prefix else ""
            getattr(module, f"add{suffix}_arguments")(command)
            command.set_defaults(run=getattr(module, f"run{suffix}"))
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run one command; return 0, or 2 after an error that the user can mend."""
    words = sys.argv[1:] if words is None else words
    arguments = parsed(words)
    called = arguments.command
    try:
        arguments.run(arguments)
    except InputError as error:
        print(f"cotrain {called}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        said = f"{error.filename or 'a file'}: {error.strerror}; {REMEDIES[error.errno]}."
        print(f"cotrain {called}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cotrain {called} was interrupted; give the same command to go on.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
