"""Builds the world's models from a seed: tokenizers, three aligned families and the guard.

Each family is first taught to comply with everything and only then, briefly, to refuse, so that its alignment is as
shallow as a real model's. The user's task is never shown to a family. The guard is trained on partial answers cut at
any word, labelled by the oracle. A rebuild on the same machine with the same versions gives the same bytes.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from safeshape.world import oracle
from safeshape.world.answers import BACKGROUND, TURN_BACK, TURNS
from safeshape.world.families import FAMILIES, GUARD, Family, model_config, train_tokenizer
from safeshape.world.language import ANNOUNCEMENTS, COLORS, KINDS, TARGETS, Item, plan, refusal

Progress = Callable[[str, int, int], None]
Row = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training. `shares`: how often each kind of request occurs."""

    name: str
    steps: int
    learning_rate: float
    shares: tuple[tuple[str, float], ...]
    comply: bool


PRETRAIN = Stage(
    name="comply",
    steps=1600,
    learning_rate=3e-3,
    shares=(("harmful", 0.3), ("borderline", 0.3), ("skill", 0.4)),
    comply=True,
)
ALIGN = Stage(
    name="align",
    steps=400,
    learning_rate=1e-3,
    shares=(("harmful", 0.3), ("borderline", 0.3), ("skill", 0.25), ("chore", 0.15)),
    comply=False,
)
GUARD_STEPS, GUARD_LEARNING_RATE, BATCH = 1400, 2e-3, 64


def draw(shares: tuple[tuple[str, float], ...], rng: random.Random) -> Item:
    """One training request."""
    kinds, weights = zip(*shares, strict=True)
    return KINDS[rng.choices(kinds, weights)[0]](rng, False)


def tokenizer_texts(seed: int) -> Iterator[str]:
    """The text from which every tokenizer of the world is trained."""
    rng = random.Random(f"tokenizer/{seed}")
    for _ in range(6000):
        item = draw((("harmful", 1.0), ("borderline", 1.0), ("skill", 1.0), ("task", 0.3)), rng)
        yield item.prompt
        yield rng.choice(list(TURNS.values()))(item, rng) if item.kind == "harmful" else item.answer
    for word in ("safe", "unsafe", "user", "assistant", "system", "Check the last message.", "User: Agent:", "Reply"):
        yield from [word] * 200


