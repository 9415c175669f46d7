"""The nearest neighbour under dynamic time warping, on the labelled sequences of
benchmarks/results.md: the rival that all others are compared with (Bagnall et al. 2017,
"The great time series classification bake off").

    RLRNN_DATA=… python benchmarks/dtw.py

Several channels are warped together: the squared distances of their values are summed
(DTW_D; Shokoohi-Yekta et al. 2017). Ties go to the first of the training part. The
learned window, for sequences of one length, is the share of it, of 0 to 100 %, with the
fewest errors of each training sequence by all others, the least such share.
"""

import argparse

import numba
import numpy as np
from numpy.typing import NDArray

from rlrnn.data.labelled import LabelledOptions, read_labelled

SETS = ("GunPoint", "ArrowHead", "ItalyPowerDemand", "BasicMotions", "JapaneseVowels")
Array = NDArray[np.float64]


@numba.njit(cache=True)
def distance(a: Array, b: Array, window: int, limit: float) -> float:
    """The least sum of squared differences over the ways from start to end that stay
    within `window` steps of the diagonal; a, b: [T, channels]. Infinity if it is above
    `limit`."""
    n, m = len(a), len(b)
    window = max(window, abs(n - m))
    before = np.full(m + 1, np.inf)
    before[0] = 0.0
    for i in range(1, n + 1):
        row = np.full(m + 1, np.inf)
        least = np.inf
        for j in range(max(1, i - window), min(m, i + window) + 1):
            cost = 0.0
            for c in range(a.shape[1]):
                cost += (a[i - 1, c] - b[j - 1, c]) ** 2
            row[j] = cost + min(before[j], before[j - 1], row[j - 1])
            least = min(least, row[j])
        if least > limit:
            return np.inf
        before = row
    return float(before[m])


def nearest(one: Array, others: list[Array], window: int, skip: int = -1) -> int:
    """Which of the others is nearest; not `skip`."""
    best, limit = -1, np.inf
    for i, other in enumerate(others):
        if i != skip and (found := distance(one, other, window, limit)) < limit:
            best, limit = i, found
    return best


def learned_window(train: list[Array], labels: list[str]) -> int:
    """In steps."""
    length = len(train[0])

    def errors(percent: int) -> int:
        window = percent * length // 100
        guesses = [nearest(one, train, window, i) for i, one in enumerate(train)]
        return sum(labels[g] != label for g, label in zip(guesses, labels, strict=True))

    return min(range(101), key=errors) * length // 100


def read(name: str, part: str) -> tuple[list[Array], list[str]]:
    path = f"$RLRNN_DATA/ucr_uea/{name}/{name}_{part}.ts.gz"
    found = read_labelled(path, LabelledOptions())
    values = [np.ascontiguousarray(one.values, np.float64) for one in found]
    return values, [str(one.label) for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", nargs="*", default=SETS)
    for name in parser.parse_args().sets:
        train, labels = read(name, "TRAIN")
        test, truth = read(name, "TEST")
        windows = {"whole": max(map(len, train + test))}
        if len({len(one) for one in train + test}) == 1:
            windows["learned"] = learned_window(train, labels)
        for which, window in windows.items():
            guesses = [labels[nearest(one, train, window)] for one in test]
            right = np.mean([a == b for a, b in zip(guesses, truth, strict=True)])
            print(f"{name}: {which} window ({window} steps) {right:.4f}", flush=True)


if __name__ == "__main__":
    main()
