"""Which methods can train a weight whose rows are sharded over ranks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from subspan import distributed
from subspan.step.carriers import layer_of
from subspan.step.layout import PROJ_TYPES, layout_of
from subspan.step.method import Method
from subspan.utils.errors import SettingError


def check_sharded(method: Method, p: Tensor, group: Mapping[str, Any]) -> None:
    """Raise if ``p`` is sharded in a way, or by a method, that does not work."""
    if distributed.is_sharded(p):
        distributed.check_placement(p, f"a parameter of shape {tuple(p.shape)}")
        check_shardable(method, p, group)


def check_shardable(method: Method, p: Tensor, group: Mapping[str, Any]) -> None:
    """Raise unless this method can train ``p`` when its rows are sharded over ranks."""
    if group["rank"] is None or p.ndim < 2 or layer_of(p) is not None:
        return
    why = None
    if p.ndim == 3 and not group["flatten"]:
        why = f"params: a stack of matrices {tuple(p.shape)}"
    elif (
        # Of std the columns are compressed, and of a weight (in, out) always.
        PROJ_TYPES[group["proj_type"]] != "short"
        and not group.get("transposed", False)
        and layout_of(p.shape, group["rank"], group["proj_type"], group["flatten"]).side == "left"
    ):
        why = f"proj_type={group['proj_type']!r}, which is the rows of a matrix {tuple(p.shape)}"
    elif method.selector.tracks or (method.selector.needs_gradient and not method.selector.takes_gram):
        why = f"selector={method.selector!r}"
    elif not method.residual.takes_rows:
        why = f"residual={method.residual!r}"
    if why is not None:
        raise SettingError(
            f"{why}: does not work where the rows of a weight are sharded over ranks (fully_shard); use proj_type='std' or "
            "'right'; a selector that chooses from the Gram matrix, such as selectors.Importance(), or draws, such as "
            "selectors.Random(); residuals.Discard() or residuals.Fira(); and exclude stacks of experts"
        )
