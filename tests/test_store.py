"""The store: what was put is there, whoever else writes and whenever the process is killed."""

import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeshape.store import KINDS, Store, canonical, content_key

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates and control characters too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_a_value_comes_back_as_it_was(value):
    with Store(":memory:") as store:
        store.put_many("scores", {"k": value})
        assert store.get_many("scores", ["k"]) == {"k": value}


@given(ANY_TEXT, ANY_TEXT)
def test_different_texts_have_different_keys(one, other):
    assert (content_key(one, {}) == content_key(other, {})) == (one == other)


def test_a_pair_of_surrogates_is_not_the_character_it_would_make():
    pair = "\ud83d" + "\ude00"
    assert len(pair) == 2
    assert canonical(pair) != canonical("\U0001f600")
    assert canonical("\ud800") != canonical("\\ud800")
    assert canonical({"b": 1, "a": 2}) == b'{"a":2,"b":1}'


def test_the_key_is_the_documented_hash():
    import hashlib

    text = '{"content":"é","maker":{"chunk":5}}'
    assert content_key("é", {"chunk": 5}) == hashlib.sha256(text.encode()).hexdigest()
    assert content_key("é", {"chunk": 6}) != content_key("é", {"chunk": 5})


def test_kinds_do_not_mix_and_later_values_win(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        for number, kind in enumerate(KINDS):
            store.put_many(kind, {"same": number})
        store.put_many("scores", {"same": "later", "other": None})
    with Store(tmp_path / "s.sqlite") as store:
        assert [store.get_many(kind, ["same"])["same"] for kind in KINDS] == ["later", 1, 2, 3]
        assert store.get_many("scores", ["none", "other"]) == {"other": None}
        assert [store.count(kind) for kind in KINDS] == [2, 1, 1, 1]


def test_bytes_stand_beside_values_and_thousands_of_keys_are_found():
    with Store(":memory:") as store:
        store.put_many("features", {"a": [3], "b": 1}, {"a": b"\x00\xff"})
        assert store.get_bytes("features", ["a", "b", "c"]) == {"a": b"\x00\xff"}
        assert store.get_many("features", ["a"]) == {"a": [3]}
        many = {str(number): number for number in range(2345)}
        store.put_many("scores", many)
        assert store.get_many("scores", many) == many


def test_nothing_of_a_refused_batch_is_written(tmp_path):
    with Store(tmp_path / "s") as store:
        with pytest.raises(ValueError, match="only plain JSON values"):
            store.put_many("scores", {"a": 1, "b": {1, 2}})
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.put_many("scores", {"a": 1, "b": float("nan")})
        with pytest.raises(ValueError, match="bytes but no value"):
            store.put_many("scores", {"a": 1}, {"b": b""})
        assert store.count("scores") == 0
        with pytest.raises(ValueError, match="no kind 'verdicts'; it has: scores"):
            store.put_many("verdicts", {})


def test_files_that_are_no_store_are_refused_and_left_alone(tmp_path):
    text, other, newer = tmp_path / "text", tmp_path / "other", tmp_path / "newer"
    text.write_text("hello " * 1000)
    with contextlib.closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE mine (x)")
    Store(newer).close()
    with contextlib.closing(sqlite3.connect(newer)) as database:
        database.execute("PRAGMA user_version=9")
    before = [path.read_bytes() for path in (text, other)]
    for path, message in (
        (text, "cannot use .*text as a store: file is not a database"),
        (other, "is a database of another program"),
        (newer, "is a store of format 9; this version reads format 1"),
        (tmp_path, "cannot use .* as a store: unable to open"),
    ):
        with pytest.raises(ValueError, match=message):
            Store(path)
    assert [path.read_bytes() for path in (text, other)] == before


def test_a_damaged_store_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "s"
    with Store(path) as store:
        store.put_many("scores", {str(number): "x" * 500 for number in range(200)})
    content = bytearray(path.read_bytes())
    content[5000:60000] = random.Random(0).randbytes(55000)
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"as a store: .*(malformed|corrupt)"), Store(path) as store:
        store.get_many("scores", [str(number) for number in range(200)])


def test_a_lock_that_stays_is_an_error_not_a_wait_forever(tmp_path):
    path = tmp_path / "s"
    with Store(path, wait_s=0.01) as store, contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ValueError, match="database is locked"):
            store.put_many("scores", {"a": 1})
        other.rollback()
        store.put_many("scores", {"a": 1})


WRITER = """
import sys
from safeshape.store import Store
name, path, batches = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Store(path) as store:
    for batch in range(batches):
        store.put_many("scores", {f"{name}-{batch}-{i}": batch for i in range(7)})
        print(batch, flush=True)
"""


def writer(name, path, batches):
    command = [sys.executable, "-c", WRITER, name, str(path), str(batches)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_create_and_fill_one_store(tmp_path):
    running = [writer(name, tmp_path / "s", 30) for name in "abc"]
    assert [process.communicate(timeout=60) and process.returncode for process in running] == [0, 0, 0]
    with Store(tmp_path / "s") as store:
        assert store.count("scores") == 3 * 30 * 7


@pytest.mark.parametrize("moment", [0.0, 0.005, 0.03])
def test_what_was_put_survives_a_kill_at_any_moment(tmp_path, moment):
    path = tmp_path / "s"
    process = writer("a", path, 10**6)
    process.stdout.readline()
    time.sleep(moment)
    process.kill()
    rest = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    said = [0, *(int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n"))]
    with Store(path) as store:
        for batch in said:
            keys = [f"a-{batch}-{i}" for i in range(7)]
            assert store.get_many("scores", keys) == dict.fromkeys(keys, batch)
        assert store.count("scores") % 7 == 0, "half a batch was written"
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert json.dumps(database.execute("PRAGMA integrity_check").fetchall()) == '[["ok"]]'
