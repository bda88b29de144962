"""``SubspaceAdamW``: the optimizer most people want, in one typed constructor."""

from torch import Tensor

from subspan.groups import EXCLUDED
from subspan.optimizer import Params, SubspaceOptimizer
from subspan.parts import Residual, Selector, Transfer
from subspan.residuals import RESIDUALS
from subspan.rules import AdamW
from subspan.selectors import SELECTORS
from subspan.storage.allocation import StateDtype
from subspan.storage.eight_bit import SMALLEST
from subspan.utils.suggestions import look_up


class SubspaceAdamW(SubspaceOptimizer):
    """AdamW inside a subspace of every weight matrix. The defaults are SARA-Adam.

    Memory for a matrix of ``m x n``, ``m >= n``: two moments of ``m x rank`` and a basis of ``n x rank`` instead of two
    moments of ``m x n``.

    Args:
        selector: ``"importance"`` (SARA), ``"dominant"`` (GaLore), ``"random"`` (GoLore), or a selector with its
            settings,
            such as ``subspan.selectors.Importance(floor=0.1)``.
        residual: ``"discard"``, ``"fira"``, or a residual with its settings.
        betas: decay of the moments.
        eps: added to the root of the second moment, as in ``torch.optim.AdamW``.

    The other arguments are those of ``SubspaceOptimizer``.

    Example:
        >>> import torch, subspan
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> optimizer = subspan.SubspaceAdamW(model, lr=1e-2, rank=4)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        rank: int | None = None,
        *,
        selector: str | Selector = "importance",
        residual: str | Residual = "discard",
        transfer: Transfer = "keep",
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        stagger: bool | None = None,
        eta: float | None = None,
        proximal: str = "coupled",
        state_dtype: StateDtype = "float32",
        min_8bit_size: int = SMALLEST,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
        targets: str | list[str] = "all-linear",
        exclude: tuple[str, ...] = EXCLUDED,
    ) -> None:
        super().__init__(
            params,
            lr,
            rank,
            selector=look_up(selector, SELECTORS, "selector"),
            rule=AdamW(betas, eps),
            residual=look_up(residual, RESIDUALS, "residual"),
            transfer=transfer,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            weight_decay=weight_decay,
            stagger=stagger,
            eta=eta,
            proximal=proximal,
            state_dtype=state_dtype,
            min_8bit_size=min_8bit_size,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
            targets=targets,
            exclude=exclude,
        )
        if rank is None and all(group["rank"] is None for group in self.param_groups):
            self.warn_of_full_rank()
