# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of verdicts recognises advice, measures answers against a reference, and counts its outcomes."""

import json

import numpy as np
import pytest

from benchmarks.calibration import advice, measure
from benchmarks.calibration.__main__ import read, write
from benchmarks.calibration.table import table
from benchmarks.starts.cases import PROBLEMS
from numpyro_natgrad.diagnostics import recommendation
from numpyro_natgrad.diagnostics.importance import Moments

CASE = recommendation.Case(("AutoNormal",), 5, 4000, 0, 0.9, 1000.0, 1.0, 0.0, 0.0, False, (), False, (), ("z", 1.0))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "full covariance"),
        ({"newton_decrement": 2.0}, "more steps"),
        ({"newton_decrement": 2.0, "particles": 1}, "more particles"),
        ({"newton_decrement": 2.0, "no_maximum": True}, "another start"),
        ({"guide": ("AutoMultivariateNormal",)}, "NUTS"),
        ({"guide": ("AutoMultivariateNormal",), "no_maximum": True}, "another start"),
        ({"guide": ("AutoBNAFNormal",)}, "flow"),
        ({"weighted_k_hat": 0.3}, "use it"),
        ({"funnel": "z"}, "non-centred"),
        ({"abstains": True, "cause": "draws are not differentiable"}, "enumeration"),
        ({"k_hat": 0.1}, "use it"),
        ({"k_hat": 0.6}, "use it"),
        ({"gap": 0.02, "gap_error": 0.001}, "use it"),
    ],
)
def test_the_first_advice_of_a_verdict_is_recognised(changed, expected):
    assert advice.advice(recommendation.recommend(CASE._replace(**changed)).text) == expected


def test_advice_that_was_followed_is_not_given_again():
    said = recommendation.recommend(CASE._replace(guide=("AutoMultivariateNormal",), no_maximum=True)).text
    assert advice.advice(said) == "another start"
    assert advice.advice(said, ("another start",)) == "flow"


def test_the_site_of_a_funnel_is_read_from_the_advice():
    assert advice._sites(recommendation.recommend(CASE._replace(funnel="theta")).text) == ["theta"]


def test_the_largest_errors_are_found_and_entries_without_a_reference_are_left_out():
    exact = {"z": {"mean": [0.0, 1.0, 5.0], "sd": [1.0, 2.0, 1.0], "known": [True, True, False]}}
    moments = {"z": Moments(np.array([0.1, 0.5, 99.0]), np.array([0.8, 3.2, 99.0]), np.zeros(3))}
    assert measure.off(moments, exact) == pytest.approx((0.25, 1.6))
    assert not measure.is_good((0.25, 1.6))
    assert measure.is_good((0.3, 0.7))
    assert not measure.is_good((0.31, 1.0))
    assert not measure.is_good((np.nan, np.nan))


def _row(guide, weighted, said, answer=""):
    return {
        "k_hat": 0.6,
        "weighted_k_hat": 0.5,
        "guide": guide,
        "importance_weighted": weighted,
        "advice": said,
        "answer": answer,
        "recommendation": said,
    }


def test_the_table_judges_the_answer_that_the_verdict_names(tmp_path):
    """The weighted moments if they are recommended, else the guide; advice counts if it ends in a good answer."""
    good, bad = (0.1, 1.0), (0.9, 0.4)
    rows = {
        "full 0": [_row(bad, good, "use it", "importance_weighted")],  # rightly called good
        "full 1": [_row(good, bad, "use it", "importance_weighted")],  # wrongly called good
        "full 2": [_row(good, good, "flow")],  # wrongly called bad
        "full 3": [_row(bad, bad, "another start"), _row(bad, bad, "flow"), _row(good, good, "use it")],
        "full 4": [{"error": "StructureError: no"}],
    }
    write(tmp_path, "funnel", {"reference": {}, "rows": rows})
    write(tmp_path, "banana", {"reference": {"dropped": "chains disagree"}, "rows": {}})
    text = table({name: read(tmp_path, name) for name in ("funnel", "banana")})
    assert "* Bad answers: 2; `verdict` calls 1 of them good (50%)." in text
    assert "* Good answers: 2; `verdict` calls 1 of them bad (50%)." in text
    assert "calls bad: 1. Its advice was followed for 1 of them: followed once, it leads to a good answer for 0" in text
    assert "once or twice for 1." in text
    assert "* banana: chains disagree" in text
    assert "* funnel, full 4: StructureError: no" in text


def test_results_of_another_problem_are_not_read(tmp_path):
    write(tmp_path, "funnel", {"rows": {}})
    path = tmp_path / "funnel.json"
    assert read(tmp_path, "funnel")["fingerprint"] == PROBLEMS["funnel"].fingerprint
    path.write_text(json.dumps({"fingerprint": "0"}))
    assert read(tmp_path, "funnel") == {}
