"""Tiny guards of every kind in the table: the architecture, the special tokens and the shape of the chat template of
the real one, with random weights and short neutral texts of our own."""

import torch
from conftest import byte_bpe, sentencepiece_bpe
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM

ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
_AGENT = "{{ 'User: ' if m['role'] == 'user' else 'Agent: ' }}"
_LLAMA_GUARD = (
    ALTERNATE + "{{ '<|begin_of_text|>HEAD_USER\n\nTask: check the agent.\n\n<BEGIN CONVERSATION>\n\n' }}"
    "{% for m in messages %}TURN{{ '\n\n' }}{% endfor %}"
    "{{ '<END CONVERSATION>\n\nJudge the last message:EOT_HEAD_ASSISTANT\n\n' }}"
)


def _llama_guard(turn, left, right, eot):
    text = _LLAMA_GUARD.replace("TURN", turn).replace("EOT_", eot)
    for role in ("user", "assistant"):
        text = text.replace(f"HEAD_{role.upper()}", f"{left}{role}{right}")
    return text


_PARTS = _AGENT + "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] | trim }}{% endfor %}"
_TEXT = _AGENT + "{{ m['content'] | trim }}"
_OLD, _NEW = (
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ("<|header_start|>", "<|header_end|>", "<|eot|>"),
)
ROLE = "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
TEMPLATES = {
    "llama-guard-3": _llama_guard(_TEXT, *_OLD),
    "llama-guard-3-1b": _llama_guard(_PARTS, *_OLD),
    "llama-guard-4": _llama_guard(_PARTS, *_NEW),
    "granite-guardian-3": (
        "{{ '<|start_of_role|>user<|end_of_role|>Help judge the last message.\n\n' }}"
        "{% for m in messages %}{{ m['role'] | capitalize + ' Message: ' + m['content'] + '\n\n' }}{% endfor %}"
        "{{ 'Risk: ' + guardian_config['risk_name'] + '. Answer Yes or No.<|end_of_text|>\n' }}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    "granite-guardian-3.3": (
        "{% for m in messages %}" + ROLE + "{% endfor %}"
        "{{ '<|start_of_role|>judge_protocol<|end_of_role|>### Criteria: ' + guardian_config['criteria_id'] }}"
        "{{ '<|end_of_text|>\n<|start_of_role|>judge' + ('{think}' if think else '{no_think}') + '<|end_of_role|>' }}"
    ),
    "granite-guardian-4.1": (
        "{% for m in messages %}" + ROLE + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    "shieldgemma": (
        "{{ '<bos>Help judge the response.\n\n<start_of_turn>\nHuman Question: ' + messages[0]['content'] | trim }}"
        "{{ '\n<end_of_turn>\n\n' + guideline + '\n\n<start_of_turn>\nChatbot Response: ' }}"
        "{{ messages[1]['content'] | trim + '\n<end_of_turn>\n\nAnswer Yes or No.\n' }}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "qwen3guard-gen": (
        "{{ '<|im_start|>user\nTask: check the last message.\n\n<BEGIN CONVERSATION>\n' }}"
        "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{{ '<END CONVERSATION>\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
    ),
}
SPECIALS = {
    "llama-guard-3": ["<|begin_of_text|>", *_OLD],
    "llama-guard-3-1b": ["<|begin_of_text|>", *_OLD],
    "llama-guard-4": ["<|begin_of_text|>", *_NEW],
    "granite-guardian-3": ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
    "granite-guardian-3.3": ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
    "granite-guardian-4.1": ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
    "shieldgemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "wildguard": ["<s>"],
    "qwen3guard-gen": ["<think>", "</think>"],
    "gpt-oss-safeguard": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>"],
}
WORDS = {
    "world": ["safe", "unsafe"],
    "llama-guard-3": ["safe", "unsafe", "\n\n", "\n\n\n\n"],
    "llama-guard-3-1b": ["safe", "unsafe", "\n\n", "\n\n\n\n"],
    "llama-guard-4": ["safe", "unsafe", "\n\n", "\n\n\n\n"],
    "granite-guardian-3": ["Yes", "No"],
    "granite-guardian-3.3": [" yes", " no"],
    "granite-guardian-4.1": [" yes", " no"],
    "shieldgemma": ["Yes", "No"],
    "wildguard": ["yes", "no"],
    "qwen3guard-gen": [" Safe", " Unsafe", " Cont"],
    "gpt-oss-safeguard": [],
}
KINDS = {
    "world": "llama",
    "llama-guard-3": "llama",
    "llama-guard-3-1b": "llama",
    "llama-guard-4": "llama4_text",
    "granite-guardian-3": "granite",
    "granite-guardian-3.3": "granite",
    "granite-guardian-4.1": "granite",
    "shieldgemma": "gemma2",
    "wildguard": "mistral",
    "qwen3guard-gen": "qwen3",
    "gpt-oss-safeguard": "gpt_oss",
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHAPES = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "qwen3": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "sliding_window": 32, **_MOE},
    "llama4_text": {"head_dim": 8, "moe_layers": [], "intermediate_size_mlp": 64, "attention_chunk_size": 64},
}


def guard_tokenizer(name):
    """A tokenizer with the special tokens, label tokens and chat template of the named guard."""
    tokenizer = sentencepiece_bpe() if name == "wildguard" else byte_bpe()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS.get(name, ())])
    # Normalized, a word is a token together with the metaspace before it, as in Mistral's vocabulary.
    tokenizer.add_tokens([AddedToken(word, normalized=name == "wildguard") for word in WORDS[name]])
    tokenizer.chat_template = TEMPLATES.get(name, TEMPLATES["granite-guardian-4.1"] if name == "world" else None)
    return tokenizer


def guard_model(name, *, seed=0):
    """A random model with the architecture of the named guard, 2 layers and 32 channels."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        KINDS[name],
        vocab_size=640,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        **SHAPES.get(KINDS[name], {}),
    )
    return AutoModelForCausalLM.from_config(config).eval()
