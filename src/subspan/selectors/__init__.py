"""Selectors answer the question "which subspace?". A new one is one file here and one line in ``SELECTORS``."""

from collections.abc import Callable

from subspan.parts import Selector
from subspan.selectors.coordinates import Coordinates
from subspan.selectors.cyclic import Cyclic
from subspan.selectors.dominant import Dominant
from subspan.selectors.gaussian import Gaussian
from subspan.selectors.importance import Importance
from subspan.selectors.lazy import Lazy
from subspan.selectors.online_pca import OnlinePCA
from subspan.selectors.power_iteration import PowerIteration
from subspan.selectors.random import Random
from subspan.selectors.stratified import Stratified
from subspan.selectors.switch import Switch

SELECTORS: dict[str, Callable[[], Selector]] = {
    "dominant": Dominant,
    "importance": Importance,
    "random": Random,
    "gaussian": Gaussian,
    "coordinates": Coordinates,
    "online_pca": OnlinePCA,
    "power_iteration": PowerIteration,
    "stratified": Stratified,
    "cyclic": Cyclic,
}
"""Selectors by name, with the settings of their papers. ``Switch`` and ``Lazy``, which hold others, are not here."""

__all__ = [
    "SELECTORS",
    "Coordinates",
    "Cyclic",
    "Dominant",
    "Gaussian",
    "Importance",
    "Lazy",
    "OnlinePCA",
    "PowerIteration",
    "Random",
    "Stratified",
    "Switch",
]
