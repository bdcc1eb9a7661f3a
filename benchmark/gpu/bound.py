"""Bounds on measured numbers, and whether they hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """A limit on one number.

    Args:
        name: what is measured, and where.
        limit: in `unit`.
        at_least: whether the number must reach the limit, rather than stay within it.
        unit: printed after number and limit; `x` for a ratio.
    """

    name: str
    limit: float
    at_least: bool = False
    unit: str = "x"

    def judge(self, measured: float | None) -> Verdict:
        """`measured`: None if the experiment did not get that far."""
        return Verdict(self, measured)


@dataclass(frozen=True)
class Verdict:
    bound: Bound
    measured: float | None

    @property
    def passed(self) -> bool | None:
        """None if nothing was measured. NaN never passes."""
        if self.measured is None:
            return None
        limit = self.bound.limit
        return self.measured >= limit if self.bound.at_least else self.measured <= limit

    @property
    def word(self) -> str:
        return {None: "not measured", True: "pass", False: "FAIL"}[self.passed]

    def __str__(self) -> str:
        bound, sign = self.bound, ">=" if self.bound.at_least else "<="
        measured = "" if self.measured is None else f"{self.measured:.4g}{bound.unit} "
        return f"{bound.name}: {measured}({sign} {bound.limit:g}{bound.unit}) {self.word}"

    def entry(self) -> dict[str, Any]:
        """Entry for JSON."""
        return {**asdict(self.bound), "measured": self.measured, "passed": self.passed}
