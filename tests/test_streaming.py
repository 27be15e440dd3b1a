# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``fit(batches=...)`` on data that do not fit into memory: what is read, when, by whom, and what is refused."""

import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_natgrad import NaturalGradient, fit
from numpyro_natgrad.compilation.batches import BatchIterator

N, B = 60, 10
Y = np.random.default_rng(0).normal(1.0, 2.0, N).astype(np.float32)


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    with numpyro.plate("rows", N, subsample_size=len(y)):
        numpyro.sample("y", dist.Normal(mu, 2), obs=y)


@pytest.fixture(scope="module")
def svi():
    return SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(4))


def run(svi, batches, **options):
    return fit(svi, random.key(0), batches=batches, tolerance=0, progress_bar=False, cache=False, **options)


def assert_same(a, b):
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    assert all(jax.tree.leaves(equal)), equal


def slices(y=Y, rows=B):
    return [(y[i : i + rows],) for i in range(0, len(y), rows)]


def threads():
    return [t for t in threading.enumerate() if "natgrad_batches" in t.name]


class Loader:
    """What a data loader is to us: an object with ``__iter__``, which yields lists of tensors."""

    def __init__(self, convert=lambda y: y, fail_at=None):
        self.convert, self.fail_at, self.epochs, self.read = convert, fail_at, 0, 0

    def __iter__(self):
        self.epochs += 1
        for k, (y,) in enumerate(slices()):
            if k == self.fail_at:
                raise OSError("the disk is gone")
            self.read += 1
            yield [self.convert(y)]


class Tensor:
    """A tensor of another package on the host, which NumPy can convert."""

    def __init__(self, y):
        self.y = y

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.y, dtype)

    def __dlpack_device__(self):
        return (1, 0)


def reused(count):
    """A loader that writes every batch into the same memory."""
    buffer = np.empty(B, np.float32)
    for k in range(count):
        buffer[:] = slices()[k % 6][0]
        yield (buffer,)
        buffer[:] = np.nan


EXPECTED = slices() * 2
Sources = {
    "list": lambda: (slices(), 2),
    "generator": lambda: (iter(EXPECTED), 1),
    "loader": lambda: (Loader(), 2),
    "tensors": lambda: (Loader(Tensor), 2),
    "float64": lambda: (Loader(lambda y: y.astype(np.float64)), 2),
    "jax": lambda: (Loader(jnp.asarray), 2),
    "one buffer": lambda: (reused(12), 1),
}


@pytest.fixture(scope="module")
def expected(svi):
    """The fit that reads nothing ahead. That it takes the steps of ``svi.update`` is tested with ``fit``."""
    return run(svi, EXPECTED, prefetch=False)


@pytest.mark.parametrize("name", Sources)
def test_every_source_takes_the_same_steps_bit_for_bit(svi, expected, name):
    batches, epochs = Sources[name]()
    result = run(svi, batches, epochs=epochs)
    assert_same((result.state.optim_state, result.losses), (expected.state.optim_state, expected.losses))
    assert result.reason.startswith("`batches` is exhausted")
    assert not threads()


def test_datasets_of_grain_are_passed_as_they_are(svi, expected):
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(Y).to_iter_dataset().batch(B)
    assert_same(run(svi, dataset, epochs=2).params, expected.params)


def test_double_precision_holds_in_the_thread(svi, x64):
    source = BatchIterator([(np.array([1 + 1e-12]),)] * 3, 5)
    with source:
        _, (stacked,) = source.take(3)
    assert stacked.dtype == np.float64
    assert float(stacked[0, 0]) == 1 + 1e-12


def test_a_short_last_batch_is_a_step_of_its_own(svi):
    result = run(svi, slices(rows=25), epochs=2)
    assert len(result.losses) == 6
    assert np.isfinite(result.losses).all()


def test_no_more_is_read_than_steps_are_taken(svi):
    loader = Loader()
    assert len(run(svi, loader, max_steps=9, epochs=5).losses) == 9
    assert (loader.read, loader.epochs) == (9, 2)


