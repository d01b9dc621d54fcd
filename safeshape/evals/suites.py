"""The public suites by name: where each lies, how its rows are read, and the tasks it makes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safeshape.config.naming import named
from safeshape.evals import items as readers
from safeshape.evals.items import Item, Reader
from safeshape.evals.records import Kind, Task
from safeshape.evals.sources import Found, Hub, read_file, read_headerless, read_hub, read_mmlu_zip

SCORERS_OF: dict[Kind, tuple[str, ...]] = {
    "harmful": ("judge", "refusal_strings", "refusal_style"),
    "benign": ("refusal", "refusal_strings", "refusal_style"),
    "decline": ("refusal", "refusal_strings", "refusal_style"),
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One row of the table. `read`: rows to items. `hub`: where its splits lie; empty: the user supplies a file.

    `leave_out`: parts that are not asked unless they are named, with the reason. `scorers`: for its questions.
    """

    read: Reader
    hub: tuple[Hub, ...]
    source: str
    licence: str
    field: str
    max_new_tokens: int = 512
    scorers: tuple[str, ...] = ()
    leave_out: tuple[tuple[str, str], ...] = ()


_OWN = "messages or prompt"
_COPYRIGHT = "copyright is judged by hashes of the works, which are not public; no judge of harm can tell it"
SUITES: dict[str, Suite] = {
    "advbench": Suite(
        read=readers.advbench,
        hub=(Hub(id="walledai/AdvBench", split="train", part="advbench"),),
        source="Zou et al., arXiv 2307.15043",
        licence="MIT",
        field="goal",
    ),
    "harmbench": Suite(
        read=readers.harmbench,
        hub=tuple(
            Hub(id="walledai/HarmBench", name=name, split="train") for name in ("standard", "contextual", "copyright")
        ),
        source="Mazeika et al., arXiv 2402.04249",
        licence="MIT",
        field="ContextString + Behavior",
        leave_out=(("copyright", _COPYRIGHT),),
    ),
    "strongreject": Suite(
        read=readers.strongreject,
        hub=(Hub(id="walledai/StrongREJECT", split="train", part="strongreject"),),
        source="Souly et al., arXiv 2402.10260",
        licence="MIT",
        field="forbidden_prompt",
    ),
    "jailbreakbench": Suite(
        read=readers.jailbreakbench,
        hub=tuple(
            Hub(id="JailbreakBench/JBB-Behaviors", name="behaviors", split=split, part=split)
            for split in ("harmful", "benign")
        ),
        source="Chao et al., arXiv 2404.01318",
        licence="MIT",
        field="Goal",
    ),
    "hexphi": Suite(
        read=readers.hexphi, hub=(), source="Qi et al., arXiv 2310.03693", licence="own, by agreement", field="the line"
    ),
    "sorrybench": Suite(
        read=readers.sorrybench,
        hub=(Hub(id="sorry-bench/sorry-bench-202503", split="train", part="sorrybench"),),
        source="Xie et al., arXiv 2406.14598",
        licence="own, by agreement",
        field="turns, first",
    ),
    "xstest": Suite(
        read=readers.xstest,
        hub=(Hub(id="walledai/XSTest", split="test", part="xstest"),),
        source="Röttger et al., arXiv 2308.01263",
        licence="CC-BY-4.0",
        field="prompt",
    ),
    "coconot": Suite(
        read=readers.coconot,
        hub=(
            Hub(id="allenai/coconot", name="original", split="test"),
            Hub(id="allenai/coconot", name="contrast", split="test"),
        ),
        source="Brahman et al., arXiv 2407.12043",
        licence="ODC-BY",
        field="prompt",
    ),
    "orbench": Suite(
        read=readers.orbench,
        hub=tuple(
            Hub(id="bench-llm/or-bench", name=name, split="train") for name in ("or-bench-hard-1k", "or-bench-toxic")
        ),
        source="Cui et al., arXiv 2405.20947",
        licence="CC-BY-4.0",
        field="prompt",
    ),
    "directharm4": Suite(
        read=readers.directharm4,
        hub=(Hub(id="vfleaking/DirectHarm4", split="test", part="directharm4"),),
        source="Lyu et al., arXiv 2402.18540",
        licence="not stated",
        field="instruction",
    ),
    "simplesafetytests": Suite(
        read=readers.simplesafetytests,
        hub=(Hub(id="Bertievidgen/SimpleSafetyTests", split="test", part="simplesafetytests"),),
        source="Vidgen et al., arXiv 2311.08370",
        licence="CC-BY-4.0",
        field="prompt",
    ),
    "mitre_frr": Suite(
        read=readers.mitre_frr,
        hub=(),
        source="CyberSecEval 2, arXiv 2404.13161",
        licence="MIT",
        field="mutated_prompt",
    ),
    "ifeval": Suite(
        read=readers.ifeval,
        hub=(Hub(id="google/IFEval", split="train", part="ifeval"),),
        source="Zhou et al., arXiv 2311.07911",
        licence="CC-BY-4.0",
        field="prompt",
        max_new_tokens=1280,
        scorers=("ifeval",),
    ),
    "gsm8k": Suite(
        read=readers.gsm8k,
        hub=(Hub(id="openai/gsm8k", name="main", split="test", part="gsm8k"),),
        source="Cobbe et al., arXiv 2110.14168",
        licence="MIT",
        field="question",
        scorers=("numeric_match",),
    ),
    "mmlu": Suite(
        read=readers.mmlu,
        hub=(Hub(id="cais/mmlu", name="all", split="test", part="mmlu"),),
        source="Hendrycks et al., arXiv 2009.03300",
        licence="MIT",
        field="question + choices",
        max_new_tokens=16,
        scorers=("choice_letter",),
    ),
    "arc": Suite(
        read=readers.arc,
        hub=(Hub(id="allenai/ai2_arc", name="ARC-Challenge", split="test", part="arc"),),
        source="Clark et al., arXiv 1803.05457",
        licence="CC-BY-SA-4.0",
        field="question + choices",
        max_new_tokens=16,
        scorers=("choice_letter",),
    ),
    "truthfulqa": Suite(
        read=readers.truthfulqa,
        hub=(Hub(id="truthfulqa/truthful_qa", name="multiple_choice", split="validation", part="truthfulqa"),),
        source="Lin et al., arXiv 2109.07958",
        licence="Apache-2.0",
        field="question + mc1_targets",
        max_new_tokens=16,
        scorers=("choice_letter",),
    ),
    "sql_create_context": Suite(
        read=readers.sql_create_context,
        hub=(Hub(id="b-mc2/sql-create-context", split="train", part="sql_create_context"),),
        source="b-mc2/sql-create-context",
        licence="CC-BY-4.0",
        field="context + question",
        max_new_tokens=128,
        scorers=("sql_match",),
    ),
    "prompts": Suite(read=readers.own("harmful"), hub=(), source="your file", licence="yours", field=_OWN),
    "benign": Suite(read=readers.own("benign"), hub=(), source="your file", licence="yours", field=_OWN),
    "questions": Suite(
        read=readers.own("ability"),
        hub=(),
        source="your file",
        licence="yours",
        field=_OWN,
        scorers=("exact_match",),
    ),
}
OWN = ("prompts", "benign", "questions")


