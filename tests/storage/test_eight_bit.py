"""Moments in 8 bits against a nearest neighbour in fp64, and against bitsandbytes where that is installed."""

import pytest
import torch
from support.helpers import FullSizeMeter, NoSync, feed, gradients, parameter

from subspan import SubspaceAdamW, SubspaceOptimizer, create, state_bytes
from subspan.costs.state_costs import StateCosts
from subspan.residuals import Discard
from subspan.rules import RULES, SGD
from subspan.selectors import Dominant
from subspan.storage import eight_bit
from subspan.storage.eight_bit import SMALLEST, dynamic_map

SHAPE = (20, 512)  # bitsandbytes' blocks of 256 run on into the next row, unless rows end with them
EPS = torch.finfo(torch.float32).eps

signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def numbers(shape, signed=True, seed=0):
    """Numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(shape, generator=generator) * 10 ** (-8 * torch.rand(shape, generator=generator))
    return A if signed else A.square()


def stored(A, signed, smallest=1):
    """The codes, the largest magnitudes, and what comes back."""
    packed = eight_bit.pack({"m": A}, {"m": signed}, smallest)
    return packed["m.codes"], packed["m.absmax"], eight_bit.unpack(packed, {"m": signed}, torch.float32)["m"]


def nearest(quotients, signed):
    """The number of the nearest value, the lower one of two, by comparison with all in fp64. Without a sign only zero
    becomes zero.
    """
    numbers = (quotients.double()[..., None] - dynamic_map(signed).double()).abs().argmin(-1)
    return numbers if signed else numbers.maximum((quotients > 0).long())


@signs
@pytest.mark.parametrize("width", [1, 8, 64, 100, 256, 300, 512])
def test_the_nearest_value(signed, width):
    """In blocks of 256 entries of a row, the last of which may be short: what comes back is off by at most half of the
    gap between the values around an entry, and no other value is nearer.
    """
    A = numbers((40, width), signed)
    codes, absmax, back = stored(A, signed)
    assert (codes.shape, absmax.shape) == (A.shape, (40, -(-width // 256)))
    values = dynamic_map(signed).double()
    for column, block in enumerate(A.split(256, dim=1)):
        own = slice(256 * column, 256 * column + block.shape[1])
        assert torch.equal(absmax[:, column], block.abs().amax(1))
        largest = absmax[:, column, None].double()
        quotients = block.double() / largest
        got, best = values[codes[:, own].int()], values[nearest(quotients, signed)]
        slack = EPS * quotients.abs().maximum(got.abs())
        assert ((got - quotients).abs() <= (best - quotients).abs() + slack).all()
        above = torch.searchsorted(values, quotients).clamp(1, 255)
        half = (values[above] - values[above - 1]) / 2
        half[(values[above - 1] == 0) & (not signed)] *= 2  # below the smallest value, which is taken for all
        error = (back[:, own].double() - block.double()).abs() / largest
        assert (error <= half + 2 * slack).all()


@signs
def test_every_bound(signed):
    """At, just below and just above the middle of two neighbours, and at each value, the code is the nearest one's; in
    the very middle it is the lower one's.
    """
    values = dynamic_map(signed)
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    near = [middles, middles.nextafter(values[1:]), middles.nextafter(values[:-1]), values]
    rows = torch.stack([torch.cat([values.new_ones(1), x[:255]]) for x in near])  # 1 leaves the others as they are
    codes, absmax, back = stored(rows, signed)
    assert (absmax == 1).all()
    assert torch.equal(codes.long(), nearest(rows, signed))
    assert torch.equal(back, values[codes.int()])
    exact = middles.double() * 2 == values[1:].double() + values[:-1].double()
    exact &= torch.tensor(signed) | (values[:-1] != 0)
    assert exact.sum() > 100
    assert torch.equal(codes[0, 1:].long()[exact], torch.arange(255)[exact])


@signs
def test_zero_stays_zero(signed):
    """An entry of zero beside large ones, and a block of zeros; and numbers whose inverse overflows come back."""
    A = numbers((16, 512), signed)
    A[:, ::3], A[4, :256], A[5] = 0, 0, 0
    A[6] = torch.linspace(0, 1e-40, 512)
    codes, absmax, back = stored(A, signed)
    assert (back[A == 0] == 0).all()
    assert (codes[A == 0] == dynamic_map(signed).tolist().index(0)).all()
    assert (absmax[5] == 0).all()
    torch.testing.assert_close(back[6], A[6], rtol=0, atol=1e-42)
    assert torch.equal(stored(back, signed)[0], codes)


def test_a_weight_without_gradient_does_not_move():
    """Three hundred steps leave the weights of dead inputs where they were."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64, bias=False)
    before = layer.weight.detach().clone()
    optimizer = create("adamw_8bit", layer, lr=1e-3)
    for _ in range(300):
        layer.weight.grad = torch.randn(64, 256)
        layer.weight.grad[:, 128:] = 0
        optimizer.step()
    assert torch.equal(layer.weight[:, 128:], before[:, 128:])
    assert not torch.isclose(layer.weight[:, :128], before[:, :128]).any()


