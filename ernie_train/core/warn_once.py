"""Warnings that are said once, and again only after the matter was in order in between."""

from collections.abc import Callable, Hashable


class WarnOnce:
    """`tell` passes a warning on to `say` when something begins to be wrong."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._told: set[Hashable] = set()

    def tell(self, key: Hashable, wrong: bool, text: str, *, again: bool = False) -> None:
        """`again`: it got worse, which is said too."""
        if wrong and (again or key not in self._told):
            self._say(f"warning: {text}")
            self._told.add(key)
        elif not wrong:
            self._told.discard(key)
