"""Which target is asked, and which is left alone."""

import math

import pytest

from graftserve.client.targets import Breaker, Targets


def open_breaker(now=0.0):
    """A breaker that has just opened, at `now` + 3."""
    breaker = Breaker()
    for step in range(5):
        breaker.failed(now + 0.75 * step, 1.0)
    return breaker


@pytest.mark.parametrize(
    ("moments", "is_open"),
    [
        ([0, 1, 2, 2.5], False),  # four
        ([0, 1, 2, 2.5, 2.9], False),  # five, in less than three seconds
        ([0, 1, 2, 2.5, 3], True),
        ([0] * 100, False),  # all at once
        ([0] * 100 + [3], True),
    ],
)
def test_it_opens_after_five_failures_in_three_seconds(moments, is_open):
    breaker = Breaker()
    for moment in moments:
        breaker.failed(moment, 0.5)
    assert breaker.is_open == is_open


def test_an_answer_begins_the_count_again():
    breaker = Breaker()
    for moment in (0, 1, 2, 3):
        breaker.failed(moment, 0.5)
    breaker.succeeded()
    for moment in (4, 5, 6, 6.5):
        breaker.failed(moment, 0.5)
    assert not breaker.is_open


def test_while_open_one_attempt_is_on_trial_at_the_end_of_each_rest():
    breaker = open_breaker()
    rests = []
    now = 3.0
    for _ in range(7):
        probe_at = breaker.opens_at(now)
        rests.append(probe_at - now)
        breaker.sent()
        assert breaker.opens_at(probe_at) == math.inf
        now = probe_at + 0.1
        breaker.failed(now, 1.0)
    assert rests == pytest.approx([0.5, 1, 2, 4, 8, 10, 10])
    breaker.sent()
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.opens_at(now) == now


def test_the_rest_is_spread_by_chance():
    breaker = Breaker()
    for step in range(5):
        breaker.failed(0.75 * step, 0.0)
    assert breaker.opens_at(3.0) == pytest.approx(3.25)


def test_what_was_sent_before_it_opened_does_not_lengthen_the_rest():
    breaker = open_breaker()
    probe_at = breaker.opens_at(3.0)
    for _ in range(16):
        breaker.failed(3.01, 1.0)
    assert breaker.opens_at(3.01) == probe_at


def test_a_trial_that_was_given_up_makes_way_for_the_next():
    breaker = open_breaker()
    breaker.sent()
    breaker.gave_up(9.0)
    assert breaker.is_open
    assert breaker.opens_at(9.0) == 9.0


def test_the_idlest_is_asked_and_equals_take_turns():
    targets = Targets(["a", "b", "c"])
    asked = []
    for _ in range(6):
        number = targets.pick(0.0)
        targets.sent(number)
        asked.append(number)
    assert asked == [0, 1, 2, 0, 1, 2]
    targets.ended(1)
    assert targets.pick(0.0) == 1


@pytest.mark.parametrize(("avoid", "choices"), [([], {0, 1}), ([0], {1}), ([1], {0}), ([0, 1], {0, 1})])
def test_a_second_copy_goes_elsewhere_if_it_can(avoid, choices):
    targets = Targets(["a", "b"])
    assert {targets.pick(0.0, avoid=avoid) for _ in range(4)} == choices


def test_one_that_is_not_there_is_left_alone():
    targets = Targets(["a", "b"])
    for step in range(5):
        targets.breakers[0].failed(0.75 * step, 1.0)
    assert {targets.pick(3.1) for _ in range(4)} == {1}
    for step in range(5):
        targets.breakers[1].failed(0.75 * step, 1.0)
    assert targets.pick(3.1) is None
    assert targets.opens_at(3.1) == pytest.approx(3.5)
    assert {targets.pick(3.1, even_open=True) for _ in range(4)} == {0, 1}
    assert targets.pick(3.5) in (0, 1)


def test_one_that_stalled_is_left_to_the_others_for_a_while():
    targets = Targets(["a", "b"])
    targets.stalled(0, 5.0)
    targets.sent(1)
    assert {targets.pick(6.0) for _ in range(4)} == {1}
    assert targets.pick(6.0, avoid=[1]) == 0
    assert targets.pick(15.0) == 0
    targets.stalled(1, 15.0)
    targets.stalled(0, 15.0)
    assert targets.pick(16.0) == 0  # there is nobody else
    targets.answered(1)
    targets.sent(1)
    assert {targets.pick(16.0) for _ in range(4)} == {1}
