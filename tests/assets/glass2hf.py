#!/usr/bin/env python3
"""Converts the weights inside the `glassllm` package to a Hugging Face LlamaForCausalLM folder.

    glass2hf.py WEIGHTS_DIR en|pt OUT

glassllm is a decoder with RMSNorm, RoPE, grouped-query attention and SwiGLU, thus a small Llama. Two things differ
from the Hugging Face layout: matrices are stored `[in, out]`, and RoPE turns neighbouring features (2i, 2i+1) where
Hugging Face turns feature i with i + head_dim/2, so the rows of the query and key projections change places.
"""
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>"]
SPACE = "▁"

# Hugging Face name within a layer -> (glassllm name within a block, whether it is a matrix to transpose).
LAYER_TENSORS = {
    "input_layernorm": ("norm1.gamma", False),
    "self_attn.q_proj": ("attn.W_Q", True),
    "self_attn.k_proj": ("attn.W_K", True),
    "self_attn.v_proj": ("attn.W_V", True),
    "self_attn.o_proj": ("attn.W_O", True),
    "post_attention_layernorm": ("norm2.gamma", False),
    "mlp.gate_proj": ("ffn.W1", True),
    "mlp.up_proj": ("ffn.W3", True),
    "mlp.down_proj": ("ffn.W2", True),
}


def split_rotary_halves(weight, heads):
    """Reorders the rows of a `[heads * head_dim, hidden]` projection from neighbouring to split RoPE pairs."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def tensors(weights, config):
    """All tensors under their Hugging Face names, as float32."""
    named = {"model.embed_tokens.weight": weights["E"], "model.norm.weight": weights["norm_f.gamma"]}
    heads = {"self_attn.q_proj": config["n_heads"], "self_attn.k_proj": config["n_kv_heads"]}
    for layer in range(config["n_layers"]):
        for name, (source, is_matrix) in LAYER_TENSORS.items():
            value = weights[f"blocks.{layer}.{source}"]
            value = value.T if is_matrix else value
            if name in heads:
                value = split_rotary_halves(value, heads[name])
            named[f"model.layers.{layer}.{name}.weight"] = value
    return {name: np.ascontiguousarray(value.astype(np.float32)) for name, value in named.items()}


def model_config(weights, config, vocab_size):
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": config["d_model"],
        "intermediate_size": weights["blocks.0.ffn.W1"].shape[1],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"],
        "head_dim": config["d_model"] // config["n_heads"],
        "max_position_embeddings": config["max_len"],
        "rms_norm_eps": config["eps"],
        "rope_theta": config["rope_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": config["init_std"],
        "torch_dtype": "float32",
        "pad_token_id": SPECIALS.index("<pad>"),
        "bos_token_id": SPECIALS.index("<bos>"),
        "eos_token_id": SPECIALS.index("<eos>"),
    }


def tokenizer(source):
    """Character-level byte-pair encoding in which merges cross neither newlines nor word starts."""
    merges = [tuple(pair) for pair in source["merges"]]
    vocab = SPECIALS + source["alphabet"] + [left + right for left, right in merges]
    ids = {token: i for i, token in enumerate(vocab)}
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+"), "isolated")
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return made


def tokenizer_config(config):
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "model_max_length": config["max_len"],
        "clean_up_tokenization_spaces": False,
    }


def main():
    source, language, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    weights = np.load(source / f"{language}.npz")
    config = json.loads(str(weights["__config__"]))
    made = tokenizer(json.loads((source / f"{language}.tokenizer.json").read_text(encoding="utf-8")))
    named = tensors(weights, config)

    save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    made.save(str(out / "tokenizer.json"))
    for name, content in (("config.json", model_config(weights, config, made.get_vocab_size())),
                          ("tokenizer_config.json", tokenizer_config(config))):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: {sum(value.size for value in named.values()):,} parameters")


if __name__ == "__main__":
    main()