def test_at_most_one_chunk_is_read_ahead():
    read = []
    with BatchIterator((read.append(k) or (np.zeros(3),) for k in range(1000)), 5) as source:
        for taken in range(5, 50, 5):
            assert source.take(1000)[0] == 5
            time.sleep(0.01)
            assert taken <= len(read) <= taken + 5


def test_reading_and_steps_overlap():
    """Each takes 20 ms a chunk; one after the other they would take twice as long."""

    def slow():
        for _ in range(100):
            time.sleep(0.004)
            yield (Y[:B],)

    def seconds(prefetch):
        with BatchIterator(slow(), 5, prefetch=prefetch) as source:
            begin = time.perf_counter()
            while source.take(100)[0]:
                time.sleep(0.02)
        return time.perf_counter() - begin, source.seconds

    (together, waited), (apart, all_) = seconds(True), seconds(False)
    assert together < 0.75 * apart
    assert waited < 0.5 * all_


@pytest.mark.parametrize("prefetch", [True, False])
def test_error_of_the_loader_comes_out_with_its_traceback(svi, prefetch):
    with pytest.raises(OSError, match="the disk is gone") as caught:
        run(svi, Loader(fail_at=3), epochs=2, prefetch=prefetch)
    assert not hasattr(caught.value, "partial_result")
    assert "in __iter__" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not threads()


def failing(at):
    yield from (EXPECTED * 2)[:at]
    raise OSError("the disk is gone")


@pytest.mark.parametrize("prefetch", [True, False])
def test_steps_before_an_error_can_be_resumed(svi, expected, prefetch):
    with pytest.raises(OSError, match="the disk is gone") as caught:
        run(svi, failing(10), prefetch=prefetch)
    assert "in failing" in "".join(traceback.format_tb(caught.value.__traceback__))
    partial = caught.value.partial_result
    assert len(partial.losses) == 10
    assert "resume=error.partial_result" in "".join(caught.value.__notes__)
    rest = run(svi, EXPECTED[10:], resume=partial)
    assert_same(rest.params, expected.params)
    assert not threads()


def test_thread_ends_when_the_model_fails(svi):
    """The third batch has another length, at which the model raises an error while it is traced."""

    def picky(y):
        if len(y) != B:
            raise RuntimeError("unexpected length")
        model(y)

    other = SVI(picky, AutoNormal(picky), NaturalGradient(), Trace_ELBO(4))
    with pytest.raises(RuntimeError, match="unexpected length") as caught:
        run(other, [*EXPECTED[:5], (Y[:7],)])
    assert "float32(7,)" in "".join(caught.value.__notes__)
    assert "subsample_size=len(x)" in "".join(caught.value.__notes__)
    assert not threads()


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a shell turns off for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_thread_ends_after_an_interrupt_without_a_wait_for_the_loader(svi, interruptible):
    begun, go_on = threading.Event(), threading.Event()

    def stuck():
        yield from EXPECTED[:5]
        begun.set()
        go_on.wait(30)
        yield EXPECTED[5]

    def interrupt():
        begun.wait(30)
        time.sleep(2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    run(svi, EXPECTED[:5])  # compiles, so that the steps before the interrupt take milliseconds
    threading.Thread(target=interrupt).start()
    result = run(svi, stuck())
    assert result.reason.startswith("interrupted")
    assert len(result.losses) == 5
    (thread,) = threads()
    go_on.set()
    thread.join(10)
    assert not thread.is_alive()


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("error", "match", "batches"),
    [
        (TypeError, r"`batches\[0\]\[0\]` has the type `object`", [(np.array([1, None]),)]),
        (TypeError, r"`batches\[1\]\[0\]\['y'\]` has the type `<U1`", [({"y": Y},), ({"y": np.array(["a"])},)]),
        (
            TypeError,
            r"`batches\[0\]\['y'\]` has the type `datetime64\[D\]`",
            [{"y": np.array(["2020-01-01"], "M8[D]")}],
        ),
        (
            ValueError,
            r"`batches\[1\]\[0\]` has the shape \(0, 2\), and so no rows",
            [(np.ones((3, 2)),), (np.ones((0, 2)),)],
        ),
        (ValueError, r"float32\(10, 1\).*first batch had `\[0\]: float32\(10,\)`", [(Y[:B],), (Y[:B, None],)]),
        (ValueError, r"int32\(10,\).*first batch had `\[0\]: float32\(10,\)`", [(Y[:B],), (np.arange(B),)]),
        (ValueError, r"\[1\]: float32.*expected the same structure", [(Y[:B],), (Y[:B], Y[:B])]),
        (ValueError, r"do not fit into `int32`", [(np.array([2**40]),)]),
        (ValueError, r"no rows", [Point(np.ones((0, 2)), Y)]),
    ],
)
def test_batches_that_cannot_be_used_are_named(error, match, batches):
    with pytest.raises(error, match=match), BatchIterator(batches, 5) as source:
        source.take(5)
    assert not threads()


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "`batches=<ndarray>`: expected an iterable of tuples", {"batches": Y}),
        (TypeError, "`batches=<dict>`", {"batches": {"y": Y}}),
        (
            ValueError,
            "`epochs=2`, but `batches` is a `generator`, which can be read once",
            {"batches": reused(3), "epochs": 2},
        ),
        (ValueError, "`epochs=3` was given without `batches`", {"epochs": 3}),
        (ValueError, "`epochs=0`: expected a positive integer", {"batches": slices(), "epochs": 0}),
        (TypeError, "`epochs=1.5`", {"batches": slices(), "epochs": 1.5}),
        (TypeError, "`prefetch=2`", {"batches": slices(), "prefetch": 2}),
    ],
)
def test_options_that_cannot_be_used_are_quoted(svi, error, match, options):
    with pytest.raises(error, match=match):
        fit(svi, random.key(0), progress_bar=False, **options)


