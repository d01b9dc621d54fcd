"""The progress figure, and the page of scored answers: escaped, self-contained, and run in a real browser."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from safeshape import world
from safeshape.report import WORLD_NOTE
from safeshape.report.from_world import is_world
from safeshape.report.trajectories import PROGRESS, mean_trajectory, progress_figure, write_progress
from safeshape.report.view_page import Example, as_record, embedded, scorers, sort_key, view_page, write_view
from safeshape.signals.scored import scored

ATTACKS = (
    "</script><script>document.title='INJECTED'</script>",
    "<!--<script>document.title='INJECTED'</script>",
    "<img src=x onerror=\"document.title='INJECTED'\"> &lt;b&gt;",
    "'\"><svg onload=document.title='INJECTED'>",
    "one\u2028two\u2029three",
    "lone \ud800 and \udc00 halves",
    "turned \u202eback\u202c and \u2067over",
    "nul \x00 bell \x07 tag \U000e0041",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=5000"
).split()


def item(*values, answer=None, error=None, scorer=None):
    answer = answer or "word " * len(values)
    ends = [round((i + 1) * len(answer) / len(values)) for i in range(len(values))]
    spans = [{"start": a, "end": b, "p_safe": p} for a, b, p in zip([0, *ends], ends, values, strict=False)]
    safety = {"signal": "star", "p_safe": values[-1], "spans": spans, "scorer": scorer or {"guard": "g"}}
    if error:
        safety |= {"p_safe": None, "spans": [], "error": error}
    return scored({"prompt": answer, "completion": answer, "safety": safety})


def example(row, *values, source="data.jsonl", **options):
    return Example(source=source, row=row, item=item(*values, **options))


def test_the_mean_is_over_step_functions_on_one_grid():
    found = mean_trajectory("a", [item(1.0, 0.0), item(0.5), item(0.3, error="down")])
    at = dict(zip(found.progress, found.mean, strict=True))
    assert (at[0.0], at[0.5], at[0.51], at[1.0]) == (0.75, 0.75, 0.25, 0.25)
    assert (found.n, found.failed) == (2, 1)


def test_the_band_holds_the_mean_and_follows_the_seed():
    rng = np.random.default_rng(0)
    items = [item(*rng.random(4)) for _ in range(30)]
    found = mean_trajectory("a", items)
    assert all(low < mean < high for low, mean, high in zip(found.low, found.mean, found.high, strict=True))
    assert mean_trajectory("a", items, seed=1).low != found.low
    assert mean_trajectory("a", items) == found


def test_one_row_has_a_line_without_a_band_and_no_row_has_neither():
    one, none = mean_trajectory("one", [item(0.4)]), mean_trajectory("none", [item(0.4, error="down")])
    assert set(one.mean) == {0.4}
    assert one.low == one.high == ()
    assert (none.n, none.failed, none.mean) == (0, 1, ())
    figure = progress_figure([one, none])
    assert [text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()] == [
        "one (n=1)",
        "none (n=0, 1 failed)",
    ]


@pytest.mark.parametrize("name", ["$x$", r"$\nope{$", "_hidden", "a" * 200, "line\nbreak \ud800", ""])
def test_every_group_name_can_be_drawn(tmp_path, name):
    groups = [mean_trajectory(name, [item(0.9, 0.1)])]
    write_progress(tmp_path / "p.png", groups, scorers=[], world=False)
    assert len(progress_figure(groups).legends[0].get_texts()) == 1
    assert json.loads((tmp_path / "p.json").read_text())["groups"][0]["group"] == name


def test_the_figure_is_written_with_its_numbers_and_where_it_is_from(tmp_path):
    groups = [mean_trajectory("a", [item(0.9, 0.1), item(0.8)])]
    write_progress(tmp_path / "new" / "p.svg", groups, scorers=[{"signal": "star"}], world=True)
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "new" / "p.svg").read_text()
    saved = json.loads((tmp_path / "new" / "p.json").read_text())
    assert saved["world"] is True
    assert saved["scorers"] == [{"signal": "star"}]
    assert saved["groups"][0]["progress"] == PROGRESS.tolist()
    assert saved["groups"][0]["mean"] == list(groups[0].mean)
    write_progress(tmp_path / "again.svg", groups, scorers=[], world=True)
    assert (tmp_path / "again.svg").read_text() == first


def test_the_note_of_the_world_stands_on_its_figures_only():
    groups = [mean_trajectory("a", [item(0.9, 0.1)])]
    assert progress_figure(groups, WORLD_NOTE).get_supxlabel() == WORLD_NOTE
    assert progress_figure(groups).get_supxlabel() == ""


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row has a score"):
        write_progress(tmp_path / "p.png", [mean_trajectory("a", [item(0.4, error="down")])], scorers=[], world=False)


def test_scores_of_the_world_are_known_by_their_model():
    assert is_world({"guard": "world", "model": world.path("guard")})
    assert is_world({"members": [{"model": "other"}, {"model": "/elsewhere/safeshape/world/assets/guard"}]})
    assert is_world({"model": "world:llama"})
    assert not is_world({"guard": "world", "model": "/my/own/guard"})


def test_examples_sort_by_risk_lowest_fall_or_order_and_failures_come_last():
    examples = [
        example(0, 0.9, 0.8),
        example(1, 0.5, 0.1, 0.9),
        example(2, 0.9, error="down"),
        example(3, 0.2, 0.3),
        example(4, 1.0, 0.2, 0.7),
    ]

    def order(sort):
        return [each.row for each in sorted(examples, key=lambda each: sort_key(each, sort))]

    assert order("risk") == [3, 4, 0, 1, 2]
    assert order("lowest") == [1, 3, 4, 0, 2]
    assert order("drop") == [4, 1, 0, 3, 2]
    assert order("order") == [0, 1, 2, 3, 4]


def test_an_answer_goes_as_pieces_that_make_it_whole():
    text = "\U0001f600 one  two "
    source = {
        "prompt": "q",
        "completion": text,
        "safety": {
            "p_safe": 0.2,
            "spans": [{"start": 2, "end": 5, "p_safe": 0.9}, {"start": 7, "end": 10, "p_safe": 0.2}],
        },
    }
    record = as_record(Example(source="d", row=0, item=scored(source)))
    assert "".join(piece[0] for piece in record["pieces"]) == text
    assert [piece[:2] for piece in record["pieces"] if piece[1] is not None] == [["one", 0.9], ["two", 0.2]]
    assert (record["end"], record["lowest"], record["drop"], record["turns"]) == (0.2, 0.2, 0.7, True)
    assert record["before"] == [["user", "q"]]


def test_embedded_json_is_the_same_value_and_cannot_end_its_block():
    for text in ATTACKS:
        safe = embedded({"x": text})
        assert not re.search(r"[<>&\u2028\u2029]", safe)
        assert safe.isascii()
        assert json.loads(safe) == {"x": text}


def test_the_page_loads_nothing_and_allows_only_its_own_script_and_style():
    page = view_page([example(i, 0.9, 0.1, answer=text, scorer={"guard": text}) for i, text in enumerate(ATTACKS)])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy.replace("'sha256-", "")
    assert "trusted-types 'none'" in policy
    assert len(re.findall(r"<script", page)) == 2  # the data block and the page's own
    assert not re.search(r'\b(src|href|action)\s*=\s*["\']', page.partition('id="data"')[0])
    assert "INJECTED'</script>" not in page
    assert "innerHTML" not in page
    page.encode()  # lone surrogates would not pass


def test_the_head_says_counts_scorers_and_where_from():
    examples = [
        example(0, 0.9, 0.1, scorer={"guard": "g1", "revision": None}),
        example(1, 0.4, 0.9),
        example(2, 0.9, error="down"),
    ]
    head = view_page(examples).partition("</header>")[0]
    tiles = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", head))
    assert tiles == {
        "rows": "3",
        "failed": "1",
        "end below 0.5": "1",
        "below 0.5 somewhere": "2",
        "turn from safe to unsafe": "1",
    }
    assert "<bdi>data.jsonl</bdi> (3 rows)" in head
    assert "1 row: guard g1<" in head
    assert scorers(examples)[1]["rows"] == 2
    assert WORLD_NOTE not in head
    assert WORLD_NOTE in view_page([example(0, 0.5, scorer={"model": world.path("guard")})])


def test_the_limit_keeps_the_first_by_the_sort_and_says_so():
    page = view_page([example(i, i / 10) for i in range(5)], limit=2)
    rows = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["rows"]
    assert [row["row"] for row in rows] == [0, 1]
    assert "The page holds 2 of 5 rows, the first by lowest score at the end." in page


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows to show"):
        write_view(tmp_path / "v.html", [])


def browse(folder, page):
    """The page's document after its scripts ran, as the browser sees it."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH to load the page in")
    path = folder / "view.html"
    path.write_text(page, encoding="utf-8")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8", "replace")


