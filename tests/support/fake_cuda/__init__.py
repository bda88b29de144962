"""CUDA devices for fake tensors, on a build of torch for the CPU: whole steps run on them, without values.

A step fails where a tensor of the CPU meets one of the device, and where the host would wait for a value of the device.
"""

import functools
import shutil
from pathlib import Path

import pytest
import torch


@functools.cache
def fake_cuda() -> None:
    """Lets ``FakeTensorMode`` make tensors on "cuda". Skips the test where there is no compiler."""
    if torch.cuda.is_available():
        return
    if shutil.which("c++") is None or shutil.which("ninja") is None:
        pytest.skip("needs a C++ compiler and ninja, to register a device guard for CUDA that does nothing")
    from torch.utils import cpp_extension

    cpp_extension.load("subspan_fake_cuda", [str(Path(__file__).with_name("guard.cpp"))], is_python_module=False)
