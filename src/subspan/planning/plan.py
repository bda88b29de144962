"""The plan: bytes by kind, the peak of a step, whether it fits, and the largest batch and rank that fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from subspan.groups import RankPattern
from subspan.planning.depth import FEW, extended, peak_of, shortened, with_blocks
from subspan.planning.model import LARGER, Planned, choose, shapes_of
from subspan.planning.passes import Passes
from subspan.planning.setting import PlanSetting
from subspan.planning.tasks import parameters_of
from subspan.recipes import find
from subspan.training.models.presets import PRESETS
from subspan.utils.ranks import Rank, rank_of_side

ALWAYS = ("weights", "carriers", "states", "bases", "buffers", "communication")
"""The kinds of bytes that are there all the time."""
_MOST_SEQUENCES = 2**20


@dataclass(frozen=True)
class Costs:
    """The bytes of one rank.

    Attributes:
        bytes: bytes by kind.
        backward: the most that is alive in a forward and backward pass.
        step: the most that is alive in the step of the optimizer.
    """

    bytes: dict[str, int]
    backward: int
    step: int

    @property
    def total(self) -> int:
        """The peak."""
        return max(self.backward, self.step)


def plan(setting: PlanSetting) -> dict[str, Any]:
    """Plan a setting.

    Raises:
        SettingError: a model, method or rank is unknown or out of range, or they do not go together.
        InputError: the model cannot be read, built or run.
    """
    return Planner(setting).report()


class Planner:
    """Plans one setting, and others that differ only in rank and batch.

    Args:
        setting: what is planned.
        passes: what was found for settings that differ only in the optimizer. Results are added to it.
    """

    def __init__(self, setting: PlanSetting, passes: dict[Any, int] | None = None) -> None:
        self.setting = setting
        chosen = choose(setting)
        self.rank, self.seq, self._config = chosen.rank, chosen.seq, chosen.config
        pattern = RankPattern(setting.rank_pattern)
        model = shapes_of(setting, self._config)
        self.blocks = shortened(self._config, model, pattern)
        self.parameters = parameters_of(model, self._config)
        self._passes = {} if passes is None else passes
        self._at: dict[Rank, _AtRank] = {}

    def at(self, rank: Rank) -> "_AtRank":
        """The setting at a rank: everything that does not depend on the batch."""
        if rank not in self._at:
            self._at[rank] = _AtRank(self.setting, self._config, rank, self.seq, self.blocks)
        return self._at[rank]

    def costs(self, rank: Rank, batch: int) -> Costs:
        """The bytes of the first rank of the world."""
        setting, planned = self.setting, self.at(rank)
        peak = self._once(("peak", batch, rank), lambda: planned.peak(batch))
        held = {
            kind: planned.counts[kind] for kind in ("weights", "carriers", "gradients", "states", "bases", "buffers")
        }
        sending = 0
        if setting.world > 1:
            sending = planned.gathered if setting.sharded else held["gradients"]  # ddp's buckets
        in_backward = setting.step_in_backward and setting.accumulate == 1
        gradients = 0 if in_backward else held["gradients"]
        there = sum(value for kind, value in held.items() if kind != "gradients") + sending
        # Backward-side layers choose their bases in the backward pass, whose peak includes that.
        stepping, refresh = planned.counts["step"], planned.counts["refresh"]
        if not setting.is_backward_side:
            stepping = max(stepping, refresh)
        backward = there + peak + (0 if setting.keeps_gradients else gradients) + stepping * setting.step_in_backward
        found = held | {"gradients": gradients, "refresh_peak": refresh, "communication": sending}
        return Costs(found, backward, there + gradients + stepping)

    def saved(self, rank: Rank, batch: int) -> int:
        """Bytes that autograd keeps for the backward pass of an ordinary step."""
        return self._once(("saved", batch, rank), lambda: self.at(rank).saved(batch))

    def _once(self, what: tuple[str, int, Rank], count: Callable[[], int]) -> int:
        setting = self.setting
        # Where gradients are the backward pass's own, methods and ranks do not differ in it.
        kind = (setting.optimizer, what[2]) if setting.is_backward_side else ()
        key = (*what[:2], *kind, setting.keeps_gradients)
        if key not in self._passes:
            self._passes[key] = count()
        return self._passes[key]

    def largest_batch(self, budget: int) -> int:
        """The most sequences in a forward pass that fit; 0 if not even one does."""
        return largest(lambda batch: self.costs(self.rank, batch).total, budget, self.setting.batch, _MOST_SEQUENCES)

    def largest_rank(self, budget: int) -> int | None:
        """The largest whole number that fits as rank and projects something; 0 if none fits.

        It is ``None`` for a full-rank method, and where every matrix gets its rank by name.
        """
        sides = self.at(self.rank).sides
        if not sides:
            return None
        top = min(sides) if self.setting.is_backward_side else max(sides)
        start = min(rank_of_side(self.rank, top), top)
        return largest(lambda rank: self.costs(rank, self.setting.batch).total, budget, start, top)

    def report(self) -> dict[str, Any]:
        """The plan as ``subspan plan --json`` prints it."""
        setting = self.setting
        costs = self.costs(self.rank, setting.batch)
        budget = setting.budget
        full_rank = find(setting.optimizer).selector is None
        return {
            "model": setting.model,
            "optimizer": setting.optimizer,
            "rank": None if full_rank else self.rank,
            "rank_pattern": None if full_rank else setting.rank_pattern,
            "ranks": self.at(self.rank).ranks,
            "sketches": self.at(self.rank).sketches,
            "backward_side": setting.is_backward_side,
            "share": setting.share if setting.is_backward_side else None,
            "dtype": setting.dtype,
            "batch": setting.batch,
            "seq": self.seq,
            "parameters": self.parameters,
            "accumulate": setting.accumulate,
            "checkpointing": setting.checkpointing,
            "step_in_backward": setting.step_in_backward,
            "per_rank": {"world": setting.world, "parallel": setting.parallel if setting.world > 1 else None},
            "bytes": costs.bytes | {"activations": self.saved(self.rank, setting.batch), "total": costs.total},
            "peaks": {"backward": costs.backward, "step": costs.step},
            "gpu_bytes": budget,
            "fits": None if budget is None else costs.total <= budget,
            "largest_batch": None if budget is None else self.largest_batch(budget),
            "largest_rank": None if budget is None else self.largest_rank(budget),
            "notes": self.notes(),
            "assumptions": self.assumptions(),
        }

    def notes(self) -> list[str]:
        """Remarks on what became of the ranks, and on a sketch."""
        found = self.at(self.rank)
        total, active = (self.parameters[key] for key in ("total", "active"))
        experts = [f"{active:,} of {total:,} parameters are active for one token"] if active < total else []
        full, matrices = (found.counts[key] for key in ("full", "matrices"))
        remarks = [*experts, *([] if found.divided is None else [found.divided])]
        if found.sketches:
            remarks.append(self._of_sketches(found.sketches))
        if not full:
            return remarks
        rest = "none is left: this is full-rank training" if full == matrices else f"{matrices - full} are projected"
        which = f"rank {self.rank}" + (", or one of rank_pattern," if self.setting.rank_pattern else "")
        return [
            *remarks,
            f"{which} is no smaller than a side of {full} of {matrices} matrices, which are trained full rank; {rest}",
        ]

    def _of_sketches(self, found: Mapping[str, int]) -> str:
        """What a sketch makes wider, and what it leaves as it is."""
        widths = ", ".join(f"{widths} for {count} matrices" for widths, count in found.items())
        kept = "The backward pass keeps h = x [Q O], which is r + s wide. " if self.setting.is_backward_side else ""
        return (
            f"r + s = {widths}: a sketch of s directions stands beside each basis of r. {kept}R and T come and go with "
            "each gradient, and neither T nor O is state"
        )

    def assumptions(self) -> list[str]:
        """The assumptions under the figures, and what the figures leave out."""
        setting = self.setting
        found = [
            "not counted: the CUDA context, workspaces of cuBLAS and cuSOLVER (also that of an eigendecomposition), "
            "NCCL's buffers, and what the allocator loses to fragments; leave room",
            "attention by a fused kernel, which keeps no scores; the loss as in subspan pretrain, from all logits, in fp32",
            "the peak is that of a step which chooses the basis that takes most memory, in fp32",
        ]
        if setting.model in PRESETS or setting.model in LARGER:
            found.append(f"a vocabulary of {self._config.vocab_size:,} tokens")
        if self.blocks:
            found.append(
                f"{self.blocks} blocks that are alike: {FEW} are run, and each of the others adds what one of those adds"
            )
        if setting.dtype == "bf16-mixed":
            found.append("autocast as on a CPU, whose list of operations in fp32 differs a little from CUDA's")
        if find(setting.optimizer).name == "adamw" and setting.state != "8bit":
            found.append("torch's AdamW steps on all parameters at once (foreach), as it does by default on CUDA")
        if setting.checkpointing:
            found.append("activations: the inputs of the blocks, and all that one block saves when it is run again")
        if setting.world > 1 and not setting.sharded:
            found.append("ddp: its buckets hold a copy of all gradients")
        if setting.sharded:
            found.append(
                "fsdp: an upper bound; gathered are the weights of two blocks and of what is outside of blocks; "
                "whole are the gradients of one block and of what is outside, with a copy of the block's to send; "
                "projected matrices step as if they were whole"
            )
        if setting.accumulate > 1:
            found.append("gradients of earlier passes are still there in later ones")
        if setting.step_in_backward:
            found.append(
                "steps in the backward pass: an upper bound, the largest step while most activations are alive"
            )
            if setting.accumulate > 1:
                found.append("all gradients are there, as in a step that chooses all bases")
        return found


class _AtRank:
    """A setting at one rank or share, from all blocks of its model or from a few of them."""

    def __init__(self, setting: PlanSetting, config: Any, rank: Rank, seq: int, blocks: int | None) -> None:
        self._blocks, self._seq = blocks, seq
        depths = [None] if blocks is None else [FEW, FEW - 1]
        self._planned = [Planned(setting, config if n is None else with_blocks(config, n), rank) for n in depths]
        counts = [one.counts() for one in self._planned]
        self.counts = counts[0] if blocks is None else extended(counts[0], counts[1], blocks)
        self.sides = self._planned[0].sides
        self.ranks = {key: self.counts[key] for key in self.counts if key.isdecimal()}
        self.sketches = {key: self.counts[key] for key in self.counts if " + " in key}
        handle = self._planned[0].handle
        self.divided = None if handle is None else handle.divided
        self._made: dict[int, Passes] = {}

    def _passes(self, number: int = 0) -> Passes:
        if number not in self._made:
            self._made[number] = Passes(self._planned[number], self._seq)
        return self._made[number]

    @property
    def gathered(self) -> int:
        """Bytes that ``fully_shard`` has of other ranks' parts."""
        return self._passes().gathered()

    def saved(self, batch: int) -> int:
        """Bytes that autograd keeps."""
        found = [{"saved": self._passes(number).saved(batch)} for number in range(len(self._planned))]
        return found[0]["saved"] if self._blocks is None else extended(found[0], found[1], self._blocks)["saved"]

    def peak(self, batch: int) -> int:
        """The bytes that the passes add at their peak."""
        passes = self._passes()
        if self._blocks is None:
            return max(max(segments) for segments in passes.peaks(batch))
        return max(peak_of(segments, passes.of_a_block(), self._blocks) for segments in passes.peaks(batch))


def largest(total: Callable[[int], int], budget: int, start: int, top: int) -> int:
    """The largest number from 1 to ``top`` with ``total <= budget``; 0 if there is none.

    ``total`` grows, nearly along straight lines. They say where it is evaluated next. Where they mislead, halving says
    it.
    """
    known = {start: total(start)}
    if known[start] > budget and start > 1:
        known[1] = total(1)
    moved = ""
    while True:
        low = max((x for x, size in known.items() if size <= budget), default=0)
        high = min((x for x, size in known.items() if size > budget), default=top + 1)
        if high - low <= 1 or low == 0:
            return low
        if high not in known:
            guess = min(2 * low, top)
        elif len(moved) > 2 and len(set(moved[-2:])) == 1:
            guess = (low + high) // 2
        else:
            guess = low + (budget - known[low]) * (high - low) // (known[high] - known[low])
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = total(guess)
        moved += "l" if known[guess] <= budget else "h"