def test_an_iterable_that_is_used_up_is_not_read_as_an_empty_epoch(svi):
    class Once:
        def __init__(self):
            self.left = iter(slices())

        def __iter__(self):
            return self.left

    with pytest.raises(ValueError, match="empty in epoch 2, and was not in the first") as caught:
        run(svi, Once(), epochs=2)
    assert len(caught.value.partial_result.losses) == 5


def test_exhaustion_says_how_to_go_on(svi):
    assert "an iterator can be read once" in run(svi, iter(slices())).reason
    assert "a larger `epochs` reads it again" in run(svi, slices()).reason


def test_numbers_that_are_not_finite_are_counted(svi):
    y = Y.copy()
    y[[25, 26, 41]] = np.nan
    result = run(svi, slices(y))
    assert "3 numbers in 2 of the 6 batches read are not finite, first in `batches[2][0]`" in result.reason
    assert result.history.skipped.sum() == 2
    assert np.isfinite(result.params["mu_auto_loc"])


PEAK = """
import resource, sys
import numpy as np, numpyro, numpyro.distributions as dist
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro_natgrad import NaturalGradient, fit

rows, path = int(sys.argv[1]), sys.argv[2]

def model(x, y):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", rows, subsample_size=len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)

def batches():
    width = 21
    for start in range(0, rows, 10_000):  # mapped anew, since pages that were read count as memory
        data = np.memmap(path, np.float32, "r", 4 * start * width, (10_000, width))
        yield data[:, 1:], (data[:, 0] > 0.5).astype(np.float32)

svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(1))
fit(svi, random.key(0), batches=batches(), tolerance=0, progress_bar=False, cache=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_rows(tmp_path):
    """The larger file has 336 MB, about as much as the whole process."""
    path, peaks = tmp_path / "rows.bin", []
    piece = np.random.default_rng(0).random((100_000, 21), np.float32).tobytes()
    with path.open("wb") as file:
        for _ in range(40):
            file.write(piece)
    for rows in (400_000, 4_000_000):
        command = [sys.executable, "-c", PEAK, str(rows), str(path)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.1 * peaks[0]
