"""A worker of a study in a process of its own: python study_worker.py URL LOG SECONDS, used by test_studies.py.

The objective is what an error costs, trace(E A E^T) / 2, when the rows of a small matrix are rounded to 4 bits with
their columns scaled by a power of the diagonal of A.
"""

import os
import sys
import time

import numpy as np

from sqjax.search_space import Search, Space
from sqjax.studies import Outcome, open_storage, open_study, work

STRENGTHS = [round(0.05 * i, 2) for i in range(20)]
SEARCH = Search(name="one-matrix", heartbeat=1)
SPACE = Space.read({"recipe": {"gamma_in": STRENGTHS}})


def cost(gamma: float) -> float:
    rng = np.random.default_rng(0)
    size_I, weight_OI = np.exp(rng.normal(size=256)), rng.normal(size=(64, 256))
    scaled_OI = weight_OI * size_I**gamma
    step_O = np.abs(scaled_OI).max(axis=1, keepdims=True) / 7
    error_OI = np.round(scaled_OI / step_O) * step_O / size_I**gamma - weight_OI
    return float(0.5 * np.sum(np.square(error_OI * size_I)))


def main(url: str, log: str, seconds: str) -> None:
    def objective(points, report):
        note = lambda word: print(word, points[0]["recipe.gamma_in"], os.getpid(), file=file, flush=True)  # noqa: E731
        with open(log, "a", encoding="utf-8") as file:
            note("begin")
            time.sleep(float(seconds))
            value = cost(points[0]["recipe.gamma_in"])
            note("end")
        yield 0, Outcome((value,))

    study = open_study(open_storage(url, SEARCH), SEARCH, SPACE, {"test": 1})
    work(study, SEARCH, SPACE, objective)


if __name__ == "__main__":
    main(*sys.argv[1:])
