# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Read data and reference draws from a checkout of `posteriordb`."""

import json
import pathlib
import zipfile
from typing import Any

import numpy as np

from .models import MODELS, Data

FOLDER = pathlib.Path("posterior_database")


def arguments(checkout: pathlib.Path, posterior: str) -> Data:
    """The keyword arguments of a posterior's model.

    :raises FileNotFoundError: if the checkout lacks the posterior or its data.
    """
    stored = _stored(checkout, f"posteriors/{posterior}.json")
    data = json.loads(stored.read_text())["data_name"]
    return MODELS[posterior].data(_unzipped(_stored(checkout, f"data/data/{data}.json.zip")))


def published(checkout: pathlib.Path, posterior: str) -> dict[str, np.ndarray] | None:
    """Reference draws, chains joined, of each scalar by Stan's name (``theta[1]``); None if none are published."""
    name = json.loads(_stored(checkout, f"posteriors/{posterior}.json").read_text())["reference_posterior_name"]
    if not name:
        return None
    chains = _unzipped(_stored(checkout, f"reference_posteriors/draws/draws/{name}.json.zip"))
    return {key: np.concatenate([np.asarray(chain[key], float) for chain in chains]) for key in chains[0]}


def _stored(checkout: pathlib.Path, name: str) -> pathlib.Path:
    path = checkout / FOLDER / name
    if not path.exists():
        raise FileNotFoundError(f"`{checkout}` is no checkout of posteriordb that has `{FOLDER / name}`.")
    return path


def _unzipped(path: pathlib.Path) -> Any:
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        return json.load(file)
