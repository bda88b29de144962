"""Moments in 8 bits against bitsandbytes' own optimizer and functions."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from helpers import feed, gradients, parameter

from subspan import SubspaceAdamW, SubspaceOptimizer, create, quantization
from subspan.residuals import Discard
from subspan.rules import RULES, SGD
from subspan.selectors import Dominant

SHAPE = (80, 70)  # 5,600 entries: 21 blocks of 256 and one of 224


def numbers(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [4096, 5600, 4097])
def test_codes_are_bitsandbytes(signed, size):
    """Blocks of 256, the dynamic map, signed or not; the last block may be short."""
    A = numbers(size) if signed else numbers(size).square()
    packed = quantization.pack({"m": A.clone()}, {"m": signed})
    codes, rest = quantize_blockwise(A, code=create_dynamic_map(signed=signed), blocksize=256)
    assert torch.equal(packed["m.codes"], codes)
    assert torch.equal(packed["m.absmax"], rest.absmax)
    assert packed["m.absmax"].shape == (-(-size // 256),)
    back = quantization.unpack(packed, {"m": signed}, torch.float32)["m"]
    expected = dequantize_blockwise(codes, absmax=rest.absmax, code=create_dynamic_map(signed=signed), blocksize=256)
    assert torch.equal(back, expected)
    blocks = [back[i : i + 256] - A[i : i + 256] for i in range(0, size, 256)]
    limits = [A[i : i + 256].abs().max() for i in range(0, size, 256)]
    # The map's widest gap is between 0.9922 and 1 times the largest: an error of 1 part in 64 covers every code.
    assert all(error.abs().max() <= limit / 64 for error, limit in zip(blocks, limits, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parity_with_bitsandbytes_adam(weight_decay):
    """Forty steps of full-rank ``adamw_8bit`` against bitsandbytes' AdamW8bit on the same gradients.

    A code may differ where the two round differently, so the bound is on the distance between them, against that from
    exact Adam.
    """
    grads = gradients(SHAPE, 40, dtype=torch.float32)
    a, b, c = (parameter(SHAPE, dtype=torch.float32) for _ in range(3))
    settings = {"lr": 1e-2, "weight_decay": weight_decay}
    ours = create("adamw_8bit", torch.nn.ParameterDict({"w": a}), **settings)
    mine = feed(ours, a, grads)
    theirs = feed(bitsandbytes.optim.AdamW8bit([b], **settings), b, grads)
    exact = feed(torch.optim.AdamW([c], **settings), c, grads)
    assert "exp_avg.codes" in ours.state[a]
    between, from_exact = (mine - theirs).norm(), (theirs - exact).norm()
    assert from_exact > 0
    assert between < 1e-3 * from_exact


def test_small_moments_stay_fp32():
    """Below 4,096 entries nothing is gained."""
    big, small = parameter((64, 64), dtype=torch.float32), parameter((63, 65), dtype=torch.float32)
    optimizer = SubspaceAdamW([big, small], state_dtype="int8")
    assert set(optimizer.state[big]) == {"step", "exp_avg.codes", "exp_avg.absmax", "exp_avg_sq.codes", "exp_avg_sq.absmax"}
    assert set(optimizer.state[small]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[big]["exp_avg.codes"].dtype == torch.uint8
    assert optimizer.state[big]["exp_avg.codes"].shape == big.shape


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["keep", "rotate", "moments", "reset"])
def test_every_rule_and_transfer(rule, how):
    """Sixty steps over refreshes stay near the run with exact moments, and the tensors of the state are never replaced."""
    grads = gradients((300, 40), 60, dtype=torch.float32)
    runs = []
    for state_dtype in ("float32", "int8"):
        p = parameter((300, 40), dtype=torch.float32)
        settings = {"rank": 16, "update_proj_gap": 25, "transfer": how, "scale": 1.0, "state_dtype": state_dtype}
        optimizer = SubspaceOptimizer([p], 1e-3, selector=Dominant(), rule=RULES[rule](), residual=Discard(), **settings)
        held = {key: value for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
        moved = feed(optimizer, p, grads) - parameter((300, 40), dtype=torch.float32).detach()
        assert all(optimizer.state[p][key] is value for key, value in held.items())
        assert any(key.endswith(".codes") for key in held) == (state_dtype == "int8")
        runs.append(moved)
    exact, rounded = runs
    assert (rounded - exact).norm() < (0.5 if rule == "lion" else 0.1) * exact.norm()


def test_a_rule_without_moments_is_refused():
    with pytest.raises(ValueError, match=r"state_dtype='int8': SGD\(momentum=0.0.*keeps no moments; use 'float32'"):
        SubspaceOptimizer(
            [parameter(SHAPE)], 0.1, 4, selector=Dominant(), rule=SGD(0.0), residual=Discard(), state_dtype="int8"
        )


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'subspan\[8bit\]'"):
        SubspaceAdamW([parameter(SHAPE)], state_dtype="int8")
