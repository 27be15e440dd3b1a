# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""In the topic-model example a natural step is the published step of stochastic variational inference.

The oracle is Hoffman, Blei, Wang & Paisley (2013), token by token as they write it: φ of every word of a document, γ
from φ over and over, then λ ← (1 − ρ) λ + ρ (η + N/B Σ n φ).
"""

import importlib
import inspect
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from oracles import root_eps
from scipy.special import digamma

from numpyro_natgrad import NaturalGradient

DOCUMENTS, WORDS, TOPICS, BATCH, ITERATIONS = 60, 15, 3, 6, 100


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "examples"))
        yield importlib.import_module("topic_model")


def documents() -> np.ndarray:
    """Short documents of three topics; some topics have few words."""
    rng = np.random.default_rng(0)
    topics = rng.dirichlet(np.full(WORDS, 0.2), TOPICS)
    return np.stack([rng.multinomial(25, rng.dirichlet(np.full(TOPICS, 0.3)) @ topics) for _ in range(DOCUMENTS)])


def local(example: Any, document: np.ndarray, log_beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """γ of one document, and φ of each of its words in turn, ``(n, K)``."""
    tokens = np.repeat(np.arange(WORDS), document)

    def responsibilities(gamma):
        phi = np.exp(digamma(gamma) - digamma(gamma.sum()) + log_beta[:, tokens].T)
        return phi / phi.sum(1, keepdims=True)

    gamma = np.ones(TOPICS)
    for _ in range(ITERATIONS):
        gamma = example.ALPHA + responsibilities(gamma).sum(0)
    return gamma, responsibilities(gamma)


def hoffman(example: Any, lam: np.ndarray, batch: np.ndarray, rho: float) -> np.ndarray:
    log_beta, expected = digamma(lam) - digamma(lam.sum(1, keepdims=True)), np.zeros_like(lam)
    for document in batch:
        _, phi = local(example, document, log_beta)
        for word, weights in zip(np.repeat(np.arange(WORDS), document), phi, strict=True):
            expected[:, word] += weights
    return (1 - rho) * lam + rho * (example.ETA + DOCUMENTS / len(batch) * expected)


def test_natural_steps_are_the_published_update_of_lambda(example, dtype):
    problem = example.TopicModel(DOCUMENTS, WORDS, TOPICS, ITERATIONS)
    svi = problem.svi(NaturalGradient(example.rate, max_kl=None))
    batches = documents().reshape(-1, BATCH, WORDS)[:5]
    state, update = svi.init(random.key(0), jnp.asarray(batches[0], dtype)), jax.jit(svi.update)
    lam = np.asarray(svi.get_params(state)["lambda"], np.float64)
    for step, batch in enumerate(batches):
        before, (state, _) = lam, update(state, jnp.asarray(batch, dtype))
        lam = hoffman(example, before, batch, (step + 10.0) ** -0.7)
        np.testing.assert_allclose(svi.get_params(state)["lambda"], lam, rtol=root_eps(dtype))
        assert np.max(np.abs(lam / before - 1)) > 0.1
    assert "natural parameters" in svi.optim.report(svi, state, jnp.asarray(batches[0], dtype))


def test_printed_check_tells_equal_from_different_steps(example, monkeypatch):
    problem, batches = example.TopicModel(DOCUMENTS, WORDS, TOPICS, 5), list(documents().reshape(-1, BATCH, WORDS)[:1])
    assert example.largest_difference(problem, batches) < root_eps("float64")
    published = example.published
    monkeypatch.setattr(example, "published", lambda *args: 1.001 * published(*args))
    np.testing.assert_allclose(example.largest_difference(problem, batches), 1e-3, rtol=0.01)


def test_perplexity_equals_a_loop_over_held_out_words(example, x64):
    lam = np.random.default_rng(1).gamma(2.0, 3.0, (TOPICS, WORDS))
    seen, hidden = documents()[:4], documents()[4:8]
    log_beta, logs = digamma(lam) - digamma(lam.sum(1, keepdims=True)), []
    for first, second in zip(seen, hidden, strict=True):
        gamma, _ = local(example, first, log_beta)
        for word in np.repeat(np.arange(WORDS), second):
            logs.append(np.log(sum(g * row[word] / row.sum() for g, row in zip(gamma, lam, strict=True)) / gamma.sum()))
    problem = example.TopicModel(DOCUMENTS, WORDS, TOPICS, ITERATIONS)
    actual = problem.perplexity(jnp.asarray(lam), jnp.asarray(seen, float), jnp.asarray(hidden, float))
    np.testing.assert_allclose(actual, np.exp(-np.mean(logs)), rtol=root_eps("float64"))


def test_example_reads_the_docstrings_that_inspect_shows(example):
    read = set(example.docstrings("json"))
    public = [json.load, json.loads, json.dump, json.dumps, json.JSONDecoder, json.JSONEncoder.iterencode]
    assert {inspect.getdoc(x) for x in public} <= read
    assert inspect.getdoc(json.JSONEncoder.__init__) not in read


def test_held_out_split_halves_and_keeps_all_words(example, monkeypatch):
    monkeypatch.setattr(example, "HELD_OUT", 20)
    counts = documents()
    corpus = example.split(counts, np.arange(WORDS))
    assert corpus.counts.shape == (DOCUMENTS - 20, WORDS)
    both = np.concatenate([corpus.counts, corpus.seen + corpus.hidden])
    np.testing.assert_array_equal(sorted(map(tuple, both)), sorted(map(tuple, counts)))
    # Four standard errors of a fair coin for each of 500 words.
    assert abs(corpus.seen.sum() - 250) < 4 * np.sqrt(500 / 4)
