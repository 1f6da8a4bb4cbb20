"""Lists in two arrays are the lists that were put in."""

import random

import numpy

from qtune.data.ragged import Ragged


def test_lists_come_back_as_they_were() -> None:
    rng = random.Random(0)
    for _ in range(50):
        lists = [tuple(rng.randrange(99) for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(0, 9))]
        kept = Ragged.of(lists)
        assert list(kept) == lists
        assert kept == lists == Ragged.of(kept)
        assert kept[1:4] == lists[1:4]
        assert [kept[i - len(lists)] for i in range(len(lists))] == lists
        assert kept.sums().tolist() == [sum(each) for each in lists]
        assert kept.largest().tolist() == [max(each) for each in lists]


def test_it_is_not_what_differs() -> None:
    kept = Ragged.of([(1, 2), (3,)])
    assert kept != [(1, 2)]
    assert kept != [(1,), (2, 3)]
    assert kept != 3


def test_sums_of_what_stands_in_the_places_of_others_do_not_run_over() -> None:
    kept = Ragged.of([(0, 1), (1,)])
    assert kept.sums(numpy.array([2**31 - 1, 2**31 - 1, 5], numpy.int32)).tolist() == [2**32 - 2, 5]
