"""Figures that the papers report, kept apart from what is measured: validation perplexities on C4, single runs.

They are from SARA (Zhang et al. 2025, arXiv 2502.05790), tables 1 and 3: LLaMA on C4, sequences of 512. The model of
60M saw 1.5B tokens, that of 130M 2.2B and that of 350M 6B. The figures say nothing about another model, data set or
number of tokens, and share no scale with a measurement here.
"""

SOURCE = "SARA, arXiv 2502.05790, tables 1 and 3: validation perplexity on C4, single runs"
SIZES = ("60M", "130M", "350M")
REPORTED: dict[str, tuple[float | None, float | None, float | None]] = {
    "adamw": (27.71, 23.27, 18.21),
    "galore_adamw": (31.50, 24.88, 19.68),
    "sara_adamw": (30.47, 24.21, 19.16),
    "fira_adamw": (28.42, 22.37, 17.35),
    "fira_sara_adamw": (28.12, 22.22, 17.25),
    "galore_adafactor": (31.13, 24.79, 19.45),
    "sara_adafactor": (30.06, 24.09, 18.88),
    "galore_adam_mini": (32.08, 25.46, 19.89),
    "sara_adam_mini": (31.66, 24.87, 19.41),
    "galore_adamw_8bit": (31.62, 25.35, 18.63),
    "sara_adamw_8bit": (30.55, 24.67, 18.16),
    "golore_adamw": (31.61, None, None),
    "online_pca_adamw": (33.69, None, None),
}
"""Perplexities by optimizer, in the order of ``SIZES``.

The column for 130M of table 3 is left out: its number of tokens is another one.
"""


def perplexities(optimizer: str, as_published: bool) -> tuple[float | None, ...]:
    """Return the reported figure for each size. No paper reports anything for an optimizer with a part changed."""
    return REPORTED.get(optimizer, _NONE) if as_published else _NONE


_NONE: tuple[float | None, ...] = (None,) * len(SIZES)
