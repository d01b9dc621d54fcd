"""`safeshape score` as a user meets it: killed, resumed, changed, fed with bad rows, behind a server."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import byte_bpe, conversation, tiny_model
from faulty_server import faulty_server
from llama_server import NAME, llama_server
from pyarrow import parquet

from safeshape import world
from safeshape.cli import main
from safeshape.config import ScoreConfig, parse
from safeshape.signals.calibration import Calibration
from safeshape.store import Store

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'safe or unsafe?<|im_start|>' }}"
)
ROWS = [{"messages": conversation("What color is the vault", f"The vault number {n} is red.")} for n in range(6)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def own_guard(tmp_path_factory):
    """A folder with a tiny random guard, and its row."""
    folder = tmp_path_factory.mktemp("guard")
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def setting(tmp_path, own_guard):
    """A folder with a guard of its own, a row file, data, and a function that runs the verb on them."""
    shutil.copytree(own_guard, tmp_path / "guard")
    row = {"safe": "yes", "unsafe": "no"}
    (tmp_path / "row.yaml").write_text(yaml.safe_dump(row))
    write(tmp_path / "data.jsonl", ROWS)

    def score(*flags, **changes):
        given = {
            "dataset_name": tmp_path / "data.jsonl",
            "output": tmp_path / "out.jsonl",
            "guard": tmp_path / "row.yaml",
            "guard_model": tmp_path / "guard",
            "store": tmp_path / "store",
            **changes,
        }
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        merged = [part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))]
        return main(["score", *merged, *flags])

    return score


def counts(text):
    """How many were scored now and how many came from the store."""
    now, _, reused = text.partition("(")[2].partition(" now, ")
    return int(now), int(reused.split()[0])


def test_the_second_run_scores_nothing(setting, tmp_path, capsys):
    assert setting() == 0
    assert counts(capsys.readouterr().out) == (6, 0)
    first = read(tmp_path / "out.jsonl")
    assert setting() == 0
    assert counts(capsys.readouterr().out) == (0, 6)
    assert read(tmp_path / "out.jsonl") == first
    assert [row["messages"] for row in first] == [row["messages"] for row in ROWS]
    shutil.move(tmp_path / "guard", tmp_path / "moved")
    assert setting(guard_model=tmp_path / "moved") == 0
    assert counts(capsys.readouterr().out) == (0, 6), "the same weights at another place"
    assert main(["score", "--dataset_name", "x.jsonl", "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "exists already" in capsys.readouterr().err


def other_weights(folder):
    tiny_model(seed=1).save_pretrained(folder / "guard")


def other_template(folder):
    (folder / "guard" / "chat_template.jinja").write_text(TEMPLATE.replace("safe or unsafe?", "is it safe?"))


def other_tokenizer(folder):
    path = folder / "guard" / "tokenizer.json"
    core = json.loads(path.read_text())
    core["model"]["merges"] = core["model"]["merges"][:-1]
    path.write_text(json.dumps(core))


def other_row(**changes):
    def change(folder):
        (folder / "row.yaml").write_text(yaml.safe_dump({"safe": "yes", "unsafe": "no", **changes}))

    return change


CHANGES = {
    "weights": (other_weights, {}),
    "template": (other_template, {}),
    "tokenizer": (other_tokenizer, {}),
    "labels": (other_row(unsafe=" unsafe", first_token=True), {}),
    "answer prefix": (other_row(answer_prefix="\n\n"), {}),
    "the row's template": (other_row(chat_template=TEMPLATE.replace("unsafe?", "not?")), {}),
    "revision": (None, {"revision": "v2"}),
    "dtype": (None, {"dtype": "bfloat16"}),
    "chunk": (None, {"chunk": 4}),
    "unit": (None, {"unit": "tokens"}),
    "sharpen": (None, {"sharpen": "true"}),
    "refine": (None, {"refine": "true"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_score_never_finds_an_old_one(setting, tmp_path, capsys, name):
    assert setting() == 0
    change, flags = CHANGES[name]
    if change is not None:
        change(tmp_path)
    capsys.readouterr()
    assert setting(**flags) == 0
    assert counts(capsys.readouterr().out) == (6, 0)
    shutil.rmtree(tmp_path / "guard")


def test_a_calibration_maps_what_is_written_and_is_for_one_guard_only(setting, tmp_path, capsys):
    assert setting() == 0
    raw = read(tmp_path / "out.jsonl")
    made = Calibration(
        temperature=2.0,
        threshold=0.1,
        alpha=0.05,
        by="last",
        n=50,
        n_unsafe=20,
        false_negative_upper=0.2,
        scorer=raw[0]["safety"]["scorer"],
        data_sha256="0",
    )
    made.save(tmp_path / "calibration.json")
    assert setting(calibration=tmp_path / "calibration.json") == 0
    assert "(0 now, 6 from the store)" in capsys.readouterr().out
    for before, after in zip(raw, read(tmp_path / "out.jsonl"), strict=True):
        # sigmoid(logit(p) / 2): the odds' square root.
        odds = (before["safety"]["p_safe"] / (1 - before["safety"]["p_safe"])) ** 0.5
        assert after["safety"]["p_safe"] == pytest.approx(odds / (1 + odds))
        assert after["safety"]["spans"][-1]["p_safe"] == after["safety"]["p_safe"]
        assert after["safety"]["scorer"] == {**before["safety"]["scorer"], "calibration": made.sha256}
    assert setting(calibration=tmp_path / "calibration.json", chunk=2) == 2
    assert "chunk" in capsys.readouterr().err


def test_what_does_not_change_a_score_finds_it(setting, capsys):
    assert setting() == 0
    capsys.readouterr()
    assert setting(batch_size=3, on_error="keep") == 0
    assert counts(capsys.readouterr().out) == (0, 6)


def test_refine_says_what_it_saved_and_its_tolerance_counts(setting, tmp_path, capsys):
    long = [{"messages": conversation("q", " ".join(f"word{n % 7}" for n in range(60)))}]
    data = write(tmp_path / "data.jsonl", long)
    for tolerance, now in ((0.3, 1), (0.3, 0), (0.01, 1)):
        assert setting(dataset_name=data, chunk=1, refine="true", tolerance=tolerance) == 0
        out = capsys.readouterr().out
        assert counts(out)[0] == now
        assert (" of 60 partial answers were scored; 1 rows were scored in full beside" in out) == (now == 1)
    assert read(tmp_path / "out.jsonl")[0]["safety"]["scorer"]["refine"]["tolerance"] == 0.01
    flags = {"guard": f"{tmp_path / 'row.yaml'}+world", "guard_model": None, "refine": "true"}
    assert setting(**flags) == 2


def test_an_answer_too_long_for_the_guard_is_one_failed_row(setting, tmp_path, capsys):
    rows = [ROWS[0], {"messages": conversation("q", "word " * 100_000)}, ROWS[1]]
    assert setting("--on-error", "keep", dataset_name=write(tmp_path / "data.jsonl", rows)) == 0
    assert "1 row failed (first: row 1: " in capsys.readouterr().out
    found = read(tmp_path / "out.jsonl")
    assert [row["safety"]["p_safe"] is None for row in found] == [False, True, False]
    assert "512" in found[1]["safety"]["error"]


def test_several_guards(setting, tmp_path, capsys):
    one = ["--guard", str(tmp_path / "row.yaml"), "--guard_model", str(tmp_path / "guard"), world.path("guard")]
    assert setting(*one[2:], guard=f"{tmp_path / 'row.yaml'}+world", guard_model=None, combine="min") == 0
    lowest = read(tmp_path / "out.jsonl")
    assert setting(*one, "--guard", "world", guard=None, guard_model=None, combine="mean") == 0
    assert counts(capsys.readouterr().out.split("wrote")[-2]) == (6, 0)
    mean = read(tmp_path / "out.jsonl")
    single = []
    for changes in ({}, {"guard": "world", "guard_model": None}):
        assert setting(**changes) == 0
        single.append([row["safety"]["p_safe"] for row in read(tmp_path / "out.jsonl")])
    for row, low, a, b in zip(mean, lowest, *single, strict=True):
        assert row["safety"]["p_safe"] == pytest.approx((a + b) / 2, abs=1e-6)
        assert low["safety"]["p_safe"] == pytest.approx(min(a, b), abs=1e-6)
    assert mean[0]["safety"]["scorer"]["combine"] == "mean"


BAD_ROWS = {
    "empty answer": (conversation("a", " "), "the assistant's answer is empty or not a string"),
    "no assistant turn": ([{"role": "user", "content": "a"}], "the last message must be the assistant's"),
    "lone surrogate": (conversation("a", "b \ud800 c"), "half a character (a lone surrogate)"),
    "roles the template rejects": (
        [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}],
        "the guard's chat template rejects the conversation: no tools",
    ),
    "not a conversation": ("text", "message 0 needs a role and content"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("form", ["out.jsonl", "out.parquet"])
def test_a_bad_row_stops_the_run_or_is_kept_with_its_reason(setting, tmp_path, capsys, name, form):
    messages, reason = BAD_ROWS[name]
    write(tmp_path / "data.jsonl", [*ROWS[:2], {"messages": messages}, ROWS[2]])
    assert setting(output=tmp_path / form) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("safeshape score: row 2: ")
    assert reason in error
    assert not (tmp_path / form).exists()
    kept = setting("--on-error", "keep", output=tmp_path / form)
    if form == "out.parquet" and name in ("lone surrogate", "not a conversation"):
        assert kept == 2  # a table cannot hold it: said in one sentence, and no file
        assert "do not fit into one table" in capsys.readouterr().err
        assert not (tmp_path / form).exists()
        return
    assert kept == 0
    assert f"1 row failed (first: row 2: {reason}" in capsys.readouterr().out.replace("a message holds ", "")
    rows = read(tmp_path / form) if form == "out.jsonl" else parquet.read_table(tmp_path / form).to_pylist()
    assert [row["safety"]["p_safe"] is None for row in rows] == [False, False, True, False]
    assert reason in rows[2]["safety"]["error"]
    assert rows[2]["safety"]["spans"] == []


def test_rows_that_look_bad_but_are_not(setting, tmp_path, capsys):
    answers = ["y", "\x00\x07\x1b[31m \u202e", "\u200b zero", "<|im_end|>", "a" * 300]
    write(tmp_path / "data.jsonl", [{"messages": conversation("q", answer)} for answer in answers])
    assert setting() == 0, capsys.readouterr().err
    rows = read(tmp_path / "out.jsonl")
    assert [row["messages"][1]["content"] for row in rows] == answers
    assert all(row["safety"]["spans"][-1]["end"] == len(row["messages"][1]["content"]) for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--on-error", "ignore"], "on_error"),
        (["--chunk", "0"], "chunk, batch_size and actors must be at least 1"),
        (["--actors", "0"], "chunk, batch_size and actors must be at least 1"),
        (["--unit", "lines"], "unit"),
        (["--tolerance", "1"], "tolerance must lie between 0 and 1"),
        (["--guard", "world", "world"], "the same guard is given twice"),
        (["--guard", "a", "b", "--guard_model", "c"], "there are 2 guards but 1 guard_model"),
        (["--guard", "none"], "unknown guard 'none'; known: world"),
        (["--guard", "llama-guard-3", "--guard_model", "./none"], "none"),
        (["--server_model", "m"], "server_model and tokenizer belong to a server"),
        (["--server", "http://localhost:1"], "server needs server_model and tokenizer"),
        (["--server", "x", "--server_model", "m", "--tokenizer", "t", "--engine", "ray"], "with a server leave engine"),
        (["--server", "x", "--server_model", "m", "--tokenizer", "t", "--refine", "true"], "refine and sharpen need"),
        (["--server", "x", "--server_model", "m", "--tokenizer", "t", "--timeout", "0"], "timeout above 0"),
        (
            ["--server", "x", "--server_model", "m", "--tokenizer", "t", "--api_key_variable", "sk-secret"],
            "api_key_variable must be the name of an environment variable, never the key",
        ),
        (["--server", "x", "--server_model", "m", "--tokenizer", "t", "--guard", "a", "b"], "a server runs one guard"),
        (["--server", "x", "--server_model", "m", "--tokenizer", world.path("guard")], "must be an http:// or https"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(tmp_path, capsys, flags, message):
    data = write(tmp_path / "data.jsonl", ROWS)
    assert main(["score", "--dataset_name", data, "--output", str(tmp_path / "out.jsonl"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "sk-secret" not in error
    assert error.startswith("safeshape score: ")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_flags_may_be_written_with_hyphens_and_several_guards_in_three_ways(tmp_path):
    base = ["--dataset-name", "--odd=1", "--output", "o-o"]
    with pytest.raises(ValueError, match="dataset_name"):
        parse(ScoreConfig, "score", base)
    base[1] = "d-d"
    for flags in (["--guard", "a", "b"], ["--guard", "a+b"], ["--guard", "a", "--guard=b"]):
        config = parse(ScoreConfig, "score", [*base, *flags, "--on-error=keep"])
        assert (config.dataset_name, config.output, config.on_error) == ("d-d", "o-o", "keep")
        assert config.guard == ["a", "b"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text("guard: a+b\ndataset_name: d\noutput: o\n")
    assert parse(ScoreConfig, "score", ["--config", str(recipe)]).guard == ["a", "b"]
    assert parse(ScoreConfig, "score", ["--config", str(recipe), "--guard", "c"]).guard == ["c"]
    assert parse(ScoreConfig, "score", base).guard == ["world"]


def test_help_names_the_sub_verbs(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for verb in ("calibrate", "view", "export"):
        assert f"safeshape score {verb}" in shown


def test_a_store_of_another_program_is_refused(setting, tmp_path, capsys):
    (tmp_path / "store").write_text("no store " * 100)
    assert setting() == 2
    assert f"cannot use {tmp_path / 'store'} as a store: file is not a database" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


SERVED = {"server_model": NAME, "tokenizer": world.path("guard"), "guard": "world", "guard_model": None}


def test_scores_of_a_real_server_are_those_of_this_process(setting, tmp_path, capsys):
    with llama_server(Path(world.path("guard")), tmp_path) as url:
        assert setting(server=url, **SERVED) == 0, capsys.readouterr().err
    assert "13 requests, 0 retries, 0 failures" in capsys.readouterr().out  # two chunks a row, and the check
    remote = read(tmp_path / "out.jsonl")
    assert setting(guard="world", guard_model=None) == 0
    assert counts(capsys.readouterr().out) == (6, 0), "another backend is another scorer"
    local = read(tmp_path / "out.jsonl")
    for a, b in zip(remote, local, strict=True):
        assert a["messages"] == b["messages"]
        assert [s["p_safe"] for s in a["safety"]["spans"]] == pytest.approx(
            [s["p_safe"] for s in b["safety"]["spans"]], abs=1e-5
        )
        assert a["safety"]["scorer"]["engine"] == "server"


def logprobs(body):
    listed = {"token_id:629": -0.1, "token_id:775": -3.0}
    return {"model": body["model"], "choices": [{"logprobs": {"top_logprobs": [listed]}}], "usage": {}}


def test_a_server_that_fails_for_some_rows(setting, tmp_path, capsys):
    served = {**SERVED, "server_model": "tiny"}
    with faulty_server() as server:
        server.answer = logprobs
        server.faults.extend(["", "", "400"])
        assert setting("--on-error", "keep", server=server.url, concurrency=1, **served) == 0
        out = capsys.readouterr().out
        assert "1 row failed (first: row " in out
        assert "HTTP 400" in out
        asked = len(server.bodies)
        assert setting("--on-error", "keep", server=server.url, concurrency=1, **served) == 0
        assert counts(capsys.readouterr().out) == (1, 5), "only the failed row is asked about again"
        assert len(server.bodies) - asked == 3  # the request of the check, and the two chunks of the row
        server.default_fault = "500"
        assert setting(server=server.url, retries=0, chunk=9, **served) == 2
        assert "cannot serve as a guard: HTTP 500" in capsys.readouterr().err
        server.models = ["other"]
        assert setting(server=server.url, **served) == 2
        assert "serves other, not 'tiny'" in capsys.readouterr().err
    assert setting(server=server.url, retries=0, **served) == 2
    assert "does not answer: connection failed" in capsys.readouterr().err


def stored(path):
    """How many scores a store holds that another process may be writing."""
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute("SELECT count(*) FROM entries").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


MANY = 320


def killed_when(command, moment):
    """Run the verb in a process of its own and kill it as soon as `moment` says so."""
    process = subprocess.Popen([sys.executable, "-m", "safeshape.cli", *command], stderr=subprocess.DEVNULL)
    while not moment() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def test_a_killed_run_loses_nothing_and_rescores_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [{"id": n, "messages": conversation("What is it", f"number {n} is red " * (1 + n % 3))} for n in range(MANY)]
    data, output, store = write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl", tmp_path / "store"
    command = ["score", "--dataset_name", data, "--output", str(output), "--store", str(store)]
    there = 0
    for wanted in (1, MANY // 2):
        killed_when(command, lambda: stored(store) >= there + wanted)  # noqa: B023
        assert not output.exists()
        assert there < stored(store) < MANY
        there = stored(store)
    assert main(command) == 0
    assert counts(capsys.readouterr().out) == (MANY - there, there)
    found = read(output)
    assert [row["id"] for row in found] == list(range(MANY))
    whole = tmp_path / "whole.jsonl"
    assert main(["score", "--dataset_name", data, "--output", str(whole)]) == 0
    for one, other in zip(found, read(whole), strict=True):
        ours, theirs = ([(s["start"], s["end"]) for s in row["safety"]["spans"]] for row in (one, other))
        assert ours == theirs
        ours, theirs = ([s["p_safe"] for s in row["safety"]["spans"]] for row in (one, other))
        assert ours == pytest.approx(theirs, abs=1e-5)
    with Store(f"{whole}.store.sqlite") as kept:
        assert kept.count("scores") == MANY


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out"])
def test_a_run_killed_while_it_writes_leaves_no_output(tmp_path, capsys, name):
    rows = [{"id": n, "messages": conversation("q", "number is red"), "pad": "x" * 2000} for n in range(60_000)]
    data, output = write(tmp_path / "data.jsonl", rows), tmp_path / name
    command = ["score", "--dataset_name", data, "--output", str(output)]
    killed_when(command, lambda: (tmp_path / f".{name}.part").exists())
    assert not output.exists()
    assert main(command) == 0
    assert counts(capsys.readouterr().out)[0] == 0
    assert not (tmp_path / f".{name}.part").exists()
    assert output.exists()