@pytest.mark.parametrize("small", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("then", ["goes on", "ends"])
def test_small_gradients_beside_large_ones(small, then):
    """An entry of which a first moment is kept has a second one, too: no step is much longer than one of exact Adam."""
    longest = {}
    for name in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 64, bias=False)
        optimizer = create(name, layer, lr=1.0)
        layer.weight.data.zero_()
        steps = []
        for t in range(100):
            G = torch.randn(64, 256) * 1e-3
            G[:, 128:] *= small if t < 50 or then == "goes on" else 0
            before = layer.weight.detach().clone()
            layer.weight.grad = G
            optimizer.step()
            steps.append((layer.weight.detach() - before)[:, 128:].abs().max().item())
        longest[name] = max(steps)
    assert longest["adamw_8bit"] < 2 * longest["adamw"]


@signs
def test_the_map_is_that_of_bitsandbytes(signed):
    """Every bit of the 256 values, and of what is made of codes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    code = functional.create_dynamic_map(signed=signed)
    assert torch.equal(dynamic_map(signed), code)
    A = numbers(SHAPE, signed)
    codes, absmax, back = stored(A, signed)
    theirs = functional.dequantize_blockwise(codes, absmax=absmax.flatten(), code=code, blocksize=256)
    assert torch.equal(back, theirs)


@pytest.mark.parametrize("width", [100, 300])
def test_rows_in_any_division(monkeypatch, width):
    """Rows that are quantised apart are those of the whole: they can be spread over ranks, which may have none, and
    taken in any number at a time.
    """
    A = numbers((130, width))
    whole = eight_bit.pack({"m": A}, {"m": True}, SMALLEST)
    for count in (43, 1, 130):
        parts = [eight_bit.pack({"m": part}, {"m": True}, SMALLEST, length=130) for part in [*A.split(count), A[:0]]]
        monkeypatch.setattr(eight_bit, "CHUNK", count * width)
        chunked = eight_bit.pack({"m": A}, {"m": True}, SMALLEST)
        for key in whole:
            assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))
            assert torch.equal(whole[key], chunked[key])


def test_a_stack_is_its_matrices():
    A = numbers((3, 20, 300))
    for index, got in enumerate(zip(*stored(A, True), strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(got, stored(A[index], True), strict=True))


def test_no_full_size_temporary(monkeypatch):
    """To store a moment takes no temporary of its size, and to open it none besides the copy; neither waits."""
    A = numbers((4096, 300))
    monkeypatch.setattr(eight_bit, "CHUNK", 2**16)
    packed = eight_bit.pack({"m": A}, {"m": True}, SMALLEST)
    with NoSync(), FullSizeMeter(A.numel()) as meter:
        eight_bit.store_(packed, {"m": A}, {"m": True})
    assert meter.peak == 0
    with NoSync(), FullSizeMeter(A.numel()) as meter:
        back = eight_bit.unpack(packed, {"m": True}, torch.float32)["m"]
    assert meter.peak == 1
    assert back.shape == A.shape


def _nearest_by_bitsandbytes(A, code, absmax_out, out, blocksize):
    """Their slow kernel, which takes the nearest value as the one for CUDA does; the CPU's takes it only for fp64. Of a
    second moment only zero becomes zero.
    """
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(A.double(), code, blocksize)
    out.copy_(codes if code[0] < 0 else codes.maximum((A > 0).byte()))
    absmax_out.copy_(absmax)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parity_with_bitsandbytes_adam(monkeypatch, weight_decay):
    """Each of forty steps of full-rank ``adamw_8bit`` is that of bitsandbytes' AdamW8bit from the same weight and
    moments.

    Where the two round a moment differently in fp32 its code may be the neighbour's, so that each step starts from the
    state of ours.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct", _nearest_by_bitsandbytes)
    a, b, c = (parameter(SHAPE, dtype=torch.float32) for _ in range(3))
    settings = {"lr": 1e-2, "weight_decay": weight_decay}
    ours = create("adamw_8bit", torch.nn.ParameterDict({"w": a}), **settings)
    theirs = bitsandbytes.optim.AdamW8bit([b], **settings)
    exact, apart = torch.optim.AdamW([c], **settings), 0
    for G in gradients(SHAPE, 40, dtype=torch.float32):
        torch.testing.assert_close(feed(ours, a, [G]), feed(theirs, b, [G]), rtol=1e-6, atol=1e-8)
        feed(exact, c, [G])
        b.data.copy_(a)
        for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
            codes, absmax = (ours.state[a][f"{name}.{kind}"] for kind in ("codes", "absmax"))
            other, their_absmax = theirs.state[b][f"state{number}"], theirs.state[b][f"absmax{number}"]
            torch.testing.assert_close(absmax.flatten(), their_absmax, rtol=1e-6, atol=0)
            difference = (codes.int() - other.view(SHAPE).int()).abs()
            assert difference.max() <= 1
            apart += int(difference.sum())
            other.copy_(codes.view_as(other))
            their_absmax.copy_(absmax.flatten())
    assert apart <= 1e-5 * 80 * a.numel()
    assert (a - c).norm() > 1e-3 * c.norm()  # the moments have been rounded


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
