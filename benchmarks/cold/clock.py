# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The clock of all measurements."""

import os
import time


class Clock:
    """Seconds since the beginning: those that a user waits, and those of the processor, without other work's."""

    def __init__(self) -> None:
        self._begin, self._cpu = time.perf_counter(), _cpu()

    def read(self) -> dict[str, float]:
        """Both."""
        return {"seconds": time.perf_counter() - self._begin, "cpu": _cpu() - self._cpu}


def _cpu() -> float:
    """Seconds of the processor, of all threads and of the child processes that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