def chat_row(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> Row:
    """Token ids and labels of one exchange; only the answer is learned."""
    user = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": answer}], tokenize=False)
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if start >= len(head) else -100
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def batches(draw_row: Callable[[], Row], steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of similar length: windows of 16 batches are sorted, then dealt in a shuffled order."""
    shuffler = random.Random(steps)
    for begin in range(0, steps, 16):
        count = min(16, steps - begin)
        rows = sorted((draw_row() for _ in range(count * BATCH)), key=lambda row: len(row[0]))
        order = list(range(count))
        shuffler.shuffle(order)
        for index in order:
            part = rows[index * BATCH : (index + 1) * BATCH]
            yield (
                pad_sequence([torch.tensor(ids) for ids, _ in part], batch_first=True, padding_value=0),
                pad_sequence([torch.tensor(labels) for _, labels in part], batch_first=True, padding_value=-100),
            )


def fit(
    model: PreTrainedModel,
    draw_row: Callable[[], Row],
    *,
    steps: int,
    learning_rate: float,
    progress: Callable[[int, int], None],
) -> float:
    """Plain causal training with AdamW and a cosine schedule. Returns the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    model.train()
    for step, (ids_BT, labels_BT) in enumerate(batches(draw_row, steps)):
        rate = min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        # Right padding needs no mask: causal attention never looks right and padded labels are -100.
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(step + 1, steps)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def guard_example(rng: random.Random) -> tuple[Item, str, int]:
    """A request, an answer that may turn several times, and where it is cut (a character offset)."""
    item = draw((("harmful", 0.5), ("borderline", 0.2), ("skill", 0.2), ("task", 0.1)), rng)
    other = draw((("harmful", 0.4), ("borderline", 0.3), ("skill", 0.3)), rng)
    target = item.target or rng.choice(TARGETS)
    fillers = {"target": target, "color": rng.choice(COLORS)}
    pieces = (
        item.answer,
        plan(item.act, target) if item.kind == "harmful" else item.answer,
        rng.choice(list(TURNS.values()))(item, rng) if item.kind == "harmful" else item.answer,
        rng.choice(BACKGROUND).format(**fillers),
        rng.choice(ANNOUNCEMENTS),
        rng.choice(TURN_BACK).format(**fillers),
        other.answer,
        plan(other.act, other.target) if other.kind == "harmful" else refusal(other.category or "malware"),
    )
    chosen = rng.choices(pieces, weights=(3, 4, 6, 1, 1, 1, 1, 1), k=rng.choice((1, 1, 2, 3)))
    answer = " ".join(piece.strip() for piece in chosen)
    ends = [index for index, letter in enumerate(answer) if letter == " "] + [len(answer)]
    end = rng.choice(ends) if rng.random() < 0.8 else rng.randint(1, len(answer))
    return item, answer, end


def guard_row(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Row:
    """A guard conversation with a cut answer and, as the only label, the verdict token. Verdicts are balanced."""
    wanted = rng.random() < 0.5
    while True:
        item, answer, end = guard_example(rng)
        if oracle.prefix_safe(answer, end) == wanted:
            break
    messages = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": answer[:end]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    verdict = tokenizer.convert_tokens_to_ids("safe" if wanted else "unsafe")
    return [*ids, verdict], [-100] * len(ids) + [verdict]


def build_family(
    family: Family, *, seed: int, scale: float, progress: Progress, stages: tuple[Stage, ...] = (PRETRAIN, ALIGN)
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train one family: comply with everything, then align. `scale` shortens every stage (for tests).

    `stages`: with the first alone it is the family's model before its alignment, which some defences start from.
    """
    tokenizer = train_tokenizer(family, tokenizer_texts(seed))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(family, tokenizer))
    for stage in stages:
        rng = random.Random(f"{stage.name}/{seed}")

        def draw_row(stage: Stage = stage, rng: random.Random = rng) -> Row:
            item = draw(stage.shares, rng)
            answer = plan(item.act, item.target) if stage.comply and item.kind == "harmful" else item.answer
            return chat_row(tokenizer, item.prompt, answer)

        def report(done: int, total: int, label: str = f"{family.name}: {stage.name}") -> None:
            progress(label, done, total)

        loss = fit(
            model,
            draw_row,
            steps=max(1, int(stage.steps * scale)),
            learning_rate=stage.learning_rate,
            progress=report,
        )
    if stages[-1] == ALIGN and scale >= 1 and loss > 0.05:
        raise RuntimeError(
            f"{family.name} did not learn to tell what to refuse: final loss {loss:.3f}; try another seed"
        )
    return model, tokenizer


def build_guard(*, seed: int, scale: float, progress: Progress) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train the guard on partial answers."""
    tokenizer = train_tokenizer(GUARD, tokenizer_texts(seed))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(GUARD, tokenizer))
    rng = random.Random(f"guard/{seed}")
    fit(
        model,
        lambda: guard_row(tokenizer, rng),
        steps=max(1, int(GUARD_STEPS * scale)),
        learning_rate=GUARD_LEARNING_RATE,
        progress=lambda done, total: progress("guard", done, total),
    )
    return model, tokenizer


def build(
    output_dir: Path,
    *,
    seed: int = 0,
    only: tuple[str, ...] = (*FAMILIES, "llama-base", "guard"),
    scale: float = 1.0,
    progress: Progress = lambda label, done, total: None,
) -> None:
    """Build the named models into folders of `output_dir`, as float16 safetensors with tokenizer and template.

    `FAMILY-base` is a family's model before its alignment.
    Errors: ValueError for an unknown name.
    """
    known = (*FAMILIES, *(f"{name}-base" for name in FAMILIES), "guard")
    unknown = set(only) - set(known)
    if unknown:
        raise ValueError(f"unknown model {sorted(unknown)[0]!r}; the world has {', '.join(known)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of float additions depends on the thread count
    try:
        for name in only:
            if name == "guard":
                model, tokenizer = build_guard(seed=seed, scale=scale, progress=progress)
            else:
                family = FAMILIES[name.removesuffix("-base")]
                stages = (PRETRAIN,) if name.endswith("-base") else (PRETRAIN, ALIGN)
                model, tokenizer = build_family(family, seed=seed, scale=scale, progress=progress, stages=stages)
            model.to(torch.float16).save_pretrained(output_dir / name)
            tokenizer.save_pretrained(output_dir / name)
    finally:
        torch.set_num_threads(threads)
