"""The documents agree with each other and with the program."""

from __future__ import annotations

from tests.check_docs import problems, unknown_flags


def test_documents_are_in_step() -> None:
    assert problems() == []


def test_a_wrong_flag_is_found() -> None:
    text = "python -m components.train --no_such 1\npipeline.py run --set nothing=1"
    assert unknown_flags(text) == ["the pipeline has no parameter nothing", "components.train has no flag --no_such"]
