# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
A topic model in minibatches
============================

Latent Dirichlet allocation in minibatches, with stochastic variational inference as one choice of the step size.

A natural-gradient step in λ, the parameters of Dirichlet topics, is the update of Hoffman, Blei, Wang & Paisley (2013),
*Stochastic variational inference*, JMLR 14, eq. 27, with their rate ρ_t = (t + τ)^-κ::

    λ  ←  λ − ρ F⁻¹∇L  =  (1 − ρ) λ + ρ (η + N/B Σ_d n_dw φ_dwk)      φ_dwk ∝ exp(E[log θ_dk] + E[log β_kw])

They use expectations in closed form, and so does this guide: its "draw" is x̃ = exp(E[log x]), and
``TraceMeanField_ELBO`` integrates the KLs. The log-likelihood of the model is then their bound at the optimal φ::

    Σ_w n_dw log Σ_k θ̃_dk β̃_kw  =  max_φ Σ_wk n_dw φ_dwk (E[log θ_dk] + E[log β_kw] − log φ_dwk)

The corpus consists of docstrings: each docstring of 50 words or more of a public function or class of five installed
packages is a document. Words are runs of three or more lower-case letters, without scikit-learn's English stop words,
that occur in at least 20 documents and in at most 15 % of them; the 1000 most frequent ones are kept.

NUTS does not stand beside it: expectations in place of draws are no posterior that chains could draw from, and topics
can be permuted, so that chains would have to be matched.

Run it with ``python examples/topic_model.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/topic_model.png'

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.special
from _common import FIGURES, NATURAL, OTHERS, plain, save, summary
from jax import Array, lax, random
from jax.scipy.special import digamma
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, NullLocator
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.optim import Adam, _NumPyroOptim
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.feature_extraction.text import CountVectorizer
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient, register_exponential_family
from numpyro_natgrad.distributions.exponential_family import find_exponential_family

PACKAGES = ("matplotlib", "pandas", "scipy", "sklearn", "statsmodels")
HELD_OUT = 500  # documents
DELAY, FORGETTING = 10.0, 0.7  # τ and κ: scikit-learn's defaults
ALPHA, ETA = 0.1, 0.05  # concentrations of topics in a document and of words in a topic


class Expected(dist.Dirichlet):
    """A Dirichlet whose one "draw" is exp(E[log x]), where functions linear in log x have their expectation."""

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """exp(E[log x]), shape `(*sample_shape, *batch_shape, *event_shape)`; sums to less than 1."""
        mean = digamma(self.concentration) - digamma(jnp.sum(self.concentration, -1, keepdims=True))
        return jnp.broadcast_to(jnp.exp(mean), self.shape(sample_shape))


_dirichlet = find_exponential_family(dist.Dirichlet)
assert _dirichlet is not None
register_exponential_family(Expected, **_dirichlet._asdict())


# %%
# Model and guide
# ---------------


class TopicModel(NamedTuple):
    """Latent Dirichlet allocation and its guide.

    :param documents: in the whole corpus, N.
    :param words: in the vocabulary, V.
    :param topics: K.
    :param local_steps: iterations for the topics of a document.
    """

    documents: int
    words: int
    topics: int = 20
    local_steps: int = 50

    def model(self, counts: Array) -> None:
        """Topics over words, documents over topics, and words with their topic summed out.

        :param counts: how often each document of a minibatch has each word, shape `(B, V)`.
        """
        with numpyro.plate("topic", self.topics):
            beta = numpyro.sample("beta", dist.Dirichlet(jnp.full(self.words, ETA)))
        with numpyro.plate("document", self.documents, subsample_size=len(counts)):
            theta = numpyro.sample("theta", dist.Dirichlet(jnp.full(self.topics, ALPHA)))
            numpyro.factor("words", jnp.sum(counts * jnp.log(theta @ beta), axis=-1))

    def guide(self, counts: Array) -> None:
        """Independent Dirichlets; those of the documents are at their optimum given those of the topics.

        :param counts: as for the model.
        """
        start = lambda key: random.gamma(key, 100.0, (self.topics, self.words)) / 100
        lam = numpyro.param("lambda", start, constraint=dist.constraints.positive)
        with numpyro.plate("topic", self.topics):
            beta = numpyro.sample("beta", Expected(lam))
        # At the optimum the loss has no derivative along γ, whatever γ is computed from.
        gamma = lax.stop_gradient(self.local_step(counts, lax.stop_gradient(beta)))
        with numpyro.plate("document", self.documents, subsample_size=len(counts)):
            numpyro.sample("theta", Expected(gamma))

    def local_step(self, counts: Array, beta: Array) -> Array:
        """γ of each document, by iterating γ_dk = α + Σ_w n_dw φ_dwk from 1; shape `(B, K)`.

        :param counts: shape `(B, V)`.
        :param beta: exp(E[log β]), shape `(K, V)`.
        """

        def iterate(_: int, gamma: Array) -> Array:
            theta = Expected(gamma).sample(random.key(0))
            return ALPHA + theta * ((counts / (theta @ beta)) @ beta.T)

        return lax.fori_loop(0, self.local_steps, iterate, jnp.ones((len(counts), self.topics), beta.dtype))

    def svi(self, optimizer: _NumPyroOptim) -> SVI:
        """The fit by `optimizer`."""
        return SVI(self.model, self.guide, optimizer, TraceMeanField_ELBO())

    def perplexity(self, lam: Any, seen: Any, hidden: Any) -> Array:
        """exp(−mean log p(word)) of one half of the words of new documents, given the other half; scalar.

        :param lam: parameters of the topics, shape `(K, V)`.
        :param seen: counts that θ is inferred from, shape `(D, V)`.
        :param hidden: counts that are predicted.
        """
        gamma = self.local_step(seen, Expected(lam).sample(random.key(0)))
        words = dist.Dirichlet(gamma).mean @ dist.Dirichlet(lam).mean
        return jnp.exp(-jnp.sum(hidden * jnp.log(words)) / jnp.sum(hidden))


