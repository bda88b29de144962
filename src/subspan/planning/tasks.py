"""What a planned model is trained on: text, pairs of texts, images or speech. And which parameters are active."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.utils.errors import InputError

_BY_TASK = (
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
)
"""Classes of transformers and the tables of the models that they know, in the order in which they are asked."""
_TOP = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


def class_of(config: Any) -> Any:
    """Return the class that is planned: the one that the config names, or else the one for the usual task.

    An encoder-decoder predicts its targets, an image model classes, and a model that reads both ways masked words.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    named = (getattr(config, "architectures", None) or [""])[0]
    own = getattr(transformers, named, None)
    if isinstance(own, type) and (named.endswith("LMHeadModel") or not named.endswith("Model")):
        return own
    both = getattr(config, "is_encoder_decoder", False)
    causal = any(getattr(config, key, False) for key in ("is_decoder", "causal"))
    for name, table in _BY_TASK:
        fits = both if "Seq2Seq" in name else not (causal or both) if "Masked" in name else True
        pair = "Image" in name and hasattr(config, "text_config")
        if fits and not pair and config.model_type in getattr(modeling_auto, table):
            return getattr(transformers, name)
    return transformers.AutoModel


def predicts_next(model: Any) -> bool:
    """Tell whether a model is trained as ``subspan pretrain`` trains it: on the next token, without an encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    is_one = any(kind.__name__ in names for kind in type(model).__mro__)
    return is_one and not getattr(model.config, "is_encoder_decoder", False)


def inputs_of(model: Any, batch: int, seq: int) -> dict[str, Any]:
    """Make inputs of the sizes in the config of ``model``."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", None) or config
    found: dict[str, Any] = {}
    main = model.main_input_name
    if main == "input_ids":
        found["input_ids"] = torch.zeros(batch, seq, dtype=torch.long)
    if main == "pixel_values" or ("pixel_values" in takes and hasattr(config, "vision_config")):
        sides = side if isinstance(side := getattr(vision, "image_size", 224), list | tuple) else (side, side)
        found["pixel_values"] = torch.zeros(batch, getattr(vision, "num_channels", 3), *sides)
    if main == "input_features":
        found["input_features"] = torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        found["decoder_input_ids"] = torch.zeros(batch, seq, dtype=torch.long)
    if not found:
        raise InputError(
            f"model {type(model).__name__}: takes {main}, which is not planned; measure a step of it instead"
        )
    if "use_cache" in takes:
        found["use_cache"] = False
    dtype = next(p.dtype for p in model.parameters())
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in found.items()
    }


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The cross-entropy in fp32 of all that the model predicts, or a sum over its states where it predicts nothing."""
    output = model(**inputs)
    for name in ("logits", "logits_per_image"):
        logits = getattr(output, name, None)
        if isinstance(logits, Tensor) and logits.ndim > 1:
            rows = logits.flatten(0, -2).float()
            return cross_entropy(rows, rows.new_zeros(len(rows), dtype=torch.long), reduction="sum")
    return next(value for value in output.values() if isinstance(value, Tensor)).float().sum()


def positions_of_text(config: Any) -> int | None:
    """The number of tokens that the text of a model has positions for, where the model itself does not say."""
    for place in (config, getattr(config, "text_config", None)):
        for name in ("max_target_positions", "max_position_embeddings", "n_positions"):
            if isinstance(found := getattr(place, name, None), int):
                return found
    return None


def patches_of(config: Any) -> int | None:
    """The number of patches of an image, for a model that reads images only."""
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch, int) or hasattr(config, "vocab_size"):
        return None
    return (side // patch) ** 2


def parameters_of(model: nn.Module, config: Any) -> dict[str, int]:
    """Count the parameters, and those that are active for one token: of the experts only as many as it is sent to."""
    places = (config, getattr(config, "text_config", None))
    top = next((n for place in places for name in _TOP if isinstance(n := getattr(place, name, None), int)), None)
    total = active = 0
    numbers: dict[str, set[str]] = {}
    experts: list[tuple[str | None, int, int]] = []
    for name, p in model.named_parameters():
        total += p.numel()
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if "expert" in part and "shared" not in part), None)
        if top is None or place is None or place + 1 >= len(parts):
            active += p.numel()
        elif parts[place + 1].isdecimal():
            before = ".".join(parts[:place])
            numbers.setdefault(before, set()).add(parts[place + 1])
            experts.append((before, 0, p.numel()))
        else:  # a stack, or a bias for each expert
            experts.append((None, p.shape[0], p.numel()))
    for owner, count, size in experts:
        count = count if owner is None else len(numbers[owner])
        active += size * min(top or count, count) // count
    return {"total": total, "active": active}
