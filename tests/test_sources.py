"""Rows in and out as streams: every form gives what was put in, and an output is whole or absent."""

import datetime
import json

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_from_disk
from pyarrow import parquet

from safeshape.sources import open_source, schema_of, with_column, write_rows

ROWS = [{"id": number, "text": f"line {number}", "tags": [{"a": number}]} for number in range(700)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def forms(folder):
    write_jsonl(folder / "one.jsonl", ROWS)
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "one.parquet")
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    for kind in ("jsonl", "parquet"):
        (folder / kind).mkdir()
        for shard in range(3):
            part = ROWS[shard * 300 : (shard + 1) * 300]
            if kind == "jsonl":
                write_jsonl(folder / kind / f"{shard}.jsonl", part)
            else:
                parquet.write_table(pa.Table.from_pylist(part), folder / kind / f"{shard}.parquet")
    return [folder / name for name in ("one.jsonl", "one.parquet", "saved", "jsonl", "parquet")]


def test_every_form_is_read_as_often_as_wanted_and_in_order(tmp_path):
    for path in forms(tmp_path):
        source = open_source(str(path))
        assert source.count == 700
        assert list(source.rows()) == ROWS, path
        assert next(source.rows()) == ROWS[0]
        assert (source.schema is None) == (path.name in ("one.jsonl", "jsonl"))


def test_files_are_not_read_ahead(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": 1}) + "\n" * 3 + "[1]\n")
    rows = open_source(str(path)).rows()
    assert next(rows) == {"id": 1}
    with pytest.raises(ValueError, match=r"long.jsonl: line 4 is not a JSON object"):
        next(rows)


def test_odd_characters_come_through(tmp_path):
    rows = [{"text": text} for text in ("\ud800", "\x00\x07", "\u2028 \x85", "é 中", "<script>")]
    path = tmp_path / "odd.jsonl"
    write_jsonl(path, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(open_source(str(path)).rows()) == rows
    write_rows(tmp_path / "out.jsonl", rows)
    assert list(open_source(str(tmp_path / "out.jsonl")).rows()) == rows
    assert "é 中" in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.jsonl is empty"),
        (b'{"a": 1}\n{"a"\n', "bad.jsonl: line 2 is not valid JSON"),
        (b"[1]\n", "bad.jsonl: line 1 is not a JSON object"),
        (b'{"a": "\xff"}\n', "bad.jsonl: line 1 is not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_source(str(path)).rows())


def test_bad_tables_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"cannot read .*bad.parquet"):
        open_source(str(tmp_path / "bad.parquet"))
    shards = tmp_path / "shards"
    shards.mkdir()
    parquet.write_table(pa.table({"a": [1]}), shards / "0.parquet")
    parquet.write_table(pa.table({"b": [1]}), shards / "1.parquet")
    with pytest.raises(ValueError, match=r"1.parquet has other columns than .*0.parquet"):
        open_source(str(shards))
    (shards / "notes.txt").touch()
    with pytest.raises(ValueError, match="is a folder, but not a saved dataset"):
        open_source(str(shards))


def read_back(path):
    return list(load_from_disk(path)) if path.is_dir() else list(open_source(str(path)).rows())


@pytest.mark.parametrize("name", ["deep/out.jsonl", "out.parquet", "out"])
def test_what_is_written_comes_back(tmp_path, name):
    output = tmp_path / name
    write_rows(output, iter(ROWS), schema_of(ROWS))
    assert read_back(output) == ROWS
    assert [path.name for path in output.parent.iterdir()] == [output.name], "nothing else is left"
    with pytest.raises(ValueError, match="exists already"):
        write_rows(output, ROWS, schema_of(ROWS))


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_the_output_appears_at_once(tmp_path, name):
    """The file that was written on the side is the output: it was renamed, not copied."""
    seen = []

    def watched():
        yield from ROWS
        seen.append((tmp_path / f".{name}.part").stat().st_ino)
        assert not (tmp_path / name).exists()

    write_rows(tmp_path / name, watched(), schema_of(ROWS))
    assert seen == [(tmp_path / name).stat().st_ino]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out"])
def test_a_run_that_breaks_while_writing_leaves_nothing(tmp_path, name):
    def broken():
        yield from ROWS
        raise ValueError("row 700: broken")

    (tmp_path / f".{name}.part").write_text("left by a killed run")
    with pytest.raises(ValueError, match="row 700: broken"):
        write_rows(tmp_path / name, broken(), schema_of(ROWS))
    assert list(tmp_path.iterdir()) == []


def test_columns_that_differ_between_rows(tmp_path):
    late = [*({"a": 1, "b": {"x": 1}} for _ in range(300)), {"a": 1.5, "b": {"y": "z"}, "c": []}]
    schema = schema_of(late)
    assert schema.names == ["a", "b", "c"]
    assert schema.field("a").type == pa.float64()
    write_rows(tmp_path / "out.parquet", late, schema)
    assert list(open_source(str(tmp_path / "out.parquet")).rows())[-1] == {
        "a": 1.5,
        "b": {"x": None, "y": "z"},
        "c": [],
    }
    with pytest.raises(ValueError, match=r"rows 0 to 1 do not fit into one table .*; write .jsonl"):
        schema_of([{"a": 1}, {"a": "x"}])
    with pytest.raises(ValueError, match=r"row 256 and those after it have other types .*; write .jsonl"):
        schema_of([{"a": 1}] * 256 + [{"a": "x"}])
    with pytest.raises(ValueError, match=r"rows 0 to 0 do not fit into one table .*surrogate"):
        schema_of([{"a": "\ud800"}])
    with pytest.raises(ValueError, match="needs the types of its columns"):
        write_rows(tmp_path / "other.parquet", late)


def test_dates_become_text_and_bytes_are_refused_in_jsonl(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"when": datetime.date(2026, 11, 21)}])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"when": "2026-11-21"}
    with pytest.raises(ValueError, match="row 0: a value of type bytes cannot be written as JSON"):
        write_rows(tmp_path / "b.jsonl", [{"raw": b"x"}])


def test_the_types_of_a_saved_dataset_survive_a_new_column(tmp_path):
    features = Features({"kind": ClassLabel(names=["no", "yes"]), "old": Value("int64")})
    Dataset.from_dict({"kind": [1, 0], "old": [1, 2]}, features=features).save_to_disk(tmp_path / "in")
    source = open_source(str(tmp_path / "in"))
    schema = with_column(source.schema, "old", pa.struct([("p_safe", pa.float64())]))
    write_rows(tmp_path / "out", ({**row, "old": {"p_safe": 0.5}} for row in source.rows()), schema)
    written = load_from_disk(tmp_path / "out")
    assert written.features["kind"] == features["kind"]
    assert list(written) == [{"kind": 1, "old": {"p_safe": 0.5}}, {"kind": 0, "old": {"p_safe": 0.5}}]