def load_suite(
    name: str, path: str | None = None, *, part: str | None = None, limit: int | None = None, seed: int = 0
) -> list[Task]:
    """The tasks of a suite, one for each kind of prompt in it.

    `path`: a file or folder in the published form; None: from the Hub. `part`: only that part of it (a functional
    category of HarmBench, a subject of MMLU, `safe` of XSTest). `limit`: so many prompts of each task, drawn by `seed`.
    Errors: ValueError in one sentence that names the suite, file, column or row.
    """
    suite: Suite = named(name, SUITES, "suite")
    found = _from_hub(name, suite) if path is None else _from_disk(name, Path(path))
    items = [item for source in found for item in suite.read(source)]
    notes: list[str] = []
    if part is not None:
        parts = sorted({item.part for item in items})
        if part not in parts:
            raise ValueError(f"suite {name!r} has no part {part!r}; it has: {', '.join(filter(None, parts)) or 'none'}")
        items = [item for item in items if item.part == part]
    for left, reason in suite.leave_out:
        if part is None and (count := sum(item.part == left for item in items)):
            items = [item for item in items if item.part != left]
            notes.append(f"{count} {left} prompts of {name} were left out: {reason}")
    if name == "hexphi" and part is None and not any(item.part == "category_2" for item in items):
        notes.append("hexphi: category_2.csv is missing, as in later releases; 10 of 11 categories are asked")
    if name == "sorrybench" and part is None and any(item.part == "base" for item in items):
        items = [item for item in items if item.part == "base"]
    kinds = list(dict.fromkeys(item.kind for item in items))
    tasks = []
    for kind in kinds:
        chosen = [item for item in items if item.kind == kind]
        if limit is not None and limit < len(chosen):
            places = sorted(random.Random(f"{name}/{kind}/{seed}").sample(range(len(chosen)), limit))
            chosen = [chosen[place] for place in places]
        label = name if len(kinds) == 1 else f"{name}_{kind}"
        if path is not None and name in OWN:  # several files of one's own are several tasks
            label = f"{label}:{Path(path).stem}"
        tasks.append(_task(label if part is None else f"{label}:{part}", suite, kind, chosen, notes))
    return tasks


