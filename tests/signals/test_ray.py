"""Two actors of Ray Data on a local cluster give the rows and the scores of one process, to the last bit."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import conversation

import safeshape
from safeshape import world
from safeshape.cli import main
from safeshape.config import ScoreConfig
from safeshape.signals.column import fill, scored_rows
from safeshape.signals.engines import local, on_ray
from safeshape.signals.scorers import make_scorer
from safeshape.store import Store

pytest.importorskip("ray", reason="Ray is not installed: pip install 'safeshape[ray]'")

ROWS = [{"id": n, "messages": conversation("What is it", f"number {n} is red " * (1 + n % 4))} for n in range(60)]
ROWS[7]["messages"] = conversation("q", " ")
MAKER = {"test": "ray"}


@pytest.fixture(scope="module")
def cluster():
    import ray

    # The workers must import this copy of the package, not one that happens to be installed.
    environment = {"env_vars": {"PYTHONPATH": str(Path(safeshape.__file__).parent.parent)}}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    # Otherwise one actor may have done all of so little work before the other has begun.
    ray.data.DataContext.get_current().wait_for_min_actors_s = 120
    yield ray
    ray.shutdown()


def maker():
    """A function that workers, which cannot import this file, get by value."""

    def make():
        inner = make_scorer(ScoreConfig(dataset_name="d", output="o"), [world.path("guard")])

        def score(conversations):
            for found in inner(conversations):
                yield replace(found, scorer={"process": os.getpid()})

        return score

    return make


def run(engine, watch):
    def watched(items):
        for key, score in engine(items):
            watch.add(score.scorer["process"])
            yield key, score

    with Store(":memory:") as store:
        outcome = fill(lambda: ROWS, watched, store, maker=MAKER, keep_failures=True)
        assert (outcome.rows, outcome.scored) == (60, 59)
        return list(scored_rows(lambda: ROWS, store, maker=MAKER, scorer={}, outcome=outcome))


def test_two_actors_give_what_one_process_gives(cluster, tmp_path):
    here, there = set(), set()
    ours = run(local(maker()(), block=5), here)
    theirs = run(on_ray(maker(), actors=2, scratch=tmp_path / "shards", block=5), there)
    assert json.dumps(theirs) == json.dumps(ours)
    assert [row["id"] for row in theirs] == list(range(60))
    assert theirs[7]["safety"]["error"] == "the assistant's answer is empty or not a string"
    assert here == {os.getpid()}
    assert len(there) == 2
    assert os.getpid() not in there
    assert not (tmp_path / "shards").exists()


def test_nothing_to_score_starts_no_actor(tmp_path):
    made = on_ray(lambda: pytest.fail("an actor was made"), actors=2, scratch=tmp_path / "shards")
    assert list(made([])) == []
    assert not (tmp_path / "shards").exists()


@pytest.mark.slow
def test_the_verb_on_a_cluster_of_its_own(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["score", "--dataset_name", str(data), "--on_error", "keep"]
    assert main([*command, "--output", str(tmp_path / "one.jsonl")]) == 0
    assert main([*command, "--output", str(tmp_path / "two.jsonl"), "--engine", "ray", "--actors", "2"]) == 0
    assert capsys.readouterr().out.count("59 now, 0 from the store") == 2
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "data.jsonl",
        *(f"{name}.jsonl{end}" for name in ("one", "two") for end in ("", ".store.sqlite")),
    }
