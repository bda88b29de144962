"""Tokenizers, all as transformers' fast tokenizers, so that each saves with the model and loads in any other tool."""

import difflib
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from subspan.training.data.embedded import BPE
from subspan.utils.errors import InputError, first_line

_EOS = "<eos>"
_UNUSABLE = (OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError)
"""The errors that transformers raises for a tokenizer that is missing or damaged. Among them are those of a wrong call,
because an entry of its files that is of another type than expected leads to one too.
"""


def load_tokenizer(name: str, *, needs_end: bool = True) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: ``bytes`` (256 and an end of text), ``embedded`` (the corpus's BPE of 4,096), or a Hugging Face path or
            name.
        needs_end: whether it must have an end-of-text token to put between documents.

    Raises:
        InputError: it cannot be loaded, or lacks the token that it must have.
    """
    if name == "bytes":
        return _wrap(_byte_tokenizer())
    if name == "embedded":
        return _wrap(Tokenizer.from_file(str(BPE)))
    near = difflib.get_close_matches(name, ["bytes", "embedded"], n=1, cutoff=0.75)
    if near and not Path(name).exists():
        raise InputError(f"tokenizer {name!r} is unknown; did you mean {near[0]}?")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        if (
            not isinstance(error, _UNUSABLE) and type(error) is not Exception
        ):  # the Rust of tokenizers raises a bare one
            raise
        raise InputError(
            f"tokenizer {name!r} cannot be loaded: {first_line(error)}; "
            "give 'bytes', 'embedded', or the directory of a saved tokenizer"
        ) from error
    if needs_end and tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name!r} has no end-of-text token to put between documents; set eos_token in its config"
        )
    tokenizer.model_max_length = 10**12  # documents are cut into sequences later: its warning would mislead
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text that differs whenever two tokenizers would write different tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encoding = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return f"{tokenizer.eos_token_id} {encoding}"


def _byte_tokenizer() -> Tokenizer:
    # Bytes 0 to 255 in order, each under the printable stand-in that byte-level tokenizers use for it.
    stand_in = {token: byte for byte, token in enumerate(_byte_stand_ins())}
    tokenizer = Tokenizer(models.BPE(vocab=stand_in, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_EOS])
    return tokenizer


def _byte_stand_ins() -> list[str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS, clean_up_tokenization_spaces=False)
