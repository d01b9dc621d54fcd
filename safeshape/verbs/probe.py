"""`safeshape probe`: the way to its sub-verbs."""

import importlib
from collections.abc import Sequence

SUB_VERBS = {
    "fit": ("fit a probe to labelled prompts", "safeshape.verbs.probe_fit"),
    "eval": ("measure probes beside their controls: sets and categories left out", "safeshape.verbs.probe_eval"),
    "score": ("score a dataset's requests with a probe", "safeshape.verbs.probe_score"),
}


def main(argv: Sequence[str]) -> str:
    """Run a sub-verb. Errors: ValueError in one sentence."""
    if argv and argv[0] in ("-h", "--help"):
        lines = ["usage: safeshape probe SUBVERB [--config FILE] [--flags]", ""]
        lines += [f"  {name:8}{text}" for name, (text, _) in SUB_VERBS.items()]
        return "\n".join([*lines, "", "`safeshape probe SUBVERB --help` lists its settings."])
    if not argv or argv[0] not in SUB_VERBS:
        raise ValueError(f"say which: {', '.join(SUB_VERBS)}" + (f"; there is no {argv[0]!r}" if argv else ""))
    return str(importlib.import_module(SUB_VERBS[argv[0]][1]).main(argv[1:]))
