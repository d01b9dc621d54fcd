"""The papers' orderings against rows whose verdicts can be seen by hand."""

from pathlib import Path

import pytest
import yaml

from safeshape.bench import read_matrix
from safeshape.bench.cell import check_cell
from safeshape.bench.facts import run_facts
from safeshape.bench.reproduction import Measured, claimed, conditions, difference, measured, orderings
from safeshape.bench.reproduction_page import check_matrix, papers, reproduction_page

ROOT = Path(__file__).parents[2]
ASKED = ("trigger", "prefill")
TABLE = {
    "title": "A table",
    "source": "a paper",
    "place": "table 1",
    "quantity": "safety score",
    "higher": "safer",
    "prompts": 100,
    "experiment": "e",
    "axis": "defence.name",
    "values": {"star": 90.0, "sft": 10.0, "rejection": 85.0, "absent": 50.0},
    "not_run": {"Other": 33.3},
}


def matrix(**changes):
    content = {"model": "m", "attack": "a", "defence": ["star", "sft", "rejection"], "seed": [0, 1, 2]} | changes
    return read_matrix({"e": content}, {}, {}, "default")


def rows_of(cells, rate, n=100):
    """Rows with `rate(cell)` as attack success, and another metric that must not be read."""
    other = {"metric": "task_accuracy", "value": 0.5, "n": 7}
    return {c.key(): [other, {"metric": "attack_success", "value": rate(c), "n": n}] for c in cells}


RATES = {"star": 0.02, "sft": 0.95, "rejection": 0.05}


def test_a_condition_has_the_rate_of_every_seed():
    cells = matrix().cells
    found = measured(cells, rows_of(cells, lambda c: c.seed / 10), {"defence.name": "star"})
    assert found == Measured(rates={0: 0.0, 1: 0.1, 2: 0.2}, n=100)
    assert measured(cells, {}, {"defence.name": "star"}) is None
    with pytest.raises(ValueError, match="two cells with seed 0"):
        measured(cells, rows_of(cells, lambda c: 0.0), {})


def test_a_difference_covers_seeds_and_prompts():
    # Equal seeds: only the prompts are left. Wilson has 10 of 100 in (.05523, .17437), 50 in (.40383, .59617), so that
    # Newcombe's interval reaches sqrt(.09617^2 + .07437^2) down and sqrt(.09617^2 + .04477^2) up from .4.
    steady = difference(Measured(rates={0: 0.1, 1: 0.1}, n=100), Measured(rates={0: 0.5, 1: 0.5}, n=100))
    assert steady == pytest.approx((0.4, 0.4 - 0.12157, 0.4 + 0.10608), abs=1e-5)
    # Differences of 0.395 and 0.405 by seed: t with one degree of freedom, 12.7062 standard errors of 0.005.
    some = difference(Measured(rates={0: 0.1, 1: 0.1}, n=10_000), Measured(rates={0: 0.495, 1: 0.505}, n=10_000))
    assert some == pytest.approx((0.4, 0.4 - 12.7062 * 0.005, 0.4 + 12.7062 * 0.005), abs=1e-5)
    # Rates lie in [0, 1], so their difference in [-1, 1].
    wild = difference(Measured(rates={0: 0.1, 1: 0.1}, n=100), Measured(rates={0: 0.2, 1: 0.8}, n=100))
    assert wild == pytest.approx((0.4, -1.0, 1.0))


def test_orderings_within_the_papers_noise_do_not_count():
    cells = matrix().cells
    found = conditions(TABLE, cells, rows_of(cells, lambda c: RATES[c.defence["name"]]))
    pairs = orderings(TABLE, found)
    # 90 and 85 of 100 prompts differ by less than 1.96 standard errors; `absent` has no cell.
    assert [(p.safer, p.riskier, p.verdict) for p in pairs] == [
        ("star", "sft", "agrees"),
        ("rejection", "sft", "agrees"),
    ]
    assert pairs[0].difference == pytest.approx(0.93)
    riskier = orderings(TABLE | {"higher": "riskier"}, found)
    assert [(p.safer, p.riskier, p.verdict) for p in riskier] == [
        ("sft", "star", "disagrees"),
        ("sft", "rejection", "disagrees"),
    ]
    close = conditions(TABLE, cells, rows_of(cells, lambda c: 0.5))
    assert {p.verdict for p in orderings(TABLE, close)} == {"undecided"}


def test_a_claim_is_looked_at_wherever_all_else_is_equal():
    cells = matrix(settings={"rate": [1, 2]}).cells
    rows = rows_of(cells, lambda c: RATES[c.defence["name"]] if c.settings["rate"] == 1 else 0.5)
    claim = {"less": {"defence.name": "star"}, "more": {"defence.name": "sft"}}
    assert [(where, p.verdict) for where, p in claimed(claim, cells, rows)] == [
        ("settings.rate 1", "agrees"),
        ("settings.rate 2", "undecided"),
    ]
    # A claim about a setting is looked at for every defence.
    claim = {"less": {"settings.rate": 1}, "more": {"settings.rate": 2}}
    verdicts = {where: p.verdict for where, p in claimed(claim, cells, rows)}
    assert verdicts == {
        "defence.name star": "agrees",
        "defence.name sft": "disagrees",
        "defence.name rejection": "agrees",
    }