def rate(step: Any) -> Any:
    """ρ_t = (t + τ)^-κ.

    :param step: its number t, from 0.
    """
    return (step + DELAY) ** -FORGETTING


# %%
# The published update
# --------------------


def published(problem: TopicModel, lam: np.ndarray, counts: np.ndarray, rho: float) -> np.ndarray:
    """The update of Hoffman et al. (2013), algorithm of their figure 4, in NumPy, to compare the natural step with.

    :param problem: the sizes.
    :param lam: λ before the minibatch, shape `(K, V)`.
    :param counts: the minibatch, shape `(B, V)`.
    :param rho: the rate.
    """
    e_log = lambda x: scipy.special.digamma(x) - scipy.special.digamma(x.sum(-1, keepdims=True))
    expected, log_beta = np.zeros_like(lam), e_log(lam)
    responsibilities = lambda gamma: scipy.special.softmax(e_log(gamma)[:, None] + log_beta, axis=0)
    for document in counts:
        gamma = np.ones(problem.topics)
        for _ in range(problem.local_steps):
            gamma = ALPHA + responsibilities(gamma) @ document
        expected += responsibilities(gamma) * document
    return (1 - rho) * lam + rho * (ETA + problem.documents / len(counts) * expected)


# %%
# The corpus
# ----------


class Corpus(NamedTuple):
    """Documents as counts of words.

    :param counts: documents to learn from, shape `(N, V)`.
    :param seen: one half of the words of other documents, shape `(D, V)`, and
    :param hidden: the other half.
    :param words: the vocabulary.
    """

    counts: np.ndarray
    seen: np.ndarray
    hidden: np.ndarray
    words: np.ndarray


def docstrings(package: str) -> Iterator[str]:
    """The docstrings of public functions and classes in an installed package's source files, which are not run.

    :param package: its name.
    """
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    yield ast.get_docstring(node) or ""


def read_corpus(packages: tuple[str, ...], size: int) -> Corpus:
    """The docstrings of packages as counts, in random order.

    :param packages: their names.
    :param size: words in the vocabulary, V.
    """
    texts = [text for package in tqdm(packages, desc="reading", unit="package") for text in docstrings(package)]
    documents = [text for text in dict.fromkeys(texts) if len(text.split()) >= 50]
    letters = r"\b[a-z]{3,}\b"
    counter = CountVectorizer(stop_words="english", token_pattern=letters, min_df=20, max_df=0.15, max_features=size)
    counts = counter.fit_transform(documents).toarray()
    return split(counts[counts.sum(1) >= 10], counter.get_feature_names_out())


def split(counts: np.ndarray, words: np.ndarray) -> Corpus:
    """Hold documents out, and halve them word by word.

    :param counts: of all documents.
    :param words: the vocabulary.
    """
    rng = np.random.default_rng(0)
    held, learned = np.split(rng.permutation(counts), [HELD_OUT])
    seen = rng.binomial(held, 0.5)
    hidden = held - seen
    return Corpus(learned.astype(np.float32), seen.astype(np.float32), hidden.astype(np.float32), words)


