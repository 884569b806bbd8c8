from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blitzjax.control.blocks import PageLedger, pages_for


def test_pages_are_rounded_up() -> None:
    assert [pages_for(tokens, 16) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    ledger = PageLedger(4, 16)
    assert ledger.reserve("a", 40) and ledger.owned("a") == (0, 1, 2)
    assert not ledger.reserve("b", 17)
    assert (ledger.used, ledger.free, ledger.owned("b")) == (3, 1, ())
    assert ledger.fits(16) and not ledger.fits(17) and ledger.could_fit(64) and not ledger.could_fit(65)


def test_released_pages_are_free_again_and_twice_is_harmless() -> None:
    ledger = PageLedger(2, 16)
    ledger.reserve("a", 32)
    ledger.release("a")
    ledger.release("a")
    assert ledger.free == 2
    ledger.check()


def test_reserving_twice_is_our_mistake() -> None:
    ledger = PageLedger(4, 16)
    ledger.reserve("a", 1)
    with pytest.raises(AssertionError):
        ledger.reserve("a", 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 100))))
def test_every_page_has_at_most_one_owner(steps: list[tuple[bool, int, int]]) -> None:
    ledger = PageLedger(10, 16)
    for reserve, who, tokens in steps:
        if reserve and f"r{who}" not in ledger.holders():
            fits = ledger.fits(tokens)
            assert ledger.reserve(f"r{who}", tokens) == fits
        elif not reserve:
            ledger.release(f"r{who}")
        ledger.check()
