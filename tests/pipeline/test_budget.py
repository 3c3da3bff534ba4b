import pytest

from simmimlib.pipeline.budget import FILLED, Cost, Runs, makespan

COST = Cost(20, 1e-3, 5e-4, evaluation=1, starts=10, probe=5, probe_pixels=20, jobs=2)


@pytest.mark.parametrize(
    ("seconds", "jobs", "expected"),
    [([5, 3, 2], 1, 10), ([5, 3, 2], 2, 5), ([5, 3, 2], 8, 5), ([4, 4, 4, 1, 1, 1], 2, 8)],
)
def test_makespan(seconds, jobs, expected):
    assert makespan(seconds, jobs) == expected


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("minutes", [6, 60, 600])
def test_what_fits_fills_the_minutes_but_for_a_reserve(minutes, labelled):
    runs = Runs(3 if labelled else 1, labelled)
    images = runs.fit(COST, minutes)
    assert runs.seconds(COST, *images) == pytest.approx(60 * minutes * FILLED, rel=1e-6)
    assert runs.minutes(COST, *images) == pytest.approx(minutes)
    assert images[0] > 0 and (images[1] > 0) == labelled


def test_too_little_time_for_anything():
    assert Runs(3, True).fit(COST, 1) == pytest.approx((0, 0), abs=1e-6)


def test_more_seeds_or_a_slower_machine_leave_less():
    slow = Cost(20, 2e-3, 1e-3, 2, 20, 10, 40, 1)
    few, more = Runs(3, True).fit(COST, 60)[0], Runs(5, True).fit(COST, 60)[0]
    assert Runs(3, True).fit(slow, 60)[0] < more < few
