"""Moments in 8 bits against bitsandbytes' own optimizer and functions."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from support.helpers import feed, gradients, parameter

from subspan import SubspaceAdamW, SubspaceOptimizer, create, state_bytes
from subspan.costs.state_costs import StateCosts
from subspan.residuals import Discard
from subspan.rules import RULES, SGD
from subspan.selectors import Dominant
from subspan.storage import eight_bit as quantization
from subspan.storage.eight_bit import SMALLEST

SHAPE = (20, 512)  # bitsandbytes' blocks of 256 run on into the next row, unless rows end with them


def numbers(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(16, 256), (9, 512), (64, 64), (60, 100), (14, 300), (600, 8)], ids=str)
def test_codes_are_bitsandbytes(signed, shape):
    """Each row in blocks of 256, the dynamic map, signed or not; the last block of a row may be short."""
    A = numbers(shape) if signed else numbers(shape).square()
    packed = quantization.pack({"m": A.clone()}, {"m": signed}, SMALLEST)
    back = quantization.unpack(packed, {"m": signed}, torch.float32)["m"]
    assert packed["m.codes"].shape == back.shape == shape
    assert packed["m.absmax"].shape == (shape[0], -(-shape[1] // 256))
    code = create_dynamic_map(signed=signed)
    for i, row in enumerate(A):
        for j, block in enumerate(row.split(256)):
            codes, rest = quantize_blockwise(block.contiguous(), code=code, blocksize=256)
            own = slice(256 * j, 256 * j + len(block))
            assert torch.equal(packed["m.codes"][i, own], codes)
            assert torch.equal(packed["m.absmax"][i, j], rest.absmax[0])
            expected = dequantize_blockwise(codes, absmax=rest.absmax, code=code, blocksize=256)
            assert torch.equal(back[i, own], expected)
            # The map's widest gap is between 0.9922 and 1 times the largest: an error of 1 part in 64 covers every
            # code.
            assert (expected - block).abs().max() <= block.abs().max() / 64


def test_rows_in_any_division():
    """Rows that are quantised apart are those of the whole: they can be spread over ranks."""
    A = numbers((130, 100))
    whole = quantization.pack({"m": A}, {"m": True}, SMALLEST)
    parts = [quantization.pack({"m": part}, {"m": True}, SMALLEST, length=130) for part in A.split(43)]
    for key in whole:
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))


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
    """Below 4,096 entries nothing is gained; vectors have no rows."""
    big, small, vector = (parameter(shape, dtype=torch.float32) for shape in ((64, 64), (63, 65), (5000,)))
    optimizer = SubspaceAdamW([big, small, vector], state_dtype="int8")
    assert set(optimizer.state[big]) == {
        "step",
        "exp_avg.codes",
        "exp_avg.absmax",
        "exp_avg_sq.codes",
        "exp_avg_sq.absmax",
    }
    assert set(optimizer.state[small]) == set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[big]["exp_avg.codes"].dtype == torch.uint8
    assert optimizer.state[big]["exp_avg.codes"].shape == big.shape


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["keep", "rotate", "moments", "reset"])
def test_every_rule_and_transfer(rule, how):
    """Sixty steps over refreshes stay near the run with exact moments, and the tensors of the state are never
    replaced.
    """
    grads = gradients((300, 40), 60, dtype=torch.float32)
    runs = []
    for state_dtype in ("float32", "int8"):
        p = parameter((300, 40), dtype=torch.float32)
        settings = {"rank": 16, "update_proj_gap": 25, "transfer": how, "scale": 1.0, "state_dtype": state_dtype}
        optimizer = SubspaceOptimizer(
            [p], 1e-3, selector=Dominant(), rule=RULES[rule](), residual=Discard(), **settings
        )
        held = {key: value for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
        moved = feed(optimizer, p, grads) - parameter((300, 40), dtype=torch.float32).detach()
        assert all(optimizer.state[p][key] is value for key, value in held.items())
        assert any(key.endswith(".codes") for key in held) == (state_dtype == "int8")
        runs.append(moved)
    exact, rounded = runs
    assert (rounded - exact).norm() < (0.5 if rule == "lion" else 0.1) * exact.norm()


def test_how_small_is_a_setting():
    p = parameter((20, 30), dtype=torch.float32)
    for smallest, packed in ((600, True), (601, False)):
        optimizer = SubspaceAdamW([p], state_dtype="int8", min_8bit_size=smallest)
        assert ("exp_avg.codes" in optimizer.state[p]) == packed
        costs = StateCosts(None, RULES["adamw"](), Discard(), "int8")
        assert costs.bytes_held(optimizer.param_groups)["states"] == state_bytes(optimizer)
    with pytest.raises(ValueError, match=r"min_8bit_size=0: expected a whole number of entries >= 1"):
        SubspaceAdamW([p], min_8bit_size=0)


def test_a_rule_without_moments_is_refused():
    with pytest.raises(ValueError, match=r"state_dtype='int8': SGD\(momentum=0.0.*keeps no moments; use 'float32'"):
        SubspaceOptimizer(
            [parameter(SHAPE)], 0.1, 4, selector=Dominant(), rule=SGD(0.0), residual=Discard(), state_dtype="int8"
        )


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'subspan\[8bit\]'"):
        SubspaceAdamW([parameter(SHAPE)], state_dtype="int8")
