"""Non-negative weighted least squares for a few unknowns: how costs are read off measured times. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

Row = tuple[tuple[float, ...], float, float]
"""How often each unknown counts, the seconds that came of it, and the weight of the row."""


def least_squares(rows: Sequence[Row]) -> list[float] | None:
    """The unknowns that explain ``rows`` best without being negative. Every choice of those that are not zero is
    solved, and the best one without a negative value counts. None where there are no rows."""
    if not rows:
        return None
    width = len(rows[0][0])
    best: tuple[float, list[float]] | None = None
    for size in range(width, 0, -1):
        if size > len(rows):
            continue
        for chosen in combinations(range(width), size):
            solution = _solve(rows, chosen)
            if solution is None or min(solution) < 0.0:
                continue
            values = [0.0] * width
            for index, value in zip(chosen, solution, strict=True):
                values[index] = value
            error = sum(
                weight * (seconds - sum(x * v for x, v in zip(given, values, strict=True))) ** 2
                for given, seconds, weight in rows
            )
            if best is None or error < best[0]:
                best = (error, values)
    return best[1] if best is not None else None


def _solve(rows: Sequence[Row], chosen: tuple[int, ...]) -> list[float] | None:
    """The normal equations by Gauss-Jordan, columns scaled to one; None where the columns can't be told apart."""
    size = len(chosen)
    scale = [math.sqrt(sum(weight * given[index] ** 2 for given, _, weight in rows)) for index in chosen]
    if min(scale) <= 0.0:
        return None
    matrix = [[0.0] * (size + 1) for _ in range(size)]
    for given, seconds, weight in rows:
        columns = [given[index] / scale[at] for at, index in enumerate(chosen)]
        for i in range(size):
            for j in range(size):
                matrix[i][j] += weight * columns[i] * columns[j]
            matrix[i][size] += weight * columns[i] * seconds
    for i in range(size):
        pivot = max(range(i, size), key=lambda row, column=i: abs(matrix[row][column]))  # type: ignore[misc]
        if abs(matrix[pivot][i]) < 1e-6:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        matrix[i] = [value / matrix[i][i] for value in matrix[i]]
        for row in range(size):
            if row != i:
                factor = matrix[row][i]
                matrix[row] = [value - factor * own for value, own in zip(matrix[row], matrix[i], strict=True)]
    return [row[size] / scale[at] for at, row in enumerate(matrix)]
