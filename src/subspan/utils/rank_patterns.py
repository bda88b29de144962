"""Ranks by regular expressions of names."""

import re
from collections.abc import Collection, Mapping, Sequence

from subspan.utils.errors import SettingError
from subspan.utils.missing_matrices import looks_like
from subspan.utils.ranks import RANKS, Rank, is_rank


def check_rank(rank: Rank, rank_pattern: Mapping[str, Rank] | None = None) -> None:
    """Raise a ``SettingError`` unless both are in range. What a pattern matches shows only where there is a model."""
    if not is_rank(rank):
        raise SettingError(f"rank={rank!r}: expected {RANKS}")
    RankPattern(rank_pattern)


class RankPattern:
    """Ranks by name: the first of some regular expressions that is found in a name gives its rank.

    Args:
        given: ranks by expression, such as ``{"q_proj": 32, r"layers\\.0\\.": 0.5}``; ``None`` has none.

    Raises:
        SettingError: ``given`` is no mapping, an expression is none, or a rank is out of range.
    """

    def __init__(self, given: Mapping[str, Rank] | None) -> None:
        if given is not None and not isinstance(given, Mapping):
            raise SettingError(
                f"rank_pattern={given!r}: expected ranks by regular expression, such as {{'q_proj': 32, 'mlp': 0.5}}"
            )
        self.ranks: dict[str, Rank] = dict(given or {})
        self._rows = [compiled(pattern, "rank_pattern") for pattern in self.ranks]
        for pattern, rank in self.ranks.items():
            if not is_rank(rank):
                raise SettingError(f"rank_pattern[{pattern!r}]={rank!r}: expected {RANKS}")

    def finds(self, name: str) -> str | None:
        """Return the expression that gives the rank of a parameter with this canonical name, if one does."""
        return next((row.pattern for row in self._rows if row.search(name)), None)

    def of(self, name: str, otherwise: Rank) -> Rank:
        """Return the rank of a parameter with this canonical name: that of a pattern, or else the other."""
        pattern = self.finds(name)
        return otherwise if pattern is None else self.ranks[pattern]

    def check_used(self, names: Sequence[str], overridden: Collection[str] = ()) -> None:
        """Raise if an expression gives no matrix its rank.

        Args:
            names: the canonical names of the projected matrices.
            overridden: those of them whose rank comes from elsewhere.
        """
        used = {self.finds(name) for name in names if name not in overridden}
        for row in self._rows:
            if row.pattern in used:
                continue
            found = next((name for name in names if row.search(name)), None)
            if found is None:
                raise SettingError(
                    f"rank_pattern: {row.pattern!r} matches no projected matrix; {looks_like(row.pattern, names)}"
                )
            if found in overridden:
                raise SettingError(
                    f"rank_pattern: {row.pattern!r} gives no matrix its rank, because overrides give one to {found!r}, and "
                    "they win; leave one of the two out"
                )
            raise SettingError(
                f"rank_pattern: {row.pattern!r} comes after {self.finds(found)!r}, which matches {found!r} first; put it "
                "before"
            )


def compiled(pattern: str, argument: str) -> re.Pattern[str]:
    """Compile an expression that the user gave as ``argument``; raises a ``SettingError`` if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SettingError(f"{argument}: {pattern!r} is no regular expression: {error}; mend or escape it") from error
