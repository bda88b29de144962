"""``SubspaceAdamW``: the optimizer that most people want, in one typed constructor."""

from torch import Tensor
from typing_extensions import Unpack

from subspan.groups import EXCLUDED
from subspan.optimizer import Params, SubspaceOptimizer
from subspan.parts import Residual, Selector, Transfer
from subspan.residuals import RESIDUALS
from subspan.rules import AdamW
from subspan.selectors import SELECTORS
from subspan.step.settings import AllStepOptions, check_names, spelled_out
from subspan.utils.ranks import Rank
from subspan.utils.suggestions import look_up


class SubspaceAdamW(SubspaceOptimizer):
    """AdamW inside a subspace of every weight matrix. The defaults are SARA-Adam.

    For a matrix of ``m x n``, ``m >= n``, it holds two moments of ``m x rank`` and a basis of ``n x rank`` instead of
    two moments of ``m x n``.

    Args:
        selector: ``"importance"`` (SARA), ``"dominant"`` (GaLore), ``"random"`` (GoLore), or a selector with its
            settings, such as ``subspan.selectors.Importance(floor=0.1)``.
        residual: ``"discard"``, ``"fira"``, or a residual with its settings.
        betas: decay rates of the two moments.
        eps: number added to the root of the second moment, as in ``torch.optim.AdamW``.

    The other arguments are those of ``SubspaceOptimizer``.

    Example:
        >>> import torch, subspan
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> optimizer = subspan.SubspaceAdamW(model, lr=1e-2, rank=4)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
    """

    @spelled_out(AllStepOptions)
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        rank: Rank | None = None,
        *,
        selector: str | Selector = "importance",
        residual: str | Residual = "discard",
        transfer: Transfer = "keep",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        stagger: bool | None = None,
        seed: int = 0,
        targets: str | list[str] = "all-linear",
        exclude: tuple[str, ...] = EXCLUDED,
        **settings: Unpack[AllStepOptions],
    ) -> None:
        check_names(settings, SubspaceAdamW.__init__, "SubspaceAdamW")
        super().__init__(
            params,
            lr,
            rank,
            selector=look_up(selector, SELECTORS, "selector"),
            rule=AdamW(betas, eps),
            residual=look_up(residual, RESIDUALS, "residual"),
            transfer=transfer,
            stagger=stagger,
            seed=seed,
            targets=targets,
            exclude=exclude,
            **settings,
        )
        if rank is None and all(group["rank"] is None for group in self.param_groups):
            self.warn_of_full_rank()