def minibatches(corpus: Corpus, size: int, passes: int) -> Iterator[np.ndarray]:
    """Documents in an order that is new in every pass.

    :param corpus: the documents.
    :param size: of a minibatch, B.
    :param passes: over the corpus.
    """
    rng, n = np.random.default_rng(1), len(corpus.counts)
    for _ in range(passes):
        for rows in rng.permutation(n)[: n // size * size].reshape(-1, size):
            yield corpus.counts[rows]


class Curve(NamedTuple):
    """One fit, scored at checkpoints.

    :param label: the optimizer.
    :param documents: number of documents used up to each checkpoint.
    :param perplexity: of held-out documents there.
    :param lam: λ at the end, shape `(K, V)`.
    """

    label: str
    documents: np.ndarray
    perplexity: np.ndarray
    lam: np.ndarray


# %%
# Fits
# ----


def learn(
    label: str, problem: TopicModel, optimizer: _NumPyroOptim, corpus: Corpus, batches: list[np.ndarray]
) -> Curve:
    """Fit to minibatch after minibatch.

    :param label: name of the fit.
    :param problem: the model.
    :param optimizer: what takes the steps.
    :param corpus: the documents.
    :param batches: the minibatches, in order.
    """
    svi = problem.svi(optimizer)
    state, update, perplexity = svi.init(random.key(0), batches[0]), jax.jit(svi.update), jax.jit(problem.perplexity)
    marks = set(np.geomspace(1, len(batches), 20).round().astype(int))
    seen, reached = [], []
    for number, batch in enumerate(tqdm(batches, desc=label, unit="minibatch"), start=1):
        state, _ = update(state, batch)
        if number in marks:
            seen.append(number * len(batch))
            reached.append(float(perplexity(svi.get_params(state)["lambda"], corpus.seen, corpus.hidden)))
    return Curve(label, np.array(seen), np.array(reached), np.asarray(svi.get_params(state)["lambda"]))


def largest_difference(problem: TopicModel, batches: list[np.ndarray]) -> float:
    """Between natural steps in double precision and the published update, relative, along some minibatches.

    :param problem: the model.
    :param batches: the minibatches.
    """
    with jax.enable_x64(True):
        svi = problem.svi(NaturalGradient(rate, max_kl=None))
        state, update, apart = svi.init(random.key(0), jnp.asarray(batches[0], float)), jax.jit(svi.update), []
        lam = np.asarray(svi.get_params(state)["lambda"])
        for step, batch in enumerate(batches):
            state, _ = update(state, jnp.asarray(batch, float))
            lam = published(problem, lam, batch, rate(step))
            apart.append(np.max(np.abs(svi.get_params(state)["lambda"] / lam - 1)))
    return float(max(apart))


def scikit_learn(problem: TopicModel, batches: list[np.ndarray]) -> np.ndarray:
    """λ by scikit-learn's implementation of the same paper, at the same settings; shape `(K, V)`.

    :param problem: the model.
    :param batches: the minibatches.
    """
    fit = LatentDirichletAllocation(
        problem.topics,
        doc_topic_prior=ALPHA,
        topic_word_prior=ETA,
        learning_decay=FORGETTING,
        learning_offset=DELAY,
        batch_size=len(batches[0]),
        total_samples=problem.documents,
        random_state=0,
    )
    for batch in tqdm(batches, desc="scikit-learn", unit="minibatch"):
        fit.partial_fit(batch)
    return np.asarray(fit.components_)


def top_words(lam: np.ndarray, words: np.ndarray, number: int) -> list[tuple[float, list[str], np.ndarray]]:
    """For each topic, the largest first: its fraction of all words, its most probable words and their probabilities.

    :param lam: parameters of the topics, shape `(K, V)`.
    :param words: the vocabulary.
    :param number: of words.
    """
    share, inside = lam.sum(1) / lam.sum(), lam / lam.sum(1, keepdims=True)
    best = np.argsort(-inside, axis=1)[:, :number]
    return [(share[k], list(words[best[k]]), inside[k, best[k]]) for k in np.argsort(-share)]


def largest_topic(lam: np.ndarray, words: np.ndarray) -> str:
    """ArviZ's summary of the probabilities of the ten likeliest words in the largest topic.

    :param lam: parameters of the topics, shape `(K, V)`.
    :param words: the vocabulary.
    """
    concentration = lam[np.argmax(lam.sum(1))]
    best = np.argsort(-concentration)[:10]
    beta = dist.Dirichlet(jnp.asarray(concentration)).sample(random.key(2), (1000,))[:, best]
    return summary({"probability": beta}, dims={"probability": ["word"]}, coords={"word": words[best]})


# %%
# The figure
# ----------


def draw_topic(axis: Axes, share: float, words: list[str], probabilities: np.ndarray) -> None:
    """One topic: its likeliest words, with bars for their probabilities.

    :param axis: where to draw.
    :param share: fraction of all words in this topic.
    :param words: the words.
    :param probabilities: of the words, given the topic.
    """
    axis.barh(range(len(words)), probabilities, color=NATURAL, alpha=0.3, height=0.85)
    for place, word in enumerate(words):
        axis.text(0.003, place, word, va="center", fontsize=8)
    axis.set(xlim=(0, 0.18), ylim=(len(words) - 0.4, -0.6), xticks=[], yticks=[])
    axis.set_title(f"{share:.0%} of all words", fontsize=8, loc="left", color="0.4", pad=3)
    axis.spines[:].set_visible(False)


def picture(curves: list[Curve], corpus: Corpus) -> Figure:
    """The largest topics, and perplexity against documents seen.

    :param curves: the fits, the one whose topics are shown first.
    :param corpus: the documents.
    """
    figure = plt.figure(figsize=(12.5, 5.2), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=[1.35, 1])
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    topics = top_words(curves[0].lam, corpus.words, 7)
    for axis, topic in zip(left.subplots(3, 5).ravel(), topics, strict=False):
        draw_topic(axis, *topic)
    left.suptitle(f"the 15 largest of {len(topics)} topics in docstrings, by default options", fontsize=11)
    axis = right.subplots()
    for curve, colour in reversed(list(zip(curves, (NATURAL, *OTHERS), strict=True))):
        axis.plot(curve.documents, curve.perplexity, color=colour, label=curve.label, marker="o", ms=3.5, lw=1.8)
    axis.set(xscale="log", yscale="log", xlabel="documents seen", ylabel="perplexity of held-out words")
    axis.yaxis.set_major_locator(MultipleLocator(100))
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_minor_locator(NullLocator())
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False, loc="lower left")
    plain(axis)
    return figure


