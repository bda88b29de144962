"""Keep ``torch.compile`` out of what asks Python and not tensors, and import it no earlier than that."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def untraced(function: Function) -> Function:
    """Let ``torch.compile`` call ``function`` as it is, as ``torch.compiler.disable`` does.

    That decorator imports the compiler as soon as a function is decorated, which takes longer than the rest of this
    package. This one, which torch's own optimizers use, imports it at the first call.
    """
    return cast(Function, torch._disable_dynamo(function))  # type: ignore[attr-defined]
