"""Rows of results made by hand for the tests of the report."""

from safeshape.report.rows import PromptOutcomes
from safeshape.stats import wilson
from safeshape.types import Row


def rate(successes, n=100, *, defence="star", metric="attack_success", seed=0, **fields):
    low, high = wilson(successes, n)
    return Row(
        **{
            "attack": "a",
            "defence": defence,
            "model": "m",
            "seed": seed,
            "metric": metric,
            "value": successes / n,
            "n": n,
            "low": low,
            "high": high,
            "judge": "oracle",
            "world": True,
            **fields,
        }
    )


def score(value, *, category=None, defence="star", half=0.25, metric="harmfulness", **fields):
    low, high = max(1.0, value - half), min(5.0, value + half)
    made = rate(1, defence=defence, metric=metric, category=category, **fields)
    return Row(**{**vars(made), "value": value, "low": low, "high": high, "n": 30})


def outcomes(counts, *, defence="star", prompts=None, seed=0):
    return PromptOutcomes(
        attack="a",
        defence=defence,
        model="m",
        seed=seed,
        metric="attack_success",
        judge="oracle",
        prompts=tuple(prompts or (f"p{place}" for place in range(len(counts)))),
        counts=tuple(map(bool, counts)),
    )


CATEGORIES = [f"category {letter}" for letter in "abcdefghijk"]
HOSTILE = "<script>alert(1)</script> | $x_1$ https://evil.example \u202e _a*b`c=1\n@x"
