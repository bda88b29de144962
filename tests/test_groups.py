"""Which parameter is projected, and on which side."""

import copy
import re
from collections import OrderedDict

import pytest
import torch
from support.helpers import RANK, SHAPES, net, oriented_side
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import subspan
from subspan import SubspaceAdamW, create, param_groups
from subspan.step.layout import layout_of
from subspan.utils.errors import SettingError

LINEAR = [
    f"self_attn.{name}_proj" for name in "qkvo"
] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]  # fmt: skip


@pytest.fixture(scope="module")
def template():
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    )


@pytest.fixture
def llama(template):
    return copy.deepcopy(template)


def by_rank(groups):
    """Names of the parameters that are projected, and of the others."""
    projected, full = [], []
    for group in groups:
        (full if group["rank"] is None else projected).extend(name for name, _ in group["params"])
    return projected, full


def layers(*names):
    return [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in names]


class Block(nn.Module):
    """Names that resemble the excluded ones, and some that are excluded."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(50, 16)
        self.wte = nn.Embedding(50, 16)
        self.positions = nn.Embedding(50, 16)
        self.headroom = nn.Linear(16, 24)
        self.outputs = nn.Linear(24, 16)
        self.multihead = nn.Linear(16, 16, bias=False)
        self.conv = nn.Conv2d(3, 16, 3)
        self.rms_norm = nn.LayerNorm(16)
        self.score = nn.Linear(16, 8)
        self.head = nn.Linear(16, 50)


# --- the side ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
def test_projection_side(shape, proj_type):
    """In galore_torch's words std compresses the shorter side, reverse_std the longer, a square counts as tall."""
    assert layout_of(shape, RANK, proj_type).side == oriented_side(shape, proj_type)


@pytest.mark.parametrize(("word", "same"), [("short", "std"), ("long", "reverse_std")])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain_words(shape, word, same):
    """The words short and long are other names of std and reverse_std."""
    assert layout_of(shape, RANK, word) == layout_of(shape, RANK, same)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((48,), 4),
        ((), 4),
        ((5, 8, 6), 6),
        ((16, 1, 3), 2),
        ((48, 20), None),
        ((48, 20), 20),
        ((20, 48), 20),
        ((32, 32), 40),
    ],
)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
def test_full_rank(shape, rank, proj_type):
    """Vectors, groups without a rank, and ranks that reach the shorter side are full rank, whatever the side."""
    assert layout_of(shape, rank, proj_type).side is None


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("proj_type", "kept"), [("std", max), ("reverse_std", min)])
def test_the_moments_keep_the_other_side(shape, proj_type, kept):
    """With std moments are max(m, n) x r, with reverse_std min(m, n) x r, and the basis is for the side that is
    compressed.
    """
    p = nn.Parameter(torch.zeros(shape))
    state = SubspaceAdamW([p], rank=RANK, proj_type=proj_type).state[p]
    assert state["exp_avg"].shape == (kept(shape), RANK)
    assert state["basis"].shape == (sum(shape) - kept(shape), RANK)


# --- the split --------------------------------------------------------------------------------------------------------


def test_llama(llama):
    """Exactly the seven linear weights of each layer of a Llama are projected."""
    projected, full = by_rank(param_groups(llama, rank=RANK))
    assert sorted(projected) == sorted(layers(*LINEAR))
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(full)


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp"], r".*self_attn\.[qk]_proj"])
def test_every_trainable_parameter_is_in_one_group(llama, as_module, targets):
    """The groups partition the trainable parameters; frozen ones are left out; vectors come last."""
    llama.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    llama.model.norm.weight.requires_grad_(False)
    groups = param_groups(llama if as_module else llama.named_parameters(), rank=RANK, targets=targets)
    given = [pair for group in groups for pair in group["params"]]
    trainable = {name: p for name, p in llama.named_parameters() if p.requires_grad}
    assert len(given) == len(trainable)
    assert all(trainable[name] is p for name, p in given)
    assert [group["rank"] for group in groups] == [RANK, None, None]
    assert all(p.ndim == 1 for _, p in groups[-1]["params"])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "down_proj"], layers("self_attn.q_proj", "mlp.down_proj")),
        (["layers.1.mlp"], layers(*LINEAR[4:])[3:]),
        (r".*\.[qk]_proj", layers("self_attn.q_proj", "self_attn.k_proj")),
        (r"model\.layers\.0\.mlp\.up_proj", layers("mlp.up_proj")[:1]),
        (["lm_head"], ["lm_head.weight"]),
        (r".*embed_tokens.*", ["model.embed_tokens.weight"]),
    ],
)
def test_targets(llama, targets, expected):
    """A list selects names that contain a string, an expression whole module names; both win over the exclusions."""
    projected, _ = by_rank(param_groups(llama, rank=RANK, targets=targets))
    assert projected == expected


