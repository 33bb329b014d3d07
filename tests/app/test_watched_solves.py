"""Solves watched from another thread, round by round, without Gradio."""

from __future__ import annotations

import threading
from functools import partial

import pytest
from app_cases import round_info, rounds_of, watch


def test_a_watched_solve_is_seen_round_by_round(app):
    watched = watch(app, partial(rounds_of, 5))
    assert [(m.round, m.final, float(m.image.mean())) for m in watched] == [
        (1, 0, 1.0), (2, 0, 2.0), (3, 0, 3.0), (4, 0, 4.0), (5, 9, 5.0),
    ]  # fmt: skip
    assert watched.result == 5
    some = watch(app, partial(rounds_of, 7), every=3)
    assert [m.round for m in some] == [3, 6, 7], "every third, and the last"
    assert some.result == 7


def test_the_clock_stands_still_while_a_round_is_looked_at(app, monkeypatch):
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    monkeypatch.setattr(app.time, "perf_counter", lambda: now[0])
    watched = watch(app, partial(rounds_of, 3, before=lambda: pass_time(2)))
    seconds = []
    for moment in watched:
        seconds.append(moment.seconds)
        pass_time(100)
    assert seconds == [2, 4, 6]
    assert watched.seconds == 6


def test_a_solve_that_fails_fails_where_it_is_watched(app):
    def solve(callback):
        callback(round_info(1))
        raise ValueError("no")

    watched = watch(app, solve)
    with pytest.raises(ValueError, match=r"^no$"):
        list(watched)
    assert len(watched.moments) == 1


def test_a_solve_that_nobody_watches_any_more_ends(app):
    stop, threads = threading.Event(), threading.active_count()
    watched = watch(app, partial(rounds_of, 1000), stop)
    moments = iter(watched)
    next(moments), next(moments)
    moments.close()
    assert stop.is_set()
    assert threading.active_count() == threads
    assert watched.result == 2