# %%
# All together
# ------------


def main() -> None:
    """Read, check, fit, tabulate, draw."""
    parser = argparse.ArgumentParser(description="Topics of docstrings, learned from minibatches.")
    parser.add_argument("--topics", type=int, default=20, help="topics")
    parser.add_argument("--words", type=int, default=1000, help="words in the vocabulary")
    parser.add_argument("--batch", type=int, default=64, help="documents in a minibatch")
    parser.add_argument("--passes", type=int, default=2, help="passes over the corpus")
    parser.add_argument("--output", type=Path, default=FIGURES / "topic_model.png", help="path of the figure")
    chosen = parser.parse_args()
    corpus = read_corpus(PACKAGES, chosen.words)
    problem = TopicModel(len(corpus.counts), len(corpus.words), chosen.topics)
    batches = list(minibatches(corpus, chosen.batch, chosen.passes))
    apart = largest_difference(problem, batches[:3])
    optimizers: dict[str, Callable[[], _NumPyroOptim]] = {
        "NaturalGradient()": NaturalGradient,
        "… at Hoffman et al.'s rate": lambda: NaturalGradient(rate, max_kl=None),
        "Adam(0.1)": lambda: Adam(0.1),
        "Adam(0.01)": lambda: Adam(0.01),
    }
    curves = [learn(label, problem, make(), corpus, batches) for label, make in optimizers.items()]
    other = problem.perplexity(jnp.asarray(scikit_learn(problem, batches)), corpus.seen, corpus.hidden)
    print(f"\n{problem.documents} documents, {corpus.counts.sum():.0f} words of {problem.words}")
    for share, words, _ in top_words(curves[0].lam, corpus.words, 9):
        print(f"{share:>5.0%}  {' '.join(words)}")
    print(f"\n{largest_topic(curves[0].lam, corpus.words)}")
    print(f"\n{'optimizer':<32}{'perplexity of held-out words':>30}")
    for curve in curves:
        print(f"{curve.label:<32}{curve.perplexity[-1]:>30.0f}")
    print(f"{'scikit-learn, at the same rate':<32}{float(other):>30.0f}")
    print(f"\nλ by natural steps and by the published update, 3 minibatches in float64: {apart:.0e} apart, relative")
    save(picture(curves, corpus), chosen.output)


if __name__ == "__main__":
    main()
