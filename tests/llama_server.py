"""A real OpenAI-compatible server for a tiny Llama-shaped model: llama.cpp (from xllamacpp) in a process of its own."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

NAME = "tiny-guard"
SERVE = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = sys.argv[1], {sys.argv[2]}
params.n_parallel, params.n_ctx, params.port, params.warmup, params.fit_params = 4, int(sys.argv[3]), 0, False, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the test is over
"""


def write_gguf(folder: Path, path: Path) -> None:
    """A Llama-shaped model with a byte-level BPE tokenizer as a GGUF file in float32."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    core = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    _add_vocabulary(writer, core, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "q_proj" in name:
            tensor = _interleaved(tensor, config["num_attention_heads"])
        if "k_proj" in name:
            tensor = _interleaved(tensor, config["num_key_value_heads"])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer, core, config) -> None:
    import gguf

    tokens = [f"[UNUSED{number}]" for number in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, number in core["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in core["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in core["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _interleaved(weight, heads):
    """llama.cpp rotates neighbouring channels, transformers the two halves of a head."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@contextlib.contextmanager
def llama_server(folder: Path, scratch: Path, *, context: int = 4096) -> Iterator[str]:
    """The address of a running server of the model in `folder`. `context`: tokens that its four slots share."""
    write_gguf(folder, scratch / "model.gguf")
    with (scratch / "server.log").open("w") as log:
        command = [sys.executable, "-c", SERVE, str(scratch / "model.gguf"), NAME, str(context)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            try:
                address = next((line.strip() for line in process.stdout if line.startswith("http")), None)
                assert address, (scratch / "server.log").read_text()
                yield address
            finally:
                process.kill()
