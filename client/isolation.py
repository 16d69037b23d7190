"""Which of many items spoil a request: group testing by binary splitting.

Source: F. K. Hwang, "A method for detecting all defective members in a population by group testing" (1972).
One culprit among N costs about log2(N) + 2 questions, where halving both sides would cost 2 log2(N).
"""

from collections.abc import Sequence
from typing import Final, Generic, TypeVar

__all__ = ["Search"]

ItemT = TypeVar("ItemT")

_MAX_CULPRITS: Final = 2


class Search(Generic[ItemT]):
    """Asks for groups of items until each has passed or been refused on its own.

    items: a group that was refused as a whole.
    A refusal may come from the group as such (too many for the server, say), so nobody is blamed who was not
    refused alone. Once two are found and others still do not pass, the rest are asked one by one: where most
    items are bad, that is cheaper.
    """

    def __init__(self, items: Sequence[ItemT]) -> None:
        self._suspects = list(items)  # refused together, or what is left of such a group
        self._others: list[ItemT] = []  # of unknown quality
        self._asked: list[ItemT] = []
        self._culprits = 0

    def ask(self) -> list[ItemT]:
        """The next group, empty when all are known; a group whose outcome is not told is dropped."""
        one_by_one = self._culprits >= _MAX_CULPRITS
        if self._suspects:
            size = 1 if one_by_one else (len(self._suspects) + 1) // 2
        else:
            self._suspects, self._others = self._others, []
            size = 1 if one_by_one else len(self._suspects)
        self._asked, self._suspects = self._suspects[:size], self._suspects[size:]
        return self._asked

    def passed(self) -> None:
        """The group asked for was answered."""
        self._asked = []

    def refused(self) -> bool:
        """The group asked for was refused; True if that was one item, which is to blame then."""
        # What was refused together with this group may have been so because of it alone.
        self._others += self._suspects
        if len(self._asked) == 1:
            self._suspects, self._asked = [], []
            self._culprits += 1
            return True
        self._suspects, self._asked = self._asked, []
        return False
