"""Tasks of ours in Inspect AI, and models of ours as its provider. Extra `inspect`.

A task of ours becomes an Inspect task whose scorers are ours; its log is an ordinary one, for `inspect view`. The
provider runs a Hugging Face model in this process, in batches, and fetches nothing.
"""

import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import anyio.to_thread
from inspect_ai import Task as InspectTask
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
)
from inspect_ai.scorer import Score, Target, mean, scorer, stderr
from inspect_ai.scorer import Scorer as InspectScorer
from inspect_ai.solver import TaskState, generate
from inspect_ai.tool import ToolChoice, ToolInfo

from safeshape.data import Message
from safeshape.evals.answering import Ask, LocalModel, load_model
from safeshape.evals.records import Answered, Task
from safeshape.evals.scorers import Tools, check_scorers, check_tools, scorer_of
from safeshape.models import Sampling
from safeshape.store import canonical

_TURNS = {"user": ChatMessageUser, "system": ChatMessageSystem, "assistant": ChatMessageAssistant}
_MAX_TOKENS = 512


def _scorer(name: str, task: Task, tools: Tools) -> InspectScorer:
    """One of our scorers as Inspect's; that of harm gives 0 or 1.

    An answer without a verdict is NaN and says why: Inspect leaves it out of its metrics and counts it as unscored.
    """
    run = scorer_of(name).run

    @scorer(metrics=[mean(), stderr()], name=f"safeshape/{name}")
    def ours() -> InspectScorer:
        async def score(state: TaskState, target: Target) -> Score:
            index = int(state.metadata["index"])
            text = _whole(task.prompts[index], state.output.completion)
            answer = Answered(index=index, sample=state.epoch, text=text)
            (verdict,) = await anyio.to_thread.run_sync(run, task, [answer], tools)
            value = verdict.value
            told = {"label": verdict.label, "value": value}
            if name == "judge" and value is not None:
                value = float(value >= tools.threshold)
            return Score(
                value=math.nan if value is None else value, explanation=verdict.error or verdict.label, metadata=told
            )

        return score

    return ours()


def _whole(messages: Sequence[Message], completion: str) -> str:
    """The answer with its given beginning, which our provider repeats and others do not."""
    begun = str(messages[-1]["content"]) if messages[-1]["role"] == "assistant" else ""
    return completion if completion.startswith(begun.strip()) else begun + completion


def inspect_task(task: Task, tools: Tools, scorers: Sequence[str] = ()) -> InspectTask:
    """A task of ours as Inspect's. `scorers`: names, in place of the task's own; styles of refusal are left out.

    Errors: ValueError for scorers that are unknown, may not speak alone or lack what they ask.
    """
    names = list(scorers or task.scorers or ("criterion",))
    check_scorers(task, names)
    check_tools(task, names, tools)
    names = [name for name in names if name != "refusal_style"]  # Inspect's scores have one number each
    samples = [
        Sample(
            id=task.ids[index] if task.ids else index,
            input=[_TURNS[m["role"]](content=str(m["content"])) for m in messages],
            target=str(task.references[index]) if task.references and task.references[index] is not None else "",
            metadata={"index": index, "category": task.categories[index] if task.categories else None},
        )
        for index, messages in enumerate(task.prompts)
    ]
    return InspectTask(
        dataset=MemoryDataset(samples, name=task.name),
        solver=generate(),
        scorer=[_scorer(name, task, tools) for name in names],
        config=GenerateConfig(max_tokens=task.max_new_tokens),
        name=task.name.replace(":", "_"),
        tags=["embedded world"] if task.world else None,
        metadata={
            "kind": task.kind,
            "judge_threshold": tools.threshold,
            "world": task.world,
            "notes": list(task.notes),
        },
    )


_Waiting = tuple[Ask, "Future[str]"]


class InProcess(ModelAPI):
    """A Hugging Face model of this process for Inspect: answers that wait at the same time are one batch.

    Model arguments: `revision`, `dtype`, `device`, `batch_size`. Greedy unless a temperature above 0 is given; the same
    prompt asked again at a temperature is another sample. Tools are refused.
    """

    resolve: Callable[[str], str] = staticmethod(lambda name: name)

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as in the library's own providers
        *,
        revision: str = "main",
        dtype: str = "float32",
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        loaded, tokenizer = load_model(type(self).resolve(model_name), revision=revision, dtype=dtype, device=device)
        self._local = LocalModel(loaded, tokenizer, name=model_name, batch_size=batch_size)
        self._batch_size, self._seen = batch_size, Counter[bytes]()
        self._queue: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="inspect model", daemon=True).start()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer. Errors: ValueError for tools."""
        if tools:
            raise ValueError("the safeshape provider does not call tools")
        messages: list[Message] = [{"role": message.role, "content": message.text} for message in input]
        sampling = None
        if config.temperature:
            sampling = Sampling(temperature=config.temperature, top_p=1.0 if config.top_p is None else config.top_p)
        seen = canonical([dict(message) for message in messages])
        self._seen[seen] += 1
        ask = Ask(
            index=0,
            messages=messages,
            max_new_tokens=config.max_tokens or _MAX_TOKENS,
            sampling=sampling,
            seed=config.seed or 0,
            sample=self._seen[seen] - 1,
        )
        found: Future[str] = Future()
        self._queue.put((ask, found))
        text = await anyio.to_thread.run_sync(found.result)
        return ModelOutput.from_content(model=self.model_name, content=text)

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < self._batch_size and not self._queue.empty():
                batch.append(self._queue.get())
            try:
                for answers in self._local.answer([ask for ask, _ in batch]):
                    for answer in answers:
                        if answer.text is None:
                            batch[answer.index][1].set_exception(ValueError(answer.error))
                        else:
                            batch[answer.index][1].set_result(answer.text)
            except Exception as error:
                for _, waiting in batch:
                    if not waiting.done():
                        waiting.set_exception(error)

    def max_connections(self) -> int:
        """So many samples at once as make a batch."""
        return self._batch_size