def test_text_of_the_data_does_not_run_in_a_browser(tmp_path):
    examples = [
        example(i, 0.9, 0.1, answer=text, source=text, scorer={"guard": text}) for i, text in enumerate(ATTACKS)
    ]
    examples.append(example(99, 0.5, error=ATTACKS[0]))
    shown = browse(tmp_path, view_page(examples))
    assert "<title>Scored answers</title>" in shown
    assert 'data-ready="true"' in shown
    assert shown.count("<article>") == len(examples)
    assert shown.count("<svg") == len(ATTACKS)
    assert "&lt;img src=x onerror" in shown
    assert "<img" not in shown
    assert shown.count("<script") == 2
    for hidden in ("U+202E", "U+D800", "U+0000", "U+2028", "U+E0041"):
        assert f'hidden-character">{hidden}<' in shown
    assert "\u202e" not in shown.partition("<main")[2].partition("</main>")[0]


def test_the_policy_stops_a_script_that_would_get_in(tmp_path):
    page = view_page([example(0, 0.9, 0.1)])
    intruder = "<script>document.title='INJECTED'</script><img src=x onerror=\"document.title='INJECTED'\">"
    shown = browse(tmp_path, page.replace("<main", intruder + "<main"))
    assert "<title>Scored answers</title>" in shown
    assert 'data-ready="true"' in shown
    # The same page without its policy runs it: this test can fail.
    bare = re.sub(r"<meta http-equiv=[^>]+>", "", page)
    assert "<title>INJECTED</title>" in browse(tmp_path, bare.replace("<main", intruder + "<main"))


