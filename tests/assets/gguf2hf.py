#!/usr/bin/env python3
"""Converts a GGUF file of a Llama with byte-level BPE (SmolLM2) to a Hugging Face LlamaForCausalLM folder.

    gguf2hf.py IN.gguf OUT

Quantised tensors are dequantised to float16: the result is as good as the quantised file, not as its original.
llama.cpp stores the rows of the query and key projections for RoPE over neighbouring features (2i, 2i+1) where
Hugging Face turns feature i with i + head_dim/2, so those rows change places.
"""
import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def split_rotary_halves(weight, heads):
    """Reorders the rows of a `[heads * head_dim, hidden]` projection from neighbouring to split RoPE pairs."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def tensors(reader, heads, kv_heads):
    """All tensors under their Hugging Face names, as float16."""
    named = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if tensor.name in TOP_TENSORS:
            name = TOP_TENSORS[tensor.name]
        else:
            _, layer, stem, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_TENSORS[stem]}.{kind}"
            if stem in ("attn_q", "attn_k"):
                value = split_rotary_halves(value, heads if stem == "attn_q" else kv_heads)
        if not np.isfinite(value).all() or np.abs(value).max() > np.finfo(np.float16).max:
            raise SystemExit(f"{tensor.name}: has values that float16 cannot hold")
        named[name] = np.ascontiguousarray(value.astype(np.float16))
    return named


def model_config(fields, named):
    """The content of config.json."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": named["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in named,
        "initializer_range": 0.02,
        "torch_dtype": "float16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(fields):
    """Byte-level BPE that splits digits, as `tokenizer.ggml.pre` = smollm says."""
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise SystemExit("only the byte-level BPE of SmolLM can be converted")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False)
                             for token, kind in zip(tokens, types) if kind == TokenType.CONTROL])
    return made


def tokenizer_config(fields):
    """The content of tokenizer_config.json."""
    tokens = fields["tokenizer.ggml.tokens"]
    named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
             "unk_token": "unknown_token_id"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}") for name, key in named.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[token_id] for name, token_id in ids.items() if token_id is not None},
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def main():
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise SystemExit(f"{source}: architecture {fields['general.architecture']}, only llama can be converted")
    out.mkdir(parents=True, exist_ok=True)
    named = tensors(reader, fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"])
    save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer(fields).save(str(out / "tokenizer.json"))
    for name, content in (("config.json", model_config(fields, named)), ("tokenizer_config.json", tokenizer_config(fields))):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{out}: {sum(value.size for value in named.values()):,} parameters")


if __name__ == "__main__":
    main()