def _task(name: str, suite: Suite, kind: Kind, items: Sequence[Item], notes: Sequence[str]) -> Task:
    return Task(
        name=name,
        dataset=name,
        prompts=[item.messages for item in items],
        max_new_tokens=suite.max_new_tokens,
        kind=kind,
        ids=[item.id for item in items],
        categories=[item.category for item in items],
        references=[item.reference for item in items],
        groups=[f"row {number}" if item.group is None else item.group for number, item in enumerate(items)],
        drawn=_drawn(name, items),
        scorers=SCORERS_OF.get(kind) or suite.scorers,
        notes=notes,
    )


def _drawn(name: str, items: Sequence[Item]) -> tuple[int, float | None]:
    """How many answers an attack wants drawn at each prompt, at which temperature. Errors: ValueError for several."""
    found = {(item.samples, item.temperature) for item in items}
    if len(found) > 1:
        raise ValueError(
            f"task {name!r} holds attempts with different samples or temperatures; write each kind to its own file"
        )
    return found.pop()


def _from_hub(name: str, suite: Suite) -> list[Found]:
    if not suite.hub:
        raise ValueError(f"suite {name!r} is not on the Hub; give the file as {name}=PATH")
    return [read_hub(hub) for hub in suite.hub]


def _from_disk(name: str, path: Path) -> list[Found]:
    """The files of a suite: one file, or all files of a folder that belong to it."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    folders: dict[str, Callable[[Path], list[Found]]] = {
        "hexphi": _hexphi_folder,
        "harmbench": _harmbench_folder,
        "jailbreakbench": partial(_folder, pattern="*behaviors*.csv"),
        "coconot": partial(_folder, pattern="*eval*.jsonl"),
    }
    if path.is_dir():
        if name not in folders:
            raise ValueError(f"{path} is a folder; suite {name!r} is one file")
        return folders[name](path)
    if name == "hexphi":
        raise ValueError(f"{path} is a file; hexphi is a folder of category_1.csv to category_11.csv")
    if name == "mmlu" and path.suffix == ".zip":
        return read_mmlu_zip(path)
    return [read_file(path)]


def _folder(path: Path, *, pattern: str) -> list[Found]:
    files = sorted(path.glob(pattern))
    if not files:
        raise ValueError(f"{path} holds no file named {pattern}")
    return [read_file(file) for file in files]


def _harmbench_folder(path: Path) -> list[Found]:
    """The whole list where it is there, else its halves for test and validation."""
    whole = path / "harmbench_behaviors_text_all.csv"
    return [read_file(whole)] if whole.is_file() else _folder(path, pattern="harmbench_behaviors_text_*.csv")


def _hexphi_folder(path: Path) -> list[Found]:
    """The eleven files; later releases withhold the second. Errors: ValueError that names any other missing one."""
    files = {number: path / f"category_{number}.csv" for number in range(1, 12)}
    missing = [file.name for number, file in files.items() if number != 2 and not file.is_file()]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; hexphi is a folder of category_1.csv to category_11.csv")
    return [read_headerless(file, ("prompt",)) for file in files.values() if file.is_file()]