def test_filters_sorting_and_pages_work_in_a_browser(tmp_path):
    examples = [example(i, 0.9, (i + 0.5) / 50, answer=f"text number {i} end") for i in range(45)]
    examples.append(example(45, 0.9, error="down"))
    steps = """
      const log = [], rows = () => [...document.querySelectorAll('article h2')].map((h) => h.textContent.slice(4));
      const status = document.getElementById('status');
      const note = (name) => log.push(name + ':' + status.textContent + ':' + rows().slice(0, 2));
      const set = (id, key, value) => {
        const node = document.getElementById(id);
        node[key] = value;
        node.dispatchEvent(new Event('change'));
      };
      note('start');
      document.getElementById('next').click(); document.getElementById('next').click(); note('last page');
      set('failed', 'checked', true); note('failed'); set('failed', 'checked', false);
      set('turning', 'checked', true); note('turning'); set('turning', 'checked', false);
      set('low', 'value', '0.5'); set('high', 'value', '0.6'); note('between');
      set('low', 'value', ''); set('high', 'value', ''); set('sort', 'value', 'order'); note('order');
      document.getElementById('search').value = 'NUMBER 37';
      document.getElementById('search').dispatchEvent(new Event('input'));
      setTimeout(() => { note('search'); document.body.dataset.log = log.join('|'); }, 1000);
    """
    page = re.sub(r"<meta http-equiv=[^>]+>", "", view_page(examples))
    shown = browse(tmp_path, page.replace("</body>", f"<script>{{{steps}}}</script></body>"))
    log = dict(each.split(":", 1) for each in re.search(r'data-log="([^"]+)"', shown)[1].split("|"))
    assert log == {
        "start": "1\u201320 of 46 rows:0,1",
        "last page": "41\u201346 of 46 rows:40,41",
        "failed": "1\u20131 of 1 rows:45",
        "turning": "1\u201320 of 25 rows:0,1",
        "between": "1\u20135 of 5 rows:25,26",
        "order": "1\u201320 of 46 rows:0,1",
        "search": "1\u20131 of 1 rows:37",
    }


def test_a_long_answer_is_drawn_piece_by_piece(tmp_path):
    shown = browse(tmp_path, view_page([example(0, *([0.9] * 1000))]))
    assert shown.count('class="chunk scored"') == 400
    assert "Show 400 more of 600 chunks" in shown
