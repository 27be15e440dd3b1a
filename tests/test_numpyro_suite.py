# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""NumPyro's own tests of SVI hold with this optimizer in the place of theirs, in as many steps."""

import pytest
from numpyro_suite import rows

from numpyro_natgrad import NaturalGradient

# The warnings of these models are NumPyro's subject, not ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

#: ``python tests/numpyro_suite.py ours`` runs the slow rows too (docs/benchmarks/numpyro_tests.md).
ROWS = {row.name: row for row in rows() if not (row.slow or row.differs)}


@pytest.mark.parametrize("name", ROWS)
def test_row_of_the_suite_of_numpyro(name):
    ROWS[name].holds(NaturalGradient())
