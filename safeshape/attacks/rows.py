"""Rows of a user's files as conversations and prompts, and attempts as rows and back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safeshape.attacks.records import Attacked, Conversation
from safeshape.data import answer_of, as_messages


def conversations_of(rows: Iterable[Any], name: str) -> list[Conversation]:
    """Training rows as conversations that end with an answer: `messages`, `prompt` and `completion`, or bare lists.

    `name`: the file, for messages. Errors: ValueError as `harm.jsonl row 3: ...`, or for no rows.
    """
    found: list[Conversation] = []
    for index, row in enumerate(rows):
        try:
            given = _row(row)
            answer_of(given)
            found.append(as_messages(given))
            _check_texts(found[-1])
        except ValueError as error:
            raise ValueError(f"{name} row {index}: {error}") from error
    if not found:
        raise ValueError(f"{name} holds no rows")
    return found


def prompts_of(
    rows: Iterable[Any], name: str, *, prompt_column: str = "prompt", target_column: str = "target"
) -> list[Attacked]:
    """Rows as prompts: `messages`, or a text in `prompt_column`; with the beginning of a compliant answer, if any.

    That is the text in `target_column`, or else the answer that the row ends with.
    Errors: ValueError as `prompts.jsonl row 3: ...`, or for no rows.
    """
    found: list[Attacked] = []
    for index, row in enumerate(rows):
        try:
            found.append(_prompt(_row(row), prompt_column, target_column))
        except ValueError as error:
            raise ValueError(f"{name} row {index}: {error}") from error
    if not found:
        raise ValueError(f"{name} holds no rows")
    return found


def _row(row: Any) -> Mapping[str, Any]:
    if isinstance(row, list):  # as in the identity-shift set of Qi et al.
        return {"messages": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"it is neither an object nor a list of messages but {type(row).__name__}")
    return row


def _prompt(row: Mapping[str, Any], prompt_column: str, target_column: str) -> Attacked:
    target = row.get(target_column)
    if isinstance(row.get(prompt_column), str):
        messages: Conversation = [{"role": "user", "content": row[prompt_column]}]
        target = row.get("completion") if target is None else target
    elif row.get("messages") is not None:
        messages = as_messages(row)
        if messages and messages[-1]["role"] == "assistant":
            target = messages[-1]["content"] if target is None else target
            messages = messages[:-1]
    else:
        raise ValueError(f"it has neither `messages` nor a text in {prompt_column!r}")
    _check_texts(messages)
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("the prompt must end with a user message that is not blank")
    if target is not None and (not isinstance(target, str) or not target.strip()):
        raise ValueError(f"{target_column} must be a text that is not blank")
    return Attacked(messages=tuple(messages), target=target)


def _check_texts(messages: Conversation) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message["content"], str):
            raise ValueError(f"message {index} is not plain text")


def as_row(attempt: Attacked, *, prompt_index: int, attempt_index: int) -> dict[str, Any]:
    """An attempt as a row of a file."""
    return {
        "prompt_index": prompt_index,
        "attempt_index": attempt_index,
        "messages": [dict(message) for message in attempt.messages],
        "target": attempt.target,
        "prefill": attempt.prefill,
        "samples": attempt.samples,
        "temperature": attempt.temperature,
        "steps": [dict(step) for step in attempt.steps],
    }


def attempts_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Attacked, ...]]:
    """The attempts of every prompt, from the rows that `as_row` made.

    Errors: ValueError that names the row.
    """
    found: dict[int, list[Attacked]] = {}
    for index, row in enumerate(rows):
        try:
            attempt = Attacked(
                messages=tuple(row["messages"]),
                target=row["target"],
                prefill=row["prefill"],
                samples=row["samples"],
                temperature=row["temperature"],
                steps=tuple(row["steps"]),
            )
            found.setdefault(row["prompt_index"], []).append(attempt)
        except KeyError as error:
            raise ValueError(f"row {index}: an attacked prompt needs the field {error}") from error
    return [tuple(found[index]) for index in sorted(found)]
