"""The command line: a table of verbs. Exit 0 on success, 2 on bad input with one sentence, 1 on failure."""

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# verb -> (what it does, module whose `main(argv)` returns what to print); only the verb that runs is imported.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("watch an aligned model lose its safety and keep it, offline, in minutes", "safeshape.verbs.demo"),
    "score": ("score every partial answer of a dataset with a guard", "safeshape.verbs.score"),
    "judge": ("rate the harm of every answer from 1 to 5 with a judge", "safeshape.verbs.judge"),
    "probe": ("fit, measure and use a probe on a model's hidden states", "safeshape.verbs.probe"),
    "train": ("fine-tune your model on your data with a safety policy", "safeshape.verbs.train"),
    "attack": ("poison fine-tuning data or attack prompts, to test a defence", "safeshape.verbs.attack"),
    "defences": (
        "list the defences with their cost, needs and sources, or measure the cost",
        "safeshape.verbs.defences",
    ),
    "eval": ("measure a model's safety and abilities", "safeshape.verbs.eval"),
    "bench": ("run a matrix of attack, defence, model and seed, and collect its rows", "safeshape.verbs.bench"),
    "report": ("turn results into tables, figures, a page and a safety card", "safeshape.verbs.report"),
    "world": ("list or rebuild the embedded world's models", "safeshape.verbs.world"),
}


def usage() -> str:
    """The list of verbs."""
    lines = ["usage: safeshape VERB [--config FILE] [--flags]", ""]
    lines += [f"  {verb:10}{text}" for verb, (text, _) in VERBS.items()]
    return "\n".join(
        [*lines, "", "`safeshape VERB --help` lists a verb's settings; `safeshape --version` its version."]
    )


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the library has to say while a verb runs goes to stderr."""
    handler, logger = logging.StreamHandler(), logging.getLogger("safeshape")
    handler.setFormatter(logging.Formatter("safeshape: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # a user's own module:function lies where the command is run
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(importlib.import_module("safeshape").__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"safeshape: unknown verb {verb!r}; known: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    if not os.environ.get("SAFESHAPE_DEBUG"):
        warnings.simplefilter("ignore", FutureWarning)  # about TRL's own settings, which a user cannot mend
    run: Callable[[Sequence[str]], str] = importlib.import_module(VERBS[verb][1]).main
    if os.environ.get("SAFESHAPE_DEBUG"):
        with told():
            print(run(rest))
        return 0
    try:
        with told():
            print(run(rest))
    except (ValueError, OSError) as error:
        print(f"safeshape {verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"safeshape {verb}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"safeshape {verb}: failed: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
