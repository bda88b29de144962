"""No method makes fp64 tensors of a dimension or more off the CPU: Apple's MPS has none."""

import contextlib
from typing import Any

import pytest
import torch
from support.helpers import EVERY_SELECTOR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspan import linalg
from subspan.parts import Key, Selector
from subspan.rules import AdamW


class NoDouble(TorchDispatchMode):
    """Fails where a tensor in fp64 is made on ``meta``, which stands for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.is_meta and made.ndim:
                assert made.dtype != torch.float64, f"{func} makes fp64 of {tuple(made.shape)}"
        return out


@pytest.mark.parametrize("selector", EVERY_SELECTOR, ids=repr)
def test_no_fp64_on_a_device(selector: Selector) -> None:
    """Up to the first copy of values to the CPU, which ``meta`` does not have."""
    G = torch.ones(24, 16, device="meta")
    state = selector.init(G, 4) | AdamW().init(G, (24, 4), -2)
    with NoDouble():
        for use in (lambda: selector.refresh_(G, state, Key(0, "w", 0)), lambda: selector.track_(G, state, None)):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                use()


def test_norms_off_the_cpu_neither_underflow_nor_overflow() -> None:
    """They are those of fp64, to the precision of fp32."""

    class Elsewhere:
        type = "elsewhere"

    class There(torch.Tensor):
        device = Elsewhere()  # type: ignore[assignment]

    G = torch.randn(24, 16) * torch.logspace(-36, 36, 16)
    G[:, 3] = 0
    for dim in (-2, (-2, -1)):
        norms, unit = linalg.scaled_norm(G.as_subclass(There), dim)
        ours = norms.as_subclass(torch.Tensor).double() * unit.as_subclass(torch.Tensor).double()
        torch.testing.assert_close(ours, torch.linalg.vector_norm(G, dim=dim, dtype=torch.float64), rtol=1e-6, atol=0)
