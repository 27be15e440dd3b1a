# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a fit tells while it runs and afterwards: callbacks, the logger, and the plot of its history."""

import logging
import re
import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_natgrad import FitResult, History, NaturalGradient, fit

Y = jnp.array([1.0, 3.0, 2.0, 2.5])


def model(y):
    z = numpyro.sample("z", dist.Normal(0, 10))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.StudentT(3, z, 1.0), obs=y)


@pytest.fixture(scope="module")
def svi():
    return SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(4))


def fitted(svi, callback=None, **options):
    options = {"max_steps": 12, "tolerance": 0, "progress_bar": False} | options
    return fit(svi, random.key(0), Y, callback=callback, **options)


def test_a_callback_is_called_after_each_chunk_with_figures_of_that_chunk(svi):
    """It changes nothing about the fit, and ``result()`` is what the fit would have returned then."""
    told, results = [], []
    whole = fitted(svi, lambda progress: (told.append(progress), results.append(progress.result())))
    np.testing.assert_array_equal(whole.losses, fitted(svi).losses)
    assert [one.step for one in told] == [5, 10, 12]
    ends = [0, 5, 10, 12]
    for one, result, begin, end in zip(told, results, ends, ends[1:], strict=False):
        history = whole.history
        assert one.elbo == pytest.approx(-history.loss[begin:end].mean())
        assert one.kl == pytest.approx(history.kl[begin:end].mean())
        assert one.newton_decrement == history.newton_decrement[end - 1]
        assert one.newton_decrement_error == history.newton_decrement_error[end - 1]
        assert one.seconds == pytest.approx(history.seconds[end - 1])
        assert one.state.optim_state[0] == end
        assert isinstance(result, FitResult)
        np.testing.assert_array_equal(result.losses, whole.losses[:end])
        assert result.reason.startswith("not finished: ")


def test_the_last_call_knows_that_the_fit_has_converged(svi):
    results = []
    whole = fitted(svi, lambda progress: results.append(progress.result()), tolerance=0.5, max_steps=200)
    assert whole.converged
    assert results[-1].converged
    assert not any(one.converged for one in results[:-1])


@pytest.mark.parametrize(("error", "reason"), [(StopIteration("far enough"), r" \(far enough\)"), (StopIteration, "")])
def test_stop_iteration_ends_the_fit_with_its_message(svi, error, reason):
    def callback(progress):
        if progress.step == 10:
            raise error

    result = fitted(svi, callback)
    assert len(result.losses) == 10
    assert not result.converged
    assert re.match(rf"stopped by `callback`{reason}: .* nats to gain", result.reason)


def test_an_error_of_a_callback_keeps_the_steps_before_it(svi):
    def callback(progress):
        if progress.step == 10:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as raised:
        fitted(svi, callback)
    part = raised.value.partial_result
    assert part.history.steps == 10
    rest = fitted(svi, resume=part, max_steps=2)
    np.testing.assert_array_equal(rest.losses, fitted(svi).losses)


def test_an_interrupt_in_a_callback_returns_the_steps_taken(svi):
    def callback(progress):
        raise KeyboardInterrupt

    result = fitted(svi, callback)
    assert result.reason.startswith("interrupted")
    assert len(result.losses) == 5


def test_a_callback_that_returns_true_is_told_how_to_stop(svi):
    with pytest.raises(TypeError, match=r"`callback` returned `True`: .*raise StopIteration"):
        fitted(svi, lambda progress: True)


def test_a_callback_has_to_be_a_function(svi):
    with pytest.raises(TypeError, match=r"`callback=\[\]`: expected a function"):
        fitted(svi, [])


def test_the_logger_has_the_text_of_the_bar_and_the_reason(svi, caplog):
    with caplog.at_level(logging.INFO, logger="numpyro_natgrad"):
        result = fitted(svi)
    lines = [record.getMessage() for record in caplog.records if record.name == "numpyro_natgrad"]
    assert lines[0].startswith("step 5: ELBO -")
    assert lines[-1] == result.reason
    assert len(lines) == 2, "further chunks within a second have the level DEBUG"


def test_the_logger_says_nothing_unless_it_is_wanted(svi, caplog):
    with caplog.at_level(logging.WARNING, logger="numpyro_natgrad"):
        fitted(svi)
    assert not caplog.records


def told(steps=40, **changes):
    gain = 10.0 / np.arange(1, steps + 1) ** 2
    fields = dict.fromkeys(History._fields, gain) | {"loss": 50 + gain, "newton_decrement_error": gain / 3}
    false = np.zeros(steps, bool)
    return History(**fields | {"limited": false, "skipped": false} | changes)


def marks(axis, label):
    (line,) = [line for line in axis.lines if str(line.get_label()).startswith(label)]
    return [int(x) for x in line.get_xdata()]


def test_the_plot_marks_shortened_and_skipped_steps_the_end_and_the_tolerance():
    limited, skipped = np.arange(40) < 3, np.arange(40) == 7
    history = told(limited=limited, skipped=skipped, kl=np.where(skipped, 0.0, 1.0))
    axes = history.plot(tolerance=0.01)
    assert [len(axis.lines[0].get_xdata()) for axis in axes] == [40, 40, 40]
    assert marks(axes[1], "shortened") == [1, 2, 3]
    for axis in axes:
        assert marks(axis, "skipped") == [8]
        assert marks(axis, "end, after 40 steps") == [40, 40]
    assert axes[2].get_yscale() == "log"
    names = {text.get_text() for text in axes[0].get_legend().get_texts()}
    assert names == {"shortened", "skipped", "end, after 40 steps", "tolerance 0.01"}
    plt.close(axes[0].figure)


def test_the_legend_has_only_marks_that_occur_and_given_axes_are_used():
    _, axes = plt.subplots(1, 3)
    assert (told().plot(axes) == axes).all()
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["end, after 40 steps"]
    plt.close("all")


@pytest.mark.parametrize("name", ["newton_decrement", "newton_decrement_error", "loss", "kl"])
def test_what_is_not_finite_is_left_out_of_the_plot(name):
    """Without Fisher matrices there is no gain, and a diverged fit has no losses."""
    axes = told(**{name: np.full(40, np.nan)}).plot()
    axes[0].figure.canvas.draw()
    assert all(np.isfinite(axis.get_ylim()).all() for axis in axes)
    plt.close("all")


def test_the_plot_refuses_an_empty_history_other_axes_and_a_missing_matplotlib(monkeypatch):
    with pytest.raises(ValueError, match="the history is empty"):
        told(0).plot()
    with pytest.raises(ValueError, match="2 axes were given; expected three"):
        told().plot([None, None])
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib.*numpyro-natgrad\[examples\]"):
        told().plot()
