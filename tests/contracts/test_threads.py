"""Pieces of work on threads: in order, one thread each, and no trace of how many there were."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lrcompress.threads import ONE, WIDE, Threads, apart


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_inside_every_operation_has_one_thread_and_afterwards_all_again():
    with apart() as found:
        assert found.count == 3 and torch.get_num_threads() == 1
        assert found.each(lambda _: torch.get_num_threads(), range(5)) == [1] * 5
        with found.together(WIDE):
            assert torch.get_num_threads() == 3
        with found.together(WIDE - 1):
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with apart(WIDE):
        assert torch.get_num_threads() == 3
    with pytest.raises(KeyError), apart():
        raise KeyError
    assert torch.get_num_threads() == 3


def test_results_come_in_order_whatever_ends_first():
    with apart() as found:
        assert found.each(lambda k: (time.sleep(0.02 * (k % 2 == 0)), k)[1], range(7)) == list(range(7))
    assert ONE.each(lambda k: k, []) == [] and Threads(4).each(lambda k: -k, [1]) == [-1]


def test_pieces_run_at_a_time_and_gradients_are_as_outside():
    meet = threading.Barrier(3, timeout=20)
    with apart() as found, torch.no_grad():
        assert found.each(lambda _: (meet.wait(), torch.is_grad_enabled())[1], range(3)) == [False] * 3
    assert Threads(2).each(lambda _: torch.is_grad_enabled(), range(3)) == [True] * 3


def test_no_more_results_are_held_than_there_are_threads():
    started = []
    stream = Threads(2).stream(started.append, range(10))
    next(stream)
    time.sleep(0.1)
    assert len(started) <= 3
    stream.close()
    assert len(started) < 10


def test_the_first_failure_is_raised_and_what_waits_is_not_begun():
    begun = []

    def work(k):
        begun.append(k)
        if k >= 1:
            raise ValueError(k)

    with pytest.raises(ValueError, match=r"^1$"):
        Threads(2).each(work, range(50))
    assert len(begun) < 10
