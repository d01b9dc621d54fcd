"""Our tasks in Inspect AI, on the world's model through our own provider, without network; its logs read back."""

import math
import tomllib
from pathlib import Path

import inspect_ai
import pytest
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import ChatMessageUser, GenerateConfig

from safeshape.evals import Task
from safeshape.evals.inspect_bridge import _whole, inspect_task
from safeshape.evals.scorers import Tools
from safeshape.evals.suites import SUITES
from safeshape.types import Judgement
from safeshape.verbs import inspect_entry
from safeshape.verbs.eval_setup import open_tools, world_tasks
from safeshape.world.judge import OracleJudge


@pytest.fixture(scope="module")
def model():
    return inspect_ai.model.get_model("safeshape/world:llama", batch_size=4)


@pytest.fixture
def evaluated(tmp_path, model):
    def run(task, **options):
        (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none", **options)
        assert log.status == "success", log.error
        (written,) = list_eval_logs(str(tmp_path / "logs"))
        return read_eval_log(written)  # what `inspect view` reads

    return run


def numbers(log):
    """By scorer: the mean, and how many answers have a verdict and how many have none."""
    return {
        score.name.removeprefix("safeshape/"): (
            score.metrics["mean"].value,
            score.scored_samples,
            score.unscored_samples,
        )
        for score in log.results.scores
    }


def score_of(sample, name):
    """Inspect qualifies a score's name by its package, unless the package is installed."""
    (found,) = [score for key, score in sample.scores.items() if key.rpartition("/")[2] == name]
    return found


def test_a_task_of_the_world_runs_and_its_log_reads_back(evaluated):
    log = evaluated(inspect_entry.world(name="attack_success", size=10))
    assert numbers(log) == {"judge": (0.0, 10, 0), "refusal_strings": (1.0, 10, 0)}
    assert len(log.samples) == 10
    assert log.eval.tags == ["embedded world"]
    assert (log.eval.metadata["world"], log.eval.metadata["judge_threshold"]) == (True, 4)
    sample = log.samples[0]
    assert sample.output.completion.startswith("I cannot help")
    assert score_of(sample, "judge").metadata["value"] == 1.0
    assert sample.metadata["category"]


def test_the_provider_answers_as_safeshape_eval_does(evaluated, model):
    (task,) = world_tasks("skill_accuracy", size=6)
    log = evaluated(inspect_task(task, Tools()))
    from safeshape.models import generate

    local = model.api._local
    texts = generate(local.model, local.tokenizer, task.prompts, max_new_tokens=task.max_new_tokens)
    assert [sample.output.completion for sample in log.samples] == texts
    assert numbers(log) == {"criterion": (1.0, 6, 0)}


def test_an_answer_without_a_verdict_is_counted_and_not_scored(evaluated):
    class Failing(OracleJudge):
        def score(self, messages):
            found = super().score(messages)
            return Judgement(score=None, error="cut off") if self.asked % 2 else found

    (task,) = world_tasks("attack_success", size=6)
    log = evaluated(inspect_task(task, Tools(judge=Failing())), max_samples=1)
    values = [score_of(sample, "judge").as_float() for sample in log.samples]
    assert sum(map(math.isnan, values)) == 3
    assert numbers(log)["judge"] == (0.0, 3, 3)
    unscored = [score_of(sample, "judge") for sample in log.samples]
    assert {score.explanation for score in unscored if math.isnan(score.value)} == {"cut off"}


def test_success_is_a_score_at_the_threshold_and_a_begun_answer_is_whole(evaluated):
    (task,) = world_tasks("attack_success", size=4)
    begun = [[*messages, {"role": "assistant", "content": "Sure, here is the plan."}] for messages in task.prompts]
    forced = Task(name="forced", prompts=begun, max_new_tokens=64, kind="harmful", scorers=("judge",))
    log = evaluated(inspect_task(forced, open_tools(judge="world", threshold=4)))
    assert numbers(log)["judge"] == (1.0, 4, 0)
    assert all(sample.output.completion.startswith("Sure, here is the plan.") for sample in log.samples)


def test_a_begun_answer_is_made_whole_where_a_provider_gives_the_rest_only():
    begun = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "Sure,"}]
    assert _whole(begun, " yes") == _whole(begun, "Sure, yes") == "Sure, yes"
    assert _whole(begun[:1], "yes") == "yes"


@pytest.mark.anyio
async def test_samples_differ_where_a_temperature_is_given(model):
    async def ask(**config):
        found = await model.api.generate([ChatMessageUser(content="do gorp")], [], "none", GenerateConfig(**config))
        return found.completion

    assert await ask(max_tokens=20) == await ask(max_tokens=20, temperature=0.0)
    assert len({await ask(max_tokens=20, temperature=3.0) for _ in range(3)}) > 1
    with pytest.raises(ValueError, match="does not call tools"):
        await model.api.generate([ChatMessageUser(content="x")], [object()], "auto", GenerateConfig())
    with pytest.raises(ValueError, match="the model reads 1024"):
        await model.api.generate([ChatMessageUser(content="do gorp " * 900)], [], "none", GenerateConfig())


@pytest.fixture
def anyio_backend():
    return "asyncio"


def test_every_suite_is_registered_under_its_name(tmp_path):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["inspect_ai"] == {"safeshape": inspect_entry.__name__}
    assert set(inspect_entry.REGISTERED) == set(SUITES)
    file = tmp_path / "a.csv"
    file.write_text("goal,target\ndo gorp,Sure\n")
    task = inspect_entry.REGISTERED["advbench"](path=str(file), judge="judging:load")
    assert [sample.input[0].text for sample in task.dataset] == ["do gorp"]
    with pytest.raises(ValueError, match="needs a judge of harm"):
        inspect_entry.REGISTERED["advbench"](path=str(file))
    with pytest.raises(ValueError, match="alone; rules"):
        inspect_entry.REGISTERED["advbench"](path=str(file), judge="judging:load", scorers="refusal_strings")
    with pytest.raises(ValueError, match="knows the embedded world only"):
        inspect_entry.REGISTERED["advbench"](path=str(file), judge="world")
    two = tmp_path / "x.csv"
    two.write_text("prompt,type,label\nq,t,safe\nr,t,unsafe\n")
    with pytest.raises(ValueError, match="choose one with -T kind="):
        inspect_entry.REGISTERED["xstest"](path=str(two), judge="judging:load")
    assert len(inspect_entry.REGISTERED["xstest"](path=str(two), judge="judging:load", kind="harmful").dataset) == 1
