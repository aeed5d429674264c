"""A tokenizer with one token per character, for small experiments that must not download anything."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
ALPHABET = ("\n", *map(chr, range(32, 127)))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline; `<s>` opens every text, anything else is `<unk>`.

    The ids never change: 0 to 3 are `<pad>`, `<s>`, `</s>`, `<unk>`, 4 is newline, and the
    printable characters follow in the order of their codes. What `save_pretrained` writes,
    `AutoTokenizer` reads.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *ALPHABET))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
