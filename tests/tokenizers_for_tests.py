"""Small tokenizers and chat templates, built in code, whose tokens can be worked out by hand."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!+=-_<>|/()'\n"
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def merging_bpe() -> PreTrainedTokenizerFast:
    """Characters, merged without regard to words: `b c -> bc`, `: space -> ": "`, `newline newline`."""
    pieces = [*LETTERS, "bc", ": ", "\n\n", "bcd"]
    merges = [("b", "c"), (":", " "), ("\n", "\n"), ("bc", "d")]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.decoder = decoders.Fuse()
    return _wrap(backend)


def byte_bpe(
    *, bos: bool = False, ends_text: bool = False, eos: bool = True, pad: str = "</s>", template: str | None = None
) -> PreTrainedTokenizerFast:
    """Bytes, words split as in GPT-2, merged into ` 7`, `hi`, ` hi`; padding is EOS unless told otherwise."""
    merges = [("Ġ", "7"), ("h", "i"), ("Ġ", "hi"), ("Ċ", "Ċ")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend, bos=bos, ends_text=ends_text, eos=eos, pad=pad, template=template)


def prefix_space(scheme: str = "always", *, bos: bool = False, strip: bool = False) -> PreTrainedTokenizerFast:
    """A unigram model that starts a text with a space, as SentencePiece does; `▁7` and `▁Q` are pieces."""
    pieces = [("<unk>", 0.0), *((letter, -5.0) for letter in LETTERS if letter != " "), ("▁", -4.0)]
    pieces += [("▁7", -3.0), ("▁Q", -3.0), ("hi", -3.0), ("▁hi", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if strip:
        backend.normalizer = normalizers.Strip()
    return _wrap(backend, bos=bos)


def llama_like() -> PreTrainedTokenizerFast:
    """SentencePiece as Llama has it: BOS, a space before each stretch of text, one taken off in decoding, bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [letter for letter in LETTERS if letter not in " \n_"]
    pieces = ["<unk>", *SPECIAL[:2], *bytes_, *letters, "▁", "hi", "▁hi", "▁7"]
    merges = [("h", "i"), ("▁", "hi"), ("▁", "7")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _wrap(backend, bos=True)


def whole_words() -> PreTrainedTokenizerFast:
    """Words between white space, `foo`, `bar` and `foobar`; there is no way to write the end of a word."""
    words = {word: i for i, word in enumerate(["<unk>", "foo", "bar", "foobar"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(backend)


def _wrap(
    backend: Tokenizer,
    *,
    bos: bool = False,
    ends_text: bool = False,
    eos: bool = True,
    pad: str = "</s>",
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([*SPECIAL, *([pad] if pad not in SPECIAL else [])])
    if bos or ends_text:
        frame = [*(["<s>"] if bos else []), "$A", *(["</s>"] if ends_text else [])]
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=" ".join(frame), special_tokens=ids)
    names = {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, **names)
    wrapped.chat_template = template
    return wrapped


HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    + HEADER
)

# The same text, the assistant's turns marked; the second leaves the end token outside, the third the header inside.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + HEADER
)
MARKED_SHORT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + HEADER
)
MARKED_LONG = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + HEADER
)
# Marks that never come to be: the condition is never true.
MARKED_NEVER = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% if m['role'] == 'nobody' %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}" + HEADER
)
# Marks that hold nothing, one for each turn.
MARKED_EMPTY = MARKED_SHORT.replace(
    "{% generation %}{{ m['content'] }}{% endgeneration %}", "{% generation %}{% endgeneration %}{{ m['content'] }}"
)
# Begins differently when it asks for an answer.
TWO_FACED = "{{ 'a' if add_generation_prompt else 'b' }}" + MARKED

# Thinking is kept behind the last user's turn and stripped before it.
THINK = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}" + HEADER
)
THINK_MARKED = THINK.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ text + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ text + '<|im_end|>\n' }}{% endif %}",
)
# The generation prompt opens a thought, which the turn then holds as well.
OPENED = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
OPENED_MARKED = MARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# The generation prompt opens a thought; thoughts are stripped from every turn, the last one included.
THINK_OPENED = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# The same strip without the opened thought: the prompt is a beginning of the whole, and the thought is lost.
THINK_LOST = THINK_OPENED.replace("<think>\n", "")

SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML

PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHOUTED = PLAIN.replace("m['content']", "m['content'] | upper")  # rewrites what was said, beyond white space
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user comes first') }}{% endif %}" + CHATML
# Rewrites white space, and ends a turn with no token of its own.
TIDY = PLAIN.replace("m['content']", "(m['content'].split() | join(' '))")
# Writes more between the header and the answer than the generation prompt says: within the turn, or before its mark.
SPACED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MARKED_LATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ 'ok ' }}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + HEADER
)
# The header of a later turn is not what its generation prompt says.
REMINDED = CHATML.replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + ('' if messages | length < 3 else '!')"
)
# Reads every field of a message, as templates that write JSON do.
FIELDS = CHATML.replace("m['content']", "m['content'] + (m.keys() | list | length - 2) * '!'")
