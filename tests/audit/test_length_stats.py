from array import array

from qtune.audit.length_stats import Bar, as_numbers, bars_of


def test_bars_double_and_hold_every_row_once() -> None:
    lengths = array("I", [1, 2, 3, 4, 5, 8, 9, 40])
    assert bars_of(as_numbers(lengths)) == (
        Bar(0, 1, 1),
        Bar(2, 2, 1),
        Bar(3, 4, 2),
        Bar(5, 8, 2),
        Bar(9, 16, 1),
        Bar(17, 32, 0),
        Bar(33, 64, 1),
    )
