# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a standing start: its new data, the caches that it prepares, and its table."""

import numpy as np
import pytest

from benchmarks.cold import document, run
from benchmarks.cold.jobs import GUIDES, NO_GUIDE, Cell, Job, cells, chosen, new_data
from benchmarks.cold.results import Store
from benchmarks.cold.rivals_table import rivals
from benchmarks.cold.table import rows
from benchmarks.cold.verdicts_table import verdicts

SCHOOLS = Cell("eight_schools-eight_schools_noncentered", "AutoNormal")


@pytest.mark.parametrize(
    "data",
    [
        {"y": np.arange(8), "sigma": np.ones(8), "K": 5},
        {"switched": np.repeat([0, 1], 50), "arsenic": np.arange(100.0)},
        {"avoided": np.zeros((30, 25)), "y": np.arange(750.0).reshape(30, 25)},
    ],
)
def test_new_data_have_the_same_shapes_and_other_values(data):
    found = new_data(data, 3)
    name = "switched" if "switched" in data else "y"
    assert np.any(found[name] != data[name])
    assert found[name].shape == data[name].shape
    assert found[name].dtype == data[name].dtype
    np.testing.assert_array_equal(np.sort(found[name], 0), np.sort(data[name], 0))
    assert all(found[key] is data[key] for key in data if key != name)


def test_a_prepared_cache_has_the_fits_of_all_others(tmp_path, monkeypatch):
    def fill(plan, job, cache, bar):
        fits.append(job)
        (cache / job.posterior).touch()
        return {}

    fits = []
    monkeypatch.setattr(run, "outcome", fill)
    plan = run.Plan(Store(tmp_path, "3.11"), tmp_path, ("others",), 5)
    wanted = list(cells(chosen([]), ["AutoNormal"]))
    assert run.prepare(plan, wanted, None) == []
    for cell in wanted:
        names = {path.name for path in plan.store.prepared(cell).iterdir()}
        assert names == set(chosen([])) - {cell.posterior}
    assert len(fits) < 50
    assert {job.guide for job in fits} == {"AutoNormal"}
    run.prepare(plan, wanted, None)
    assert len(fits) < 50  # they are kept


def test_what_another_line_left_is_there_even_if_that_is_stored(tmp_path, monkeypatch):
    ran = []

    def measure(plan, job, cache, bar):
        ran.append((job.line, cache.name if cache else None))
        if cache:
            cache.mkdir(exist_ok=True)
        return {"seconds": 1.0}

    monkeypatch.setattr(run, "outcome", measure)
    plan = run.Plan(Store(tmp_path, "3.11"), tmp_path, ("nothing", "adam", "same"), 1)
    plan.store.write(SCHOOLS.job("nothing", 0), {"seconds": 1.0})
    assert run.run(plan, [SCHOOLS]) == []
    assert ran == [("adam", None), ("fill", "own"), ("same", "own")]
    assert run.run(plan, [SCHOOLS]) == []
    assert len(ran) == 3


def test_the_table_has_ratios_of_medians(tmp_path):
    store = Store(tmp_path, "3.11")
    versions = {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2", "numpyro": "0.22.0", "cores": 1}
    fitted = {"steps": 30, "converged": True, "step_seconds": 0.002, "khat": 0.5, "elbo": -31.0}
    for turn, (ours, adam) in enumerate([(3.0, 4.0), (90.0, 80.0), (2.0, 4.0)]):
        store.write(SCHOOLS.job("nothing", turn), {"seconds": ours, "cpu": 2.0} | fitted)
        store.write(SCHOOLS.job("adam", turn), versions | {"seconds": adam, "cpu": 1.0, "khat": 0.6, "elbo": -31.5})
    again = {"seconds": 0.5, "beyond": 0.3, "compilations": 2, "steps": 100}
    store.write(SCHOOLS.job("refit", 0), {"again": [again, again | {"compilations": 0}], "fresh": again})
    store.write(Job("nothing", SCHOOLS.posterior, GUIDES[0], 0), versions | fitted | {"seconds": 1.0})
    before = Store(tmp_path, "3.11-before")
    before.write(SCHOOLS.job("nothing", 0), {"seconds": 9.0, "step_seconds": 0.004})
    other, row = rows(store)
    assert np.isnan(other.ratio("nothing"))
    assert row.ratio("nothing") == 3.0 / 4.0
    assert row._replace(clock="cpu").ratio("nothing") == 2.0
    text = document.environment(store, "seconds")
    assert "over that before these changes | 0.50 × | 0.50 × (eight_schools, mean field) | 1 |" in text
    assert document.environment(before, "seconds") == ""
    assert "| nothing on disk | 0.75 × | 0.75 × (eight_schools, mean field) | 1 |" in text
    assert "same process: compilations | 2 | 2 (eight_schools, mean field) | 1 | 0 |" in text
    assert "| 0.50 | 0.60 | +0.5 |" in text
    assert document.environment(Store(tmp_path, "3.13"), "seconds") == ""


def test_the_table_of_verdicts_has_ratios_to_the_fit_before_them(tmp_path):
    store, before = Store(tmp_path, "3.13"), Store(tmp_path, "3.13-before")
    versions = {"python": "3.13.0", "jax": "0.12.0", "numpyro": "0.22.0", "cores": 1}
    again = {"fit": {"cpu": 0.25}, "verdict": {"cpu": 0.125, "compilations": 0}}
    for turn, (fit, verdict) in enumerate([(3.0, 2.0), (90.0, 60.0), (4.0, 3.0)]):
        found = versions | {"cpu": fit, "verdict": {"cpu": verdict}, "again": again}
        store.write(SCHOOLS.job("judged", turn), found)
        before.write(SCHOOLS.job("judged", turn), found | {"verdict": {"cpu": 2 * verdict}})
    store.write(SCHOOLS.job("judged_again", 0), {"cpu": 1.0, "verdict": {"cpu": 0.5}})
    assert verdicts([(Store(tmp_path, "3.11"), None)]) == ""
    text = verdicts([(store, before)])
    assert "The median of verdict over `fit` is 0.75 (before: 1.50)." in text
    assert "| 4.0 | 3.0 | 0.75 | 6.0 | 1.50 | 1.0 | 0.5 | – | 0.25 | 0.12 | 0 | 0.1 |" in text
    assert document.environment(store, "seconds") == ""


def test_a_section_is_replaced_or_added_and_others_stay():
    text = "# Title\n\nText.\n\n## A\n\nold\n\n## B\n\nkept\n"
    assert document._with_section(text, "## A", "new") == "# Title\n\nText.\n\n## A\n\nnew\n\n## B\n\nkept\n"
    assert document._with_section(text, "## C", "new") == text + "\n## C\n\nnew\n"


def test_other_packages_stand_in_one_table_without_empty_columns(tmp_path):
    store = Store(tmp_path, "3.13")
    versions = {"python": "3.13.0", "jax": "0.12.0", "numpyro": "0.22.0", "cores": 1, "version": "blackjax 1.7.1"}
    for turn, seconds in enumerate([3.0, 4.0, 90.0]):
        result = versions | {"seconds": 99.0, "cpu": seconds, "khat": 0.7}
        store.write(Job("blackjax", SCHOOLS.posterior, NO_GUIDE, turn), result)
    assert rivals([Store(tmp_path, "3.11")]) == ""
    text = rivals([Store(tmp_path, "3.11"), store])
    assert "| posterior | BlackJAX's Pathfinder, s | k̂ |" in text
    assert "| eight_schools | 4.00 | 0.70 |" in text
    assert "Rounds: 3." in text
