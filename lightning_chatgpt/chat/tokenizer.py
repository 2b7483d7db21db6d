"""Load, train, store and restore a tokenizer, with the chat template it carries and the control tokens that needs."""

from __future__ import annotations

import codecs
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightning_chatgpt.chat.jinja import TOKEN_IN_TEMPLATE, read_template, template_of
from lightning_chatgpt.chat.template import CHATML_JINJA, END_TOKEN, PLAIN_JINJA, START_TOKEN
from lightning_chatgpt.chat.template_check import check_template
from lightning_chatgpt.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

_PIECE_CHARS = 1 << 14
# Of GPT-2's words, only those that are all white space have white space after their first character.
_BETWEEN_WORDS = re.compile(r"(?<=\S)[ \n]")


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, template: str | None = None, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, as GPT-2's, on texts.

    Args:
        texts: What to learn the merges from; read once, one after the other.
        vocab_size: Entries at the most, control tokens and the 256 bytes included; small texts give fewer.
        template: The chat template it is to carry, as :func:`set_template` takes it.
        special_tokens: Control tokens beside the template's: one id each, never found in what a user types.

    Returns: a tokenizer that writes any text without unknown tokens, with the template's control tokens.

    Raises:
        ModelError: ``vocab_size`` leaves no room for the 256 bytes and the control tokens.
        ConfigError: A special token or the template cannot be used.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    control_tokens = list(dict.fromkeys([END_OF_TEXT, *_control_tokens(template)]))
    for token in special_tokens:
        _check_special_token(token, control_tokens)
        control_tokens.append(token)
    smallest = 256 + len(control_tokens)
    if vocab_size < smallest:
        raise ModelError(f"vocab_size {vocab_size} is too small; a byte-level tokenizer needs at least {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(chain.from_iterable(map(cut_text, texts)), trainer=trainer)
    named = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    tokenizer = set_template(_wrap(backend.to_str(), named), template)
    tokenizer.add_special_tokens({"extra_special_tokens": list(special_tokens)}, replace_extra_special_tokens=False)
    return tokenizer


def cut_text(text: str, *, size: int = _PIECE_CHARS) -> Iterator[str]:
    """Cut a long text into pieces that make the same words as GPT-2 cuts it into; a book at once would take gigabytes.

    Args:
        text: Any text.
        size: Characters after which a piece ends between the next two words, or after as many again where there is no white space.

    Returns: the pieces, which joined are the text.
    """
    start = 0
    while len(text) - start > 2 * size:
        found = _BETWEEN_WORDS.search(text, start + size, start + 2 * size)
        end = found.start() if found else start + 2 * size
        yield text[start:end]
        start = end
    yield text[start:]


def _check_special_token(token: str, known: Sequence[str]) -> None:
    from tokenizers import pre_tokenizers

    if not token or token != token.strip():
        what = "begins or ends with white space" if token else "is empty"
        raise ConfigError(f"special_tokens: {token!r} {what}; write it as <|name|>")
    if token in known:
        raise ConfigError(f"special_tokens: {token!r} is there twice, or comes with the template; remove it")
    # Merging the bytes of a word may spell any word, and this one's id would then be a control token's. A character that stands for no
    # byte is never spelt so.
    spelt_by_bytes = set(token) <= set(pre_tokenizers.ByteLevel.alphabet())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(token)
    if spelt_by_bytes and (len(words) == 1 or not token.isascii()):
        raise ConfigError(f"special_tokens: {token!r} could be a word that a user types; write it as <|{token.strip('<|>') or 'name'}|>")


def load_tokenizer(folder: str | Path, *, template: str | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local transformers folder and give it a chat template.

    Args:
        folder: Holds a tokenizer.json.
        template: As :func:`set_template` takes it.

    Raises:
        ModelError: The folder holds no tokenizer that the ``tokenizers`` library backs.
        ConfigError: The template cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(f"{folder}: no tokenizer could be loaded ({first_line}); it needs a tokenizer.json") from None
    if tokenizer.vocab_size < 2:  # transformers makes an empty one of a model's config alone
        raise ModelError(f"{folder}: holds no tokenizer (no tokenizer.json, and no vocab.json with merges.txt); put the model's own there")
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{folder}: the tokenizer has no tokenizer.json; save it again with a fast tokenizer")
    return set_template(tokenizer, template)


def set_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """Give a tokenizer a chat template and the control tokens that it needs, and padding a token; changes ``tokenizer``.

    Args:
        tokenizer: What to change.
        template: ``chatml``, ``plain``, ``tokenizer`` (its own) or a Jinja file. None keeps its own, or takes ChatML where it has
            none.

    Raises:
        ConfigError: There is no such template, or it cannot be trained with.
    """
    if template == "tokenizer" and not tokenizer.chat_template:
        raise ConfigError("data.template is tokenizer, but the tokenizer carries no template; set it to chatml or plain")
    if template not in (None, "tokenizer") or not tokenizer.chat_template:
        tokenizer.chat_template = _jinja(template)
        added = _control_tokens(template)
    elif tokenizer.chat_template == CHATML_JINJA:
        added = _control_tokens("chatml")
    else:
        vocabulary = tokenizer.get_vocab()
        added = [token for token in TOKEN_IN_TEMPLATE.findall(str(tokenizer.chat_template)) if token in vocabulary]
    # special=True: only special tokens are left alone where text is encoded, which keeps what a user types harmless. Said of tokens that
    # are there already too: a control token in the vocabulary is not yet known as one.
    tokenizer.add_special_tokens({"extra_special_tokens": list(dict.fromkeys(added))}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or END_TOKEN
    if tokenizer.chat_template == PLAIN_JINJA and tokenizer.eos_token is None:
        raise ConfigError("data.template plain ends messages with the tokenizer's eos_token, and it has none; set it to chatml")
    warning = check_template(template_of(tokenizer))
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return tokenizer


def check_same_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
    """Refuse a template that is not the one a model was trained with.

    Raises:
        ConfigError: They differ.
    """
    if template not in (None, "tokenizer") and _jinja(template) != template_of(tokenizer).jinja:
        raise ConfigError(f"data.template {template!r} is not the one that this checkpoint was trained with; remove it")


def _jinja(template: str | None) -> str:
    if template in (None, "chatml"):
        return CHATML_JINJA
    assert template is not None
    return PLAIN_JINJA if template == "plain" else read_template(template)


def _control_tokens(template: str | None) -> list[str]:
    """The control tokens that a template cannot do without."""
    if template in (None, "chatml"):
        return [START_TOKEN, END_TOKEN]
    return list(dict.fromkeys(TOKEN_IN_TEMPLATE.findall(_jinja(template)))) if template not in ("plain", "tokenizer") else []


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end a reply: the template's, then the end-of-text token where there is one."""
    ids = [tokenizer.convert_tokens_to_ids(template_of(tokenizer).stop_token), tokenizer.eos_token_id]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> list[int] | None:
    """How many bytes of text each token id stands for; control tokens stand for none.

    Returns: one length for each id, or None where the tokenizer is not byte-level, as the lengths are not known then.
    """
    if not _is_byte_level(tokenizer):
        return None
    special = set(tokenizer.all_special_ids)
    # A byte-level vocabulary spells each byte as one character.
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [0 if i in special or token is None else len(token) for i, token in enumerate(tokens)]


def continuation_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of tokens that begin within a character of several bytes; none where the tokenizer is not byte-level."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if not _is_byte_level(tokenizer):
        return frozenset()
    # In UTF-8 every byte of a character but its first is of the form 10xxxxxx.
    inner = {character for byte, character in bytes_to_unicode().items() if byte & 0xC0 == 0x80}
    special = set(tokenizer.all_special_ids)
    return frozenset(token_id for token, token_id in tokenizer.get_vocab().items() if token[:1] in inner and token_id not in special)


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text of each token; where several make one character, the last has it and the others are empty."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens: Any = tokenizer.convert_ids_to_tokens(list(ids))
    if not _is_byte_level(tokenizer):
        return [str(tokenizer.decode([token_id])) for token_id in ids]
    special = set(tokenizer.all_special_ids)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [
        token if token_id in special else decoder.decode(bytes(byte_of[character] for character in token))
        for token_id, token in zip(ids, tokens, strict=True)
    ]


def _is_byte_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    return (decoder or {}).get("type") == "ByteLevel"


def tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tokenizer as plain data (text only), to stand in a checkpoint."""
    named = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return {
        "tokenizer_json": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": named,
        "chat_template": template_of(tokenizer).jinja,
    }


def tokenizer_from_state(state: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that :func:`tokenizer_state` wrote down."""
    tokenizer = _wrap(state["tokenizer_json"], state["special_tokens"])
    tokenizer.chat_template = state.get("chat_template")
    # What the JSON holds as special is not yet known as such: said again, nothing is added.
    special = [token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if token.special]
    tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    return set_template(tokenizer, None)


def _wrap(tokenizer_json: str, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer_json)
    # Truncation and padding are ours to do; a saved tokenizer may still carry both.
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens)