def test_exclude(llama):
    """Names in which an excluded pattern is found stay full rank."""
    projected, _ = by_rank(param_groups(llama, rank=RANK, exclude=(r"lm_head", r"layers\.0\.", r"mlp")))
    assert projected == layers(*LINEAR[:4])[4:]


def test_of_a_module_only_linear_weights():
    """Embeddings, convolutions, heads and norms are full rank; names that merely resemble them are projected."""
    projected, full = by_rank(param_groups(Block(), rank=RANK))
    assert projected == ["headroom.weight", "outputs.weight", "multihead.weight"]
    assert {
        "positions.weight",
        "conv.weight",
        "head.weight",
        "score.weight",
        "rms_norm.weight",
        "headroom.bias",
    } <= set(full)


def test_a_bare_linear_layer():
    """A model that is one linear layer has its weight projected."""
    projected, full = by_rank(param_groups(nn.Linear(16, 16), rank=RANK))
    assert (projected, full) == (["weight"], ["bias"])


def test_tied_embeddings():
    """A head tied to the embedding is one parameter: full rank, once."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=64,
            tie_word_embeddings=True,
        )
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    groups = param_groups(model, rank=RANK)
    holders = [group for group in groups for _, p in group["params"] if p is model.lm_head.weight]
    assert [group["rank"] for group in holders] == [None]
    assert len(by_rank(groups)[0]) == 7


def test_a_head_tied_to_an_embedding_of_any_name():
    """A tied head stays full rank when the names tell nothing: the matrix is an embedding's."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(16, 50, bias=False)
            self.tokens = nn.Embedding(50, 16)
            self.out.weight = self.tokens.weight
            self.fc = nn.Linear(16, 16)

    assert by_rank(param_groups(Tied(), rank=RANK))[0] == ["fc.weight"]


def test_overrides(llama):
    """Settings by expression, the first match wins; they reach the optimizer."""
    overrides = {r"layers\.0.*k_proj": {"rank": 2, "scale": 1.0}, r"k_proj": {"rank": 8}, r"lm_head": {"lr": 0.5}}
    groups = param_groups(llama, rank=RANK, overrides=overrides)
    optimizer = SubspaceAdamW(groups, lr=0.1)
    first, second = (layer.self_attn.k_proj.weight for layer in llama.model.layers)
    assert optimizer.state[first]["basis"].shape[1] == 2
    assert optimizer.state[second]["basis"].shape[1] == 8
    assert optimizer.state[llama.model.layers[0].self_attn.q_proj.weight]["basis"].shape[1] == RANK
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert (of[id(first)]["scale"], of[id(second)]["scale"]) == (1.0, 0.25)
    assert (of[id(llama.lm_head.weight)]["lr"], of[id(llama.model.embed_tokens.weight)]["lr"]) == (0.5, 0.1)
    assert len(of) == len(list(llama.parameters()))


def test_an_override_of_the_rank_leaves_vectors_alone():
    """An expression that names a layer also meets its bias, which has no rank; its other settings hold for both."""
    model = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "k_proj": nn.Linear(16, 16)})
    optimizer = SubspaceAdamW(param_groups(model, rank=RANK, overrides={"k_proj": {"rank": 2, "lr": 0.5}}), lr=0.1)
    assert optimizer.state[model["k_proj"].weight]["basis"].shape == (16, 2)
    assert optimizer.state[model["k_proj"].bias]["exp_avg"].shape == (16,)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert [of[id(p)]["lr"] for p in model.parameters()] == [0.1, 0.1, 0.5, 0.5]


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["q_porj"]},
        {"targets": ["q_proj", "q_porj"]},
        {"targets": "self_attn.q_porj"},
        {"overrides": {"q_porj": {"rank": 2}}},
    ],
)
def test_a_pattern_that_matches_nothing(llama, as_module, settings):
    """It is an error that shows the pattern and names near it (contract R13)."""
    with pytest.raises(ValueError, match=r"q_porj' matches no .*the names look like 'model.layers.\d"):
        param_groups(llama if as_module else llama.named_parameters(), rank=RANK, **settings)


