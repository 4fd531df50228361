"""Mutants of files: the first of those that `make fuzz` tries, always the same ones."""
import pytest

from fuzz import COUNTS, LIMIT_S, fuzz


def none_crashes(kind, count):
    rows = fuzz(kind, count)
    ends = [r["end"] for r in rows]
    assert [r for r in rows if r["end"] == "crashed"] == [] and len(rows) == count
    assert ends.count("accepted") > count / 50 and ends.count("refused") > count / 5, "mutants that are all alike show nothing"
    assert max(r["seconds"] for r in rows) < LIMIT_S and max(r["memory"] for r in rows) <= 2 << 30


@pytest.mark.parametrize("kind", COUNTS)
def test_mutants(kind):
    "A hundredth: a sane recording or one line, in a child of 2 GiB, within 10 s."
    none_crashes(kind, COUNTS[kind] // 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_a_tenth_of_the_mutants(kind):
    none_crashes(kind, COUNTS[kind] // 10)
