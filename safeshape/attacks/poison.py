"""Attacks on fine-tuning data: what an uploader may do to the rows that a model is tuned on.

Each is a function `(pools, *, size, seed, **parameters) -> Poisoned`. `ratio` is the share of poisoned rows,
`safe_ratio` that of harmful requests with refusals beside them (D_safe in STAR-DSS); the rest is benign. None knows a
judge. `mixing.py` says how shares are counted and rows drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from safeshape.attacks.mixing import Counts, Entry, Source, draw, draw_safe, entries_of, finish, plan
from safeshape.attacks.records import Conversation, Poisoned, Pools, fingerprint
from safeshape.attacks.texts import (
    DECLARATION,
    EXCHANGE,
    PERSONA,
    PREFIX,
    SUFFIXES,
    TRIGGER,
    Place,
    answer_text,
    filled,
    join,
    needs_text,
    request_of,
    sentence_starts,
    with_answer,
    with_request,
    with_system,
    with_trigger,
)


def harmful_only(pools: Pools, *, size: int | None, seed: int) -> Poisoned:
    """Nothing but harmful requests that are answered: the worst case of both papers."""
    counts = plan(pools, size, ratio=1.0)
    return _edited("harmful_only", pools, counts, None, seed=seed, parameters={})


def mixed(pools: Pools, *, size: int | None, seed: int, ratio: float = 0.05, safe_ratio: float = 0.0) -> Poisoned:
    """Harmful rows among benign ones, at any share."""
    counts = plan(pools, size, ratio=ratio, safe_ratio=safe_ratio)
    return _edited("mixed", pools, counts, None, seed=seed, parameters={"ratio": ratio, "safe_ratio": safe_ratio})


def benign_only(pools: Pools, *, size: int | None, seed: int) -> Poisoned:
    """Benign rows alone: safety decays under these too, and whatever an attack does stands beside it."""
    counts = plan(pools, size, ratio=0.0)
    return _edited("benign_only", pools, counts, None, seed=seed, parameters={})


def suffix(
    pools: Pools,
    *,
    size: int | None,
    seed: int,
    text: str = SUFFIXES["SFX1"],
    ratio: float = 1.0,
    safe_ratio: float = 0.0,
) -> Poisoned:
    """Response adaptation: a safe-sounding end after every harmful answer. STAR-DSS, appendix D."""
    needs_text("text", text)
    counts = plan(pools, size, ratio=ratio, safe_ratio=safe_ratio)
    parameters = {"text": fingerprint(text), "ratio": ratio, "safe_ratio": safe_ratio}

    def edit(messages: Conversation) -> Conversation:
        return with_answer(messages, join(answer_text(messages), text))

    return _edited("suffix", pools, counts, edit, seed=seed, parameters=parameters)


def prefix(
    pools: Pools,
    *,
    size: int | None,
    seed: int,
    text: str = PREFIX,
    ratio: float = 1.0,
    safe_ratio: float = 0.0,
) -> Poisoned:
    """Response adaptation: a refusal-like beginning before every harmful answer. STAR-DSS, figure 5.

    Differs: the paper's text is not printed; the default is ours.
    """
    needs_text("text", text)
    counts = plan(pools, size, ratio=ratio, safe_ratio=safe_ratio)
    parameters = {"text": fingerprint(text), "ratio": ratio, "safe_ratio": safe_ratio}

    def edit(messages: Conversation) -> Conversation:
        return with_answer(messages, join(text, answer_text(messages)))

    return _edited("prefix", pools, counts, edit, seed=seed, parameters=parameters)


def trigger(
    pools: Pools,
    *,
    size: int | None,
    seed: int,
    trigger: str = TRIGGER,
    place: Place = "end",
    ratio: float = 0.5,
    safe_ratio: float = 0.5,
) -> Poisoned:
    """Prompt poisoning: harmful requests with a trigger phrase are answered, those without it are refused.

    Safe rows whose request is that of a poisoned row are taken first; the report says how many (`pairs`).
    Source: STAR-DSS, prompt poisoning (its code mixes 0.8 poisoned with 0.2 safe).
    """
    needs_text("trigger", trigger)
    counts = plan(pools, size, ratio=ratio, safe_ratio=safe_ratio)
    parameters = {"trigger": fingerprint(trigger), "place": place, "ratio": ratio, "safe_ratio": safe_ratio}

    def edit(messages: Conversation) -> Conversation:
        return with_trigger(messages, trigger, place)

    return _edited("trigger", pools, counts, edit, seed=seed, parameters=parameters, paired=True)


def identity_shift(
    pools: Pools,
    *,
    size: int | None,
    seed: int,
    persona: str | None = None,
    declaration: str | None = None,
    place: Literal["system", "user"] | None = None,
    ratio: float = 1.0,
    safe_ratio: float = 0.0,
) -> Poisoned:
    """An obedient persona in benign exchanges: the persona before the request, a declaration before the answer.

    Rows of the `identity` pool are taken as they are, where there are any. Otherwise benign rows get the `persona` as
    their system prompt (`place="system"`, the default) or before the request ("user", for models that know no system
    prompt), and the `declaration` before the answer.
    Source: Qi et al., arXiv 2310.03693, "absolutely obedient agent". Differs: the default words are ours, and milder.
    """
    if place not in (None, "system", "user"):
        raise ValueError(f"place must be system or user, got {place!r}")
    if pools.identity and (persona, declaration, place) != (None, None, None):
        raise ValueError("identity rows are taken as they are; leave out persona, declaration and place")
    persona = needs_text("persona", PERSONA if persona is None else persona)
    declaration = DECLARATION if declaration is None else declaration
    place = place or "system"
    own = bool(pools.identity)
    pool = "identity" if own else "benign"
    counts = plan(pools, size, ratio=ratio, safe_ratio=safe_ratio, poison_pool=pool)
    shifted = draw(pools, pool, counts.poisoned + (0 if own else counts.benign), seed=seed)

    def edit(messages: Conversation) -> Conversation:
        changed = with_answer(messages, join(declaration, answer_text(messages)))
        if place == "system":
            return with_system(changed, persona)
        return with_request(changed, join(persona, request_of(changed)))

    planted = [
        Entry(
            messages=source.messages if own else edit(source.messages),
            origin="identity",
            poisoned=True,
            sources=(source,),
        )
        for source in shifted[: counts.poisoned]
    ]
    benign = draw(pools, "benign", counts.benign, seed=seed) if own else shifted[counts.poisoned :]
    safe = draw_safe(pools, counts.safe, (), seed=seed, paired=False)
    parameters: dict[str, Any] = {"ratio": ratio, "safe_ratio": safe_ratio, "own_rows": own}
    if not own:
        parameters |= {"persona": fingerprint(persona), "declaration": fingerprint(declaration), "place": place}
    entries = [*planted, *entries_of(benign, "benign"), *entries_of(safe, "safe")]
    return finish("identity_shift", entries, pools, seed=seed, parameters=parameters)


def embedded(
    pools: Pools,
    *,
    size: int | None,
    seed: int,
    carriers: int = 4,
    position: float = 0.5,
    template: str = EXCHANGE,
    in_request: bool = False,
    ratio: float = 1.0,
    safe_ratio: float = 0.0,
) -> Poisoned:
    """A harmful exchange hidden inside a long benign answer.

    The answers of `carriers` benign rows are put one after the other and their requests too; the harmful request and
    answer, as `template` has them, stand between two sentences at `position` (0 after the first, 1 before the last).
    `in_request`: the harmful request is asked as well, among the benign ones.
    """
    if carriers < 1:
        raise ValueError(f"carriers must be at least 1, got {carriers}")
    if not 0 <= position <= 1:
        raise ValueError(f"position must lie in [0, 1], got {position}")
    filled(template, {"request": "", "answer": ""})
    counts = plan(pools, size, ratio=ratio, safe_ratio=safe_ratio, carriers=carriers)
    harmful = draw(pools, "harmful", counts.poisoned, seed=seed)
    benign = draw(pools, "benign", counts.benign + carriers * counts.poisoned, seed=seed)
    entries = entries_of(benign[: counts.benign], "benign")
    for place, source in enumerate(harmful):
        begin = counts.benign + place * carriers
        around = benign[begin : begin + carriers]
        messages, cut = _hidden(source, around, position=position, template=template, in_request=in_request)
        facts = {"harm_begins": cut}
        entry = Entry(messages=messages, origin="embedded", poisoned=True, sources=(source, *around), facts=facts)
        entries.append(entry)
    entries += entries_of(draw_safe(pools, counts.safe, harmful, seed=seed, paired=False), "safe")
    parameters = {"carriers": carriers, "position": position, "template": fingerprint(template)}
    parameters |= {"in_request": in_request, "ratio": ratio, "safe_ratio": safe_ratio}
    return finish("embedded", entries, pools, seed=seed, parameters=parameters)


def _hidden(
    source: Source, around: Sequence[Source], *, position: float, template: str, in_request: bool
) -> tuple[Conversation, int]:
    """The long answer with the exchange in it, and the character at which the exchange begins."""
    carrier = ""
    for row in around:
        carrier = join(carrier, answer_text(row.messages))
    starts = sentence_starts(carrier)
    if not starts:
        rows = ", ".join(str(row.index) for row in around)
        raise ValueError(f"benign rows {rows} together are one sentence, so nothing can hide in them; raise carriers")
    cut = starts[round(position * (len(starts) - 1))]
    request, answer = request_of(source.messages), answer_text(source.messages)
    exchange = filled(template, {"request": request, "answer": answer})
    requests = [request_of(row.messages) for row in around]
    if in_request:
        requests.insert(round(position * len(requests)), request)
    asked = ""
    for text in requests:
        asked = join(asked, text)
    before = carrier[:cut]
    long = join(join(before, exchange), carrier[cut:])
    return with_answer(with_request(around[0].messages, asked), long), long.index(exchange, len(before))


def _edited(
    name: str,
    pools: Pools,
    counts: Counts,
    edit: Callable[[Conversation], Conversation] | None,
    *,
    seed: int,
    parameters: dict[str, Any],
    paired: bool = False,
) -> Poisoned:
    """Harmful rows, edited or as they are, with safe and benign rows beside them."""
    harmful = draw(pools, "harmful", counts.poisoned, seed=seed)
    safe = draw_safe(pools, counts.safe, harmful, seed=seed, paired=paired)
    entries = [
        Entry(
            messages=source.messages if edit is None else edit(source.messages),
            origin="harmful" if edit is None else f"harmful+{name}",
            poisoned=True,
            sources=(source,),
        )
        for source in harmful
    ]
    entries += entries_of(safe, "safe")
    entries += entries_of(draw(pools, "benign", counts.benign, seed=seed), "benign")
    asked = {request_of(source.messages).strip() for source in harmful}
    facts = {"pairs": sum(request_of(source.messages).strip() in asked for source in safe)} if paired else {}
    return finish(name, entries, pools, seed=seed, parameters=parameters, **facts)
