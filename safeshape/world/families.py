"""Shapes, tokenizers and chat templates of the world's models: three families and one guard."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCABULARY = 1024

_LLAMA = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_GUARD = (
    "{{ '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nCheck the last message.\n\n' }}"
    "{% for m in messages %}{{ ('User: ' if m['role'] == 'user' else 'Agent: ') + m['content'] + '\n\n' }}{% endfor %}"
    "{{ 'Reply safe or unsafe.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture with its tokenizer and chat template. `metaspace`: sentencepiece-like instead of byte-level."""

    name: str
    config: type[PreTrainedConfig]
    chat_template: str
    specials: tuple[str, ...]
    eos: str
    pad: str
    metaspace: bool = False
    extra: tuple[tuple[str, object], ...] = ()


_LLAMA_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES: dict[str, Family] = {
    "llama": Family(
        name="llama",
        config=LlamaConfig,
        chat_template=_LLAMA,
        specials=_LLAMA_SPECIALS,
        eos="<|eot_id|>",
        pad="<|end_of_text|>",
    ),
    "qwen3": Family(
        name="qwen3",
        config=Qwen3Config,
        chat_template=_CHATML,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        extra=(("head_dim", 32),),
    ),
    "phi3": Family(
        name="phi3",
        config=Phi3Config,
        chat_template=_PHI3,
        specials=("<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"),
        eos="<|end|>",
        pad="<|endoftext|>",
        metaspace=True,
    ),
}
GUARD = Family(
    name="guard",
    config=LlamaConfig,
    chat_template=_GUARD,
    specials=_LLAMA_SPECIALS,
    eos="<|eot_id|>",
    pad="<|end_of_text|>",
)


def train_tokenizer(family: Family, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's kind, trained on the world's text with the library's BPE trainer."""
    specials = list(family.specials)
    if family.metaspace:
        bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        bpe.normalizer = normalizers.Replace(" ", "\u2581")
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\u2581", "merged_with_next"), pre_tokenizers.Punctuation()]
        )
        bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials + alphabet, show_progress=False)
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=family.eos,
        pad_token=family.pad,
        extra_special_tokens=specials,
        model_max_length=int(_SHAPE["max_position_embeddings"]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = family.chat_template
    return tokenizer


def model_config(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The family's configuration at the world's size, about one million parameters."""
    return AutoConfig.for_model(
        family.config.model_type,
        **_SHAPE,
        **dict(family.extra),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
