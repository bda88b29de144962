"""A step on tensors without memory, which are counted as if they had it.

The optimizer steps on the ``meta`` device. There it takes the same way as on an accelerator: factorisations in fp32,
random numbers drawn on the host. Models run in torch's fake-tensor mode, as on a CPU, because there is no autocast on
``meta``. Neither knows what an operation of a CUDA library takes for itself.
"""

from typing import Any

import torch

from subspan.costs.live_bytes import LiveBytes


class ShapesOnly(LiveBytes):
    """Counts as ``LiveBytes`` does, and answers where code asks for a value: true, one, or zeros on the host.

    So every gradient is finite and not zero, a basis that is due is chosen, and no step is skipped.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            asked = args[0].dtype
            return True if asked == torch.bool else 1.0 if asked.is_floating_point else 1
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "meta":
            target = torch.device((kwargs or {}).get("device") or "meta")
            if target.type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)