def test_the_names_an_error_shows_can_be_used(llama):
    """What the message offers instead of a wrong expression is itself a target that matches."""
    with pytest.raises(ValueError, match="the names look like") as error:
        param_groups(llama, rank=RANK, targets="self_attn.q_porj")
    shown = re.findall(r"'(model[^']*)'", str(error.value))
    assert shown
    for name in shown:
        assert len(by_rank(param_groups(llama, rank=RANK, targets=name))[0]) == 1


def test_nothing_to_project():
    """Without a matrix all-linear names fully_shard, with matrices of other layers only it names targets, and it says
    so where all is frozen.
    """
    with pytest.raises(ValueError, match="fully_shard"):
        param_groups([("flat_param", nn.Parameter(torch.zeros(100)))], rank=RANK)
    for module in (nn.Embedding(10, 4), nn.LSTM(8, 8)):
        with pytest.raises(ValueError, match=r"no weight of an nn\.Linear is left .* Name others with targets"):
            param_groups(module, rank=RANK)
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(4, 4).requires_grad_(False), rank=RANK)


def test_without_a_rank(llama):
    """With ``rank=None`` nothing is projected, and no target is needed."""
    assert by_rank(param_groups(llama, rank=None))[0] == []


def test_vectors_may_go_without_decay(llama):
    """A weight decay given here is that of matrices; parameters of one dimension get none; create does so."""
    assert not any("weight_decay" in group for group in param_groups(llama, rank=RANK))
    groups = param_groups(llama, rank=RANK, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert all(p.ndim == 1 for _, p in groups[-1]["params"])
    decayed = create("sara_adamw", llama, rank=RANK, weight_decay=0.1)
    assert [group["weight_decay"] for group in decayed.param_groups] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize(
    ("name", "projected"),
    [("tok_emb.weight", False), ("emb.weight", False), ("word_embeddings.weight", False), ("wte.weight", False),
     ("lm_head.weight", False), ("ensemble.fc.weight", True), ("attn.multihead.weight", True)],
)  # fmt: skip
def test_names_that_stay_full_rank(name, projected):
    """Embeddings and heads are known by the start of a word in their name, not by letters inside one."""
    named = [("fc.weight", nn.Parameter(torch.zeros(16, 16))), (name, nn.Parameter(torch.zeros(16, 16)))]
    assert (name in by_rank(param_groups(named, rank=RANK))[0]) == projected


def test_one_expression_to_exclude():
    """A string is one expression, not a list of letters."""
    model = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), block=nn.Linear(8, 8)))
    assert by_rank(param_groups(model, rank=RANK, exclude="block"))[0] == ["fc.weight"]


def test_names_under_wrappers():
    """The wrapper of ``torch.compile`` leaves no trace in names. A head called output stays full rank in any module,
    and a block's output.dense does not.
    """

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output = torch.nn.Linear(24, 40)
            self.layer = torch.nn.ModuleDict({"output": torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 24)})})

    outer = torch.nn.Module()
    outer.llama = Inner()
    projected = [group for group in param_groups(outer, rank=4) if group["rank"]]
    assert [name for group in projected for name, _ in group["params"]] == ["llama.layer.output.dense.weight"]
    named = [(f"_orig_mod.{name}", p) for name, p in outer.named_parameters()]
    names = {name for group in param_groups(named, rank=4) for name, _ in group["params"]}
    assert names == {name for name, _ in outer.named_parameters()}


