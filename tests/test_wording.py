"""What a message says of an exception or a file: one line, printable, not long, never nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from timm_paf.wording import first_line_of, reason_of, shown


@given(st.text(max_size=400), st.integers(1, 500))
def test_any_text_is_one_printable_line_of_that_length(text: str, length: int) -> None:
    for found in (shown(text, length), reason_of(ValueError(text), length)):
        assert found.isprintable()
        assert len(found) <= length + 3
    assert reason_of(ValueError(text)).strip()


def test_what_an_exception_says_is_kept_and_its_type_stands_in_for_nothing() -> None:
    assert reason_of(AssertionError()) == reason_of(AssertionError(' \n\x00\u200b')) == 'AssertionError'
    assert reason_of(ValueError('a\n\tb  c')) == 'a b c'
    assert reason_of(ValueError('x ' * 1000), None) == ('x ' * 1000).strip()


def test_the_stack_of_pytorch_and_its_advice_are_left_out() -> None:
    error = RuntimeError('bad\nadvice\nException raised from f at x.cpp:1\nframe #0: g')
    assert (reason_of(error), first_line_of(error)) == ('bad advice', 'bad')
    assert first_line_of(AssertionError('\n')) == 'AssertionError'
