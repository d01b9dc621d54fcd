"""Tiny models and tokenizers of the kinds that matter, built from seeds; nothing is downloaded."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
# Tiny models gain nothing from more threads, and idle ones spin against whatever else the machine does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Llama's templates: strips every message.
TRIMMING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] | trim) + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3's: the last assistant turn gets an empty thinking block, which the generation prompt does not show.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and the small cat sleeps",
    "one two three four five six seven eight nine ten safe unsafe yes no",
    "a conversation has a user and an assistant; the assistant answers the user",
] * 20


def _wrap(core: Tokenizer, template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer


def byte_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Llama 3 and Qwen."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    return _wrap(core)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and a prepended metaspace, as converted from sentencepiece for Llama 2 and Phi-3."""
    specials = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
    return _wrap(core)


def unigram() -> PreTrainedTokenizerFast:
    """A sentencepiece unigram model with NFKC normalisation, as in Gemma's and T5's ancestors."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=[*SPECIALS, "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return _wrap(core)


def added_tokens() -> PreTrainedTokenizerFast:
    """Byte-level BPE with tokens added after training, some of which swallow blanks beside them."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("fox jumps")])
    return tokenizer


TOKENIZERS = {
    "byte_bpe": byte_bpe,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
    "added_tokens": added_tokens,
}


def tiny_model(kind: str = "llama", *, vocab_size: int = 512, seed: int = 0) -> PreTrainedModel:
    """A random causal model of the named architecture with 2 layers and 32 channels, in float32."""
    torch.manual_seed(seed)
    extra = {"head_dim": 8} if kind in ("qwen3", "gemma3_text") else {}
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
        **extra,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe()


@pytest.fixture(params=sorted(TOKENIZERS))
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A local model folder, as a user would have one."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