def test_the_page_shows_both_sides_and_says_where_they_are_from():
    found = matrix()
    claim = {"source": "b", "text": "A claim.", "experiment": "e", "less": {"defence.name": "star"}}
    claim["more"] = {"defence.name": "rejection"}
    rows = rows_of(found.cells, lambda c: RATES[c.defence["name"]])
    page = reproduction_page(
        found,
        rows,
        facts={"Seeds": "3"},
        notes={"e": "Because.", "unknown": "Not shown."},
        content={"tables": [TABLE], "claims": [claim]},
    )
    assert "embedded synthetic world" in page
    assert "| star | 90.0 | 2.0 (0.6-7.0, 3 x 100) |" in page
    assert "| absent | 50.0 | - |" in page
    assert "| Other | 33.3 | not run |" in page
    assert "- star safer than sft: **agrees** (+93.0 points" in page
    assert "Orderings: 2 agrees, 0 disagrees, 1 undecided." in page
    assert "- e: Because." in page
    assert "Not shown" not in page
    only = reproduction_page(
        found,
        {found.cells[0].key(): rows[found.cells[0].key()]},
        facts=run_facts("default", found, found.cells[:1], seconds=[90.0]),
        notes={},
        content={"tables": [TABLE], "claims": []},
    )
    assert "- Cells: 1 of 9 have rows, scale `default`\n- Seeds: 1 (0)\n" in only
    assert "- Time: 2 minutes" in only
    assert "| sft | 10.0 | - |" in only
    with pytest.raises(ValueError, match="no experiment 'f'"):
        reproduction_page(
            found, rows, facts={}, notes={}, content={"tables": [TABLE | {"experiment": "f"}], "claims": []}
        )


def test_a_table_may_look_at_another_metric():
    cells = matrix().cells
    rows = {c.key(): [{"metric": "attack_success", "value": 0.9, "n": 9}] for c in cells}
    for c in cells:
        rows[c.key()].append({"metric": "attack_success (prefill)", "value": 0.3, "n": 50})
    found = conditions(TABLE | {"metric": "attack_success (prefill)"}, cells, rows)
    assert found["sft"] == Measured(rates={0: 0.3, 1: 0.3, 2: 0.3}, n=50)


def test_mappings_among_the_settings_can_be_compared():
    asked = {"direct": "direct", "prefill": {"name": "prefill"}}
    cells = matrix(settings={"asked": asked}).cells
    claim = {"less": {"defence.name": "star"}, "more": {"defence.name": "sft"}}
    assert [p.verdict for _, p in claimed(claim, cells, rows_of(cells, lambda c: RATES[c.defence["name"]]))] == [
        "agrees"
    ]


def test_the_shipped_matrix_has_what_the_papers_tables_name():
    recipe = yaml.safe_load((ROOT / "recipes" / "bench" / "reproduction.yaml").read_text())
    for scale, seeds in (("default", 3), ("full", 10)):
        found = read_matrix(recipe["experiments"], recipe["settings"], recipe["scales"], scale)
        check_matrix(found, papers())
        rows = rows_of(found.cells, lambda c: 0.5)
        rows = {k: [*v, *({**v[1], "metric": f"attack_success ({n})"} for n in ASKED)] for k, v in rows.items()}
        for table in papers()["tables"]:
            own = set(found.experiments[table["experiment"]])
            shown = conditions(table, [cell for cell in found.cells if cell.key() in own], rows)
            assert set(shown) == set(table["values"]), table["title"]
            assert {len(one.rates) for one in shown.values()} == {seeds}
            asked = {name for c in found.cells if c.key() in own for name in c.settings.get("asked", {"direct": ""})}
            assert table.get("metric", "(direct)").split("(")[1].rstrip(")") in asked, table["title"]
        for claim in papers()["claims"]:
            own = set(found.experiments[claim["experiment"]])
            assert claimed(claim, [cell for cell in found.cells if cell.key() in own], rows)
    # Sized for two processor cores: rows seen in training, at about a hundred a second and core.
    default = read_matrix(recipe["experiments"], recipe["settings"], recipe["scales"], "default").cells
    assert sum(c.settings["rows"] * c.settings["epochs"] for c in default) < 500_000
    for cell in default:
        check_cell(cell)
        assert "prefill" not in cell.settings.get("asked", {}).values()  # the whole plan would count by itself


def test_the_shipped_tables_are_well_formed():
    content = papers()
    for table in content["tables"]:
        assert set(table) - {"where", "not_run", "metric"} == set(TABLE) - {"not_run"}, table["title"]
        assert table["higher"] in ("safer", "riskier")
        assert all(0 <= value <= 100 for value in table["values"].values())
    for claim in content["claims"]:
        assert set(claim) == {"source", "text", "experiment", "less", "more"}
