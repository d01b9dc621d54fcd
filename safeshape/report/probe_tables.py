"""The measurements of `safeshape probe eval` as text and as the tables of docs/probes.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from safeshape.report.tables import WORLD_NOTE

Results = Mapping[str, Any]
_HEAD = ("", "n (own)", "probe", "bag of words", "probe - bag", "flagged", "bag flagged", "at 80 % recall")


def number(found: Mapping[str, float], form: str = ".3f") -> str:
    """A value with its interval."""
    return f"{found['value']:{form}} ({found['low']:{form}}-{found['high']:{form}})"


def _difference(found: Mapping[str, float]) -> str:
    return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _flagged(found: Mapping[str, Any]) -> str:
    """The share of the unit's own prompts that are flagged: harmless ones wrongly, harmful ones rightly."""
    parts = [
        f"{100 * found[name]['value']:.0f} % of {'safe' if name == 'harmless_flagged' else 'harmful'}"
        for name in ("harmless_flagged", "harmful_flagged")
        if name in found
    ]
    return ", ".join(parts)


def _at_recall(row: Mapping[str, Any]) -> str:
    if "harmless_flagged_at_recall" not in row["probe"]:
        return ""
    return " / ".join(f"{100 * row[m]['harmless_flagged_at_recall']:.0f} %" for m in ("probe", "bag_of_words"))


def unit_rows(model: Results, kind: str) -> list[tuple[str, ...]]:
    """A line per unit of a kind, with AUROC and difference, and what is flagged at the threshold."""
    return [
        (
            row["name"],
            f"{row['harmful']}+{row['harmless']} ({row['own']})",
            number(row["probe"]["auroc"]),
            number(row["bag_of_words"]["auroc"]),
            _difference(row["difference"]),
            _flagged(row["probe"]),
            _flagged(row["bag_of_words"]),
            _at_recall(row),
        )
        for row in model["units"]
        if row["kind"] == kind
    ]


def calibration_rows(model: Results) -> list[tuple[str, ...]]:
    """Brier score and calibration error of the probe, calibrated and not, and of the bag of words."""
    return [
        (
            row["name"],
            *(f"{row['probe'][name]:.3f}" for name in ("brier", "brier_uncalibrated", "ece", "ece_uncalibrated")),
            f"{row['bag_of_words']['brier']:.3f}",
            f"{row['bag_of_words']['ece']:.3f}",
        )
        for row in model["units"]
        if row["kind"] != "category left out"
    ]


def template_lines(model: Results) -> list[str]:
    """The template check in sentences."""
    check = model["template"]
    lines = [
        f"Template check on {check['harmful']} harmful and {check['harmless']} harmless prompts; AUROC with the system "
        "prompt on nobody / everybody / the harmful / the harmless:"
    ]
    for name, label in (("probe", "this probe"), ("trapped", "fitted with it on harmful rows only")):
        across, shift = check[name]["across"], check[name]["shift"]
        lines.append(
            f"  {label}: {' / '.join(f'{value:.3f}' for value in across.values())}; the system prompt moves mean "
            f"p_safe by {shift['harmful']:+.3f} (harmful) and {shift['harmless']:+.3f} (harmless)"
        )
    return lines


def choices(model: Results) -> list[str]:
    """What was chosen for each unit that chose for itself."""
    found = []
    for row in model["units"]:
        one = row["chosen"]
        if row["kind"] != "category left out":
            layers = " ".join(map(str, one["layers"]))
            found.append(f"{row['name']}: {one['pooling']}, layers {layers} ({one['layer_pooling']}), C {one['C']:g}")
    return found


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns for a terminal."""
    widths = [max(len(line[place]) for line in [head, *rows]) for place in range(len(head))]
    return ["  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in [head, *rows]]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The same for a page."""
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]]


def _shuffled(model: Results) -> str:
    control = model["shuffled_labels"]
    return (
        f"Fitted on shuffled labels: AUROC {control['mean']:.3f} (mean of {control['shuffles']}, "
        f"{control['lowest']:.3f} to {control['highest']:.3f})"
    )


def _means(model: Results) -> list[str]:
    return [
        f"{kind}: mean AUROC {found['probe']:.3f}, bag of words {found['bag_of_words']:.3f}; of {found['units']} "
        f"the probe is surely better in {found['probe_better']}, surely worse in {found['probe_worse']}"
        for kind, found in model["summary"].items()
    ]


def text_report(results: Results) -> str:
    """Every figure, for a terminal."""
    lines = []
    for model in results["models"]:
        lines += [f"== {model['model']} ({model['hidden_states']} hidden states, {model['read_as']})", ""]
        for kind in model["summary"]:
            lines += [*aligned((kind, *_HEAD[1:]), unit_rows(model, kind)), ""]
        head = ("calibration", "Brier", "uncalibrated", "ECE", "uncalibrated", "bag Brier", "bag ECE")
        lines += [*aligned(head, calibration_rows(model)), "", *_means(model), _shuffled(model), *template_lines(model)]
        lines += ["", "Chosen from the rows to fit on:", *(f"  {line}" for line in choices(model)), ""]
    if results["world"]:
        lines.append(WORLD_NOTE)
    return "\n".join(lines).rstrip()


def docs_section(results: Results, title: str) -> str:
    """The part of docs/probes.md that is made from results; nothing in it is typed by hand."""
    made = dict(results["made_by"])
    seconds, device = made.pop("seconds"), made.pop("device")
    tools = ", ".join(f"{name} {version}" for name, version in made.items())
    sets = [
        (d["name"], d["label"], d["role"], str(d["n"]), str(d["categories"]), d["sha256"][:12]) for d in results["data"]
    ]
    settings = results["settings"]
    lines = [
        f"### {title}",
        "",
        f"At most {settings['max_per_dataset']} prompts a set, seed {settings['seed']}, flagged below p_safe "
        f"{settings['threshold']}. {device}, {seconds} s in all; {tools}.",
        *([WORLD_NOTE] if results["world"] else []),
        "",
        *markdown(("set", "label", "role", "n", "categories", "sha256"), sets),
    ]
    for model in results["models"]:
        lines += ["", f"#### `{model['model']}`", "", *(f"- {line}" for line in _means(model)), f"- {_shuffled(model)}"]
        check = template_lines(model)
        lines += [f"- {check[0]}", *(f"  - {line.strip()}" for line in check[1:])]
        for kind in model["summary"]:
            lines += ["", *markdown((kind, *_HEAD[1:]), unit_rows(model, kind))]
        head = ("calibration", "Brier", "uncalibrated", "ECE", "uncalibrated", "bag Brier", "bag ECE")
        lines += ["", *markdown(head, calibration_rows(model)), "", "Chosen from the rows to fit on:", ""]
        lines += [f"- {line}" for line in choices(model)]
    return "\n".join(lines) + "\n"