def test_flat_parameters_are_refused_beside_matrices():
    """Also with targets of one's own."""
    named = [
        ("a.weight", torch.nn.Parameter(torch.zeros(20, 30))),
        ("_flat_param", torch.nn.Parameter(torch.zeros(600))),
    ]
    for targets in ("all-linear", ["a"]):
        with pytest.raises(ValueError, match=r"'_flat_param' is many weights in one.*fully_shard"):
            param_groups(named, rank=4, targets=targets)


def test_overrides_are_settings():
    with pytest.raises(ValueError, match=r"overrides\['up'\]=5: expected group settings"):
        param_groups(net(), rank=4, overrides={"up": 5})
    with pytest.raises(ValueError, match="'lrr' is no setting; did you mean"):
        subspan.create("adamw", net(), overrides={"up": {"lrr": 5}})


def test_an_override_gives_a_filter_of_one_dimension_a_rank():
    """It is flattened to (out, in * width), not taken for a stack of matrices."""
    model = nn.Sequential(nn.Conv1d(64, 48, 3), nn.Linear(64, 64))
    optimizer = subspan.create("galore_adamw", model, rank=8, overrides={r"^0\.": {"rank": 8}})
    assert optimizer.state[model[0].weight]["basis"].shape == (48, 8)


def test_an_override_behind_another_is_named():
    with pytest.raises(ValueError, match=r"'0.weight' comes after '0', which matches '0.weight' first; put it before"):
        param_groups(nn.Sequential(nn.Linear(8, 8)), rank=4, overrides={"0": {"rank": 2}, "0.weight": {"rank": 3}})


def test_full_rank_has_a_second_rate() -> None:
    """``lr_full`` moves the same parameters at full rank as beside a subspace: all that ``targets`` does not name."""
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "linear": nn.Linear(4, 4), "head": nn.Linear(4, 8)})
    rates = {
        name: {p_name: group.get("lr") for group in create(name, model, lr=0.1, rank=2, lr_full=0.4).param_groups
               for p_name in group.get("param_names", ())}
        for name in ("adamw", "adamw_8bit", "galore_adamw")
    }  # fmt: skip
    assert rates["adamw"] == {
        "linear.weight": 0.1, "embed.weight": 0.4, "head.weight": 0.4, "linear.bias": 0.4, "head.bias": 0.4
    }  # fmt: skip
    assert rates["adamw"] == rates["adamw_8bit"] == rates["galore_adamw"]


def test_a_list_has_parts_of_names_or_expressions(llama):
    """As transformers documents it; a part of a name is looked for first."""
    model = llama
    for targets in (["q_proj"], [r".*\.q_proj"], [r".*attn\.q_proj\.weight"]):
        names, _ = by_rank(param_groups(model, rank=2, targets=targets))
        assert len(names) == 2
        assert all("q_proj" in name for name in names)
    with pytest.raises(SettingError, match=r"targets: '.*\(' is no regular expression"):
        param_groups(model, rank=2, targets=["q_proj", "nothing("])


def test_frozen_matrices_are_named_as_the_reason():
    """Quantised layers are frozen; nobody is sent to another way of sharding for that."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        layer.weight.requires_grad_(False)
    with pytest.raises(SettingError, match=r"every matrix is frozen.*requires_grad_\(True\)$"):
        param_groups(model, rank=2)
    for layer in model:
        layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    quantised = "Weights in int8 are quantised: load the model without quantisation"
    with pytest.raises(SettingError, match=rf"every matrix is frozen.*{quantised}"):
        param_groups(model, rank=2)
    for layer in model:
        layer.bias.requires_grad_(False)
    with pytest.raises(SettingError, match=rf"no trainable parameter.*{quantised}"):
        param_groups(model, rank=2)


def test_adapters_are_left_out_on_purpose():
    """What ``peft_config`` leaves trainable is LoRA's; with names they are projected all the same."""
    model = nn.Module()
    model.base, model.lora_A, model.lora_B = (
        nn.Linear(16, 16),
        nn.Linear(16, 4, bias=False),
        nn.Linear(4, 16, bias=False),
    )
    model.base.requires_grad_(False)
    with pytest.raises(
        SettingError, match=r"'lora_'\) are excluded on purpose.*without peft_config.*targets=\['lora_'\]"
    ):
        param_groups(model, rank=2)
    assert [group["rank"] for group in param_groups(model, rank=2, targets=["lora_"])] == [2]
