"""What stands for newer Pythons' functions does what these do."""

import itertools
import sys

import pytest

from psbn_mmdet import python38

CASES = ["", "a", "ab", "abab", "b"]


@pytest.mark.parametrize("zip_strict", [python38.zip_strict, lambda *i: python38._zip_strict(i)])
class TestZipStrict:
    def test_equal_lengths(self, zip_strict):
        assert list(zip_strict([1, 2], "ab", iter([None, 3]))) == [(1, "a", None), (2, "b", 3)]
        assert list(zip_strict([], [])) == list(zip_strict()) == []

    @pytest.mark.parametrize("lengths", [(2, 1), (1, 2), (0, 1), (2, 2, 3)])
    def test_other_lengths_are_refused(self, zip_strict, lengths):
        with pytest.raises(ValueError, match="zip"):
            list(zip_strict(*map(range, lengths)))


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs Python 3.10, to compare with")
def test_the_others_agree_with_newer_pythons():
    for text, part in itertools.product(CASES, CASES):
        assert python38.removeprefix(text, part) == text.removeprefix(part)
        assert python38.removesuffix(text, part) == text.removesuffix(part)
    for text in CASES:
        assert list(python38.pairwise(text)) == list(itertools.pairwise(text))
