#!/usr/bin/env python3
"""Makes the golden values in this folder from implementations that share no code with the trainer.

    python3 -m venv VENV && VENV/bin/pip install -r tests/golden/requirements.txt
    tests/assets/fetch.sh && VENV/bin/python tests/golden/make.py

Made with torch 2.11.0, transformers 5.24.0, numpy 2.2.6, safetensors 0.8.0, tokenizers 0.23.3, peft 0.21.2, pyarrow 26.0.1 and glassllm
0.1.0, on CPU with one thread. What each file holds is in README.md. Run again, it writes the same numbers but for the last bits of
floating-point sums, which depend on the CPU.
"""
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import (BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM,
                          Gemma3TextConfig, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)
from transformers import (GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          LlamaForSequenceClassification, OPTForSequenceClassification)

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent.parent / ".cache" / "assets"
sys.path.insert(0, str(ASSETS / "unpacked"))
from glassllm.model import GlassLM  # noqa: E402
from glassllm.tokenizer import Tokenizer as GlassTokenizer  # noqa: E402

VOCAB, PAD = 97, 0
LENGTHS = (5, 9, 12)
NEW_TOKENS = 8


def write_json(name, content):
    """Indented JSON in which a list of numbers stays on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[-+.,\s\deE]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]).replace("[ ", "[").replace(" ]", "]"), text)
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def close(value, quoted, digits):
    """The value, once it is seen to agree with what the source prints to so many digits after the point."""
    assert abs(value - quoted) <= 0.51 * 10 ** -digits, (value, quoted)
    return value


# --- 1 and 4: glassllm -------------------------------------------------------------------------------------------------

FORWARD_TEXTS = (
    "This movie is",
    "Alice was beginning to get very tired",
    "“Curiouser and curiouser!” cried the Hatter; it’s 10 o’clock.",
)
TOKENIZER_TEXTS = FORWARD_TEXTS + (
    "",
    " leading and  double spaces ",
    "two\nlines\n\nand a gap",
    "It’s not the—worst—film I have seen (in 1999).",
    "straight \"quotes\" and a tab\there",
    "na\u00efve caf\u00e9, nai\u0308ve cafe\u0301, \U0001f600",
    "I REALLY, really, loved [this] one_two {three}!",
)


def make_glassllm():
    """Token ids and logits by the NumPy code inside the glassllm package."""
    weights = ASSETS / "unpacked" / "glassllm" / "weights"
    model, own = GlassLM.load(weights / "en.npz"), GlassTokenizer.load(weights / "en.tokenizer.json")
    folder = ASSETS / "volume" / "models" / "glassllm"
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TOKENIZER_TEXTS:
        assert own.encode(text) == fast.encode(text).ids, text

    ids = [own.encode(text) for text in FORWARD_TEXTS]
    logits = {f"logits.{i}": model.forward(row).data[0].astype(np.float32) for i, row in enumerate(ids)}
    save_file(logits, HERE / "glassllm.safetensors")
    write_json("glassllm.json", {
        "source": "glassllm 0.1.0: its own NumPy forward and tokenizer; tokenizers 0.23.3 gives the same ids",
        "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "forward": [{"text": text, "ids": row, "logits": f"logits.{i}"}
                    for i, (text, row) in enumerate(zip(FORWARD_TEXTS, ids))],
        "tokenization": [{"text": text, "ids": fast.encode(text).ids, "decoded": fast.decode(fast.encode(text).ids)}
                         for text in TOKENIZER_TEXTS],
    })


# --- 2: tiny random models of both families ----------------------------------------------------------------------------

def randomize(model, seed):
    """Draws every parameter anew, so that no bias is zero, no norm is one and attention is far from uniform."""
    torch.manual_seed(seed)
    from_one = "Gemma" in type(model).__name__      # its norms add one to their weights
    for name, parameter in model.named_parameters():
        spread, centre = (0.1, float(name.endswith("weight") and not from_one)) if parameter.dim() == 1 else (0.4, 0.0)
        if from_one and "embed_tokens" in name:
            spread = 0.08       # it is scaled up, and would drown what the blocks add
        parameter.data = torch.randn_like(parameter) * spread + centre
    model.set_attn_implementation("eager")
    return model.eval()


def gpt2_config(width, **more):
    return GPT2Config(vocab_size=VOCAB, n_positions=48, n_embd=width, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
                      attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=PAD, **more)


def llama_config(width, **more):
    return LlamaConfig(vocab_size=VOCAB, max_position_embeddings=48, hidden_size=width, intermediate_size=2 * width,
                       num_hidden_layers=2, num_attention_heads=4, attention_bias=False, bos_token_id=1, eos_token_id=2,
                       pad_token_id=PAD, **more)


def opt_350m_config(width, **more):
    """As opt-350m, which has norms after each residual, and embeddings of another width."""
    return OPTConfig(vocab_size=VOCAB, max_position_embeddings=48, hidden_size=width, word_embed_proj_dim=width // 2,
                     ffn_dim=2 * width, num_hidden_layers=2, num_attention_heads=4, dropout=0.0, do_layer_norm_before=False,
                     bos_token_id=1, eos_token_id=2, pad_token_id=PAD, **more)


def causal_models():
    """Name -> (model, seed, how config.json spells the RoPE base)."""
    untied = llama_config(32, num_key_value_heads=2, rope_theta=5e5, tie_word_embeddings=False, rms_norm_eps=1e-5)
    tied = llama_config(32, num_key_value_heads=4, head_dim=12, rope_theta=1e4, tie_word_embeddings=True, rms_norm_eps=1e-6)
    return {
        "gpt2": (randomize(GPT2LMHeadModel(gpt2_config(32)), 28), 28, None),
        "llama-gqa-untied": (randomize(LlamaForCausalLM(untied), 2), 2, "rope_parameters"),
        "llama-tied-headdim": (randomize(LlamaForCausalLM(tied), 3), 3, "rope_theta"),
    }


def classifiers():
    """Name -> (model, seed, how config.json spells the RoPE base)."""
    llama = llama_config(16, num_key_value_heads=2, rope_theta=5e5, num_labels=1)
    return {
        "gpt2-score": (randomize(GPT2ForSequenceClassification(gpt2_config(16, num_labels=1)), 4), 4, None),
        "opt-350m-score": (randomize(OPTForSequenceClassification(opt_350m_config(16, num_labels=1)), 6), 6, None),
        "llama-score": (randomize(LlamaForSequenceClassification(llama), 5), 5, "rope_parameters"),
    }


def save_model(name, model, rope_style):
    """The model in Hugging Face layout; `rope_theta` spells the config as transformers did before version 5."""
    folder = HERE / "models" / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    if rope_style == "rope_theta":
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def sequences():
    """Token ids of three sequences without special tokens, the same for every model."""
    rng = np.random.default_rng(7)
    return [rng.integers(3, VOCAB, size=length).tolist() for length in LENGTHS]


def padded(rows, side):
    """`[batch, time]` ids and mask, padded on one side."""
    longest = max(map(len, rows))
    fill = [longest - len(row) for row in rows]
    join = (lambda pad, row: pad + row) if side == "left" else (lambda pad, row: row + pad)
    ids = torch.tensor([join([PAD] * n, row) for n, row in zip(fill, rows)])
    mask = torch.tensor([join([0] * n, [1] * len(row)) for n, row in zip(fill, rows)])
    return ids, mask


def run(model, ids, mask):
    """The output with position ids from the mask: how many real tokens stand before."""
    return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - mask).clamp(min=0))


def greedy(model, ids, mask, new_tokens=NEW_TOKENS):
    """So many greedy tokens after each row, and the least gap between the best and second best logit."""
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, eos_token_id=None,
                         output_logits=True, return_dict_in_generate=True)
    top = torch.stack(out.logits).topk(2, dim=-1).values
    return out.sequences[:, ids.shape[1]:].tolist(), float((top[..., 0] - top[..., 1]).min())


def cross_entropy_gradients(model, rows):
    """Mean next-token cross entropy over all rows' targets, and the L2 norm of every parameter's gradient."""
    ids, mask = padded(rows, "right")
    logits = run(model, ids, mask).logits[:, :-1].float()
    valid = mask[:, 1:].bool()
    loss = torch.nn.functional.cross_entropy(logits[valid], ids[:, 1:][valid])
    model.zero_grad()
    loss.backward()
    norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.item(), "gradient_norms": norms}


def causal_case(name, model, rows, tensors, new_tokens=NEW_TOKENS):
    """One causal model's expectations; the big ones go into `tensors`."""
    with torch.no_grad():
        for i, row in enumerate(rows):
            ids, mask = padded([row], "left")
            tensors[f"{name}.alone.{i}"] = run(model, ids, mask).logits[0].numpy()
        for side in ("left", "right"):
            ids, mask = padded(rows, side)
            batch = run(model, ids, mask).logits
            for i, row in enumerate(rows):
                gap = (batch[i][mask[i].bool()] - torch.tensor(tensors[f"{name}.alone.{i}"])).abs().max()
                assert gap < 1e-4, (name, side, float(gap))
            if side == "left":
                tensors[f"{name}.left"] = (batch * mask.unsqueeze(-1)).numpy()
        together, margin = greedy(model, *padded(rows, "left"), new_tokens)
        alone = [greedy(model, *padded([row], "left"), new_tokens)[0][0] for row in rows]
        assert together == alone and margin > 1e-3, (name, margin)
        assert all(len(set(row)) > 3 for row in together), (name, together)
    return {"greedy": together, "greedy_margin": margin, **cross_entropy_gradients(model, rows)}


def classifier_case(model, rows):
    """The score at each row's last token: alone, and as both paddings give it."""
    with torch.no_grad():
        alone = [float(run(model, *padded([row], "left")).logits[0, 0]) for row in rows]
        for side in ("left", "right"):
            both = run(model, *padded(rows, side)).logits[:, 0].tolist()
            assert np.allclose(both, alone, atol=1e-5), (side, both, alone)
    return {"scores": alone}


def make_tiny_models():
    """Writes the models, and what transformers computes with them."""
    rows, tensors = sequences(), {}
    causal, scores = causal_models(), classifiers()
    cases = {name: {"seed": seed, **causal_case(name, model, rows, tensors)} for name, (model, seed, _) in causal.items()}
    scored = {name: {"seed": seed, **classifier_case(model, rows)} for name, (model, seed, _) in scores.items()}
    for name, (model, _, rope_style) in {**causal, **scores}.items():
        save_model(name, model, rope_style)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, HERE / "transformers.safetensors")
    write_json("transformers.json", {
        "source": f"transformers {transformers.__version__} with torch {torch.__version__}, fp32 on CPU, eager attention",
        "ids": rows,
        "pad_token_id": PAD,
        "causal": cases,
        "classifiers": scored,
    })


# --- 2b: further families, and what changes rotary frequencies ----------------------------------------------------------

FAMILY_TOKENS = 20


def families():
    """Name -> (class, config). Windows, contexts and offsets are so short that sequences of a few tokens go beyond them."""
    shape = dict(vocab_size=VOCAB, max_position_embeddings=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    llama = lambda **rope: LlamaConfig(**shape, rope_parameters={"rope_theta": 1e4, **rope})
    return {
        "llama-linear": (LlamaForCausalLM, llama(rope_type="linear", factor=4.0)),
        "llama-dynamic": (LlamaForCausalLM, llama(rope_type="dynamic", factor=2.0)),
        "llama-llama3": (LlamaForCausalLM, llama(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                 original_max_position_embeddings=32)),
        "llama-yarn": (LlamaForCausalLM, llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=12)),
        "mistral": (MistralForCausalLM, MistralConfig(**shape, sliding_window=4, head_dim=8)),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config(**shape, tie_word_embeddings=True)),
        "qwen2-windows": (Qwen2ForCausalLM, Qwen2Config(**shape, use_sliding_window=True, sliding_window=4,
                                                        max_window_layers=1)),
        "gemma2": (Gemma2ForCausalLM, Gemma2Config(**shape, head_dim=12, sliding_window=4, query_pre_attn_scalar=16,
                                                   attn_logit_softcapping=3.0, final_logit_softcapping=1.0)),
        "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(
            **shape, head_dim=12, sliding_window=4, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}})),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**shape, head_dim=12, tie_word_embeddings=False)),
        "opt": (OPTForCausalLM, OPTConfig(vocab_size=VOCAB, max_position_embeddings=48, hidden_size=32, word_embed_proj_dim=32,
                                          ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
                                          bos_token_id=1, eos_token_id=2, pad_token_id=PAD)),
        "opt-350m": (OPTForCausalLM, opt_350m_config(32)),
        "bloom": (BloomForCausalLM, BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=3, bos_token_id=1,
                                                eos_token_id=2, pad_token_id=PAD)),
    }


def family_case(name, make, config, rows):
    """A model of the first seed whose greedy tokens are told apart by more than rounding, and what it computes."""
    for seed in range(1, 200):
        model, tensors = randomize(make(config), seed), {}
        try:
            return model, tensors, {"seed": seed, **causal_case(name, model, rows, tensors, FAMILY_TOKENS)}
        except AssertionError:
            continue
    raise SystemExit(f"no seed for {name}")


def make_families():
    """Writes a model of each, and what transformers computes with it."""
    rows, tensors, cases = sequences(), {}, {}
    for name, (make, config) in families().items():
        model, values, cases[name] = family_case(name, make, config, rows)
        tensors.update(values)
        save_model(name, model, None)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, HERE / "families.safetensors")
    write_json("families.json", {
        "source": f"transformers {transformers.__version__} with torch {torch.__version__}, fp32 on CPU, eager attention",
        "ids": rows, "new_tokens": FAMILY_TOKENS, "causal": cases,
    })


# --- 3: losses and estimators ------------------------------------------------------------------------------------------

def masked_mean(values, mask):
    return sum(v * m for v, m in zip(values, mask)) / sum(mask)


def policy_loss():
    logp, old, mask, eps = [-1.0, -1.5, -2.0], [-1.2, -1.2, -2.0], [1, 1, 0], 0.2
    cases = []
    for advantage, quoted in ((1.0, -0.970409), (-1.0, 1.010701)):
        ratios = [math.exp(a - b) for a, b in zip(logp, old)]
        losses = [max(-r * advantage, -min(max(r, 1 - eps), 1 + eps) * advantage) for r in ratios]
        clipped = [float(abs(r - 1) > eps) for r in ratios]
        cases.append({"logp": logp, "old_logp": old, "advantages": [advantage] * 3, "mask": mask, "clip_ratio": eps,
                      "ratios": ratios, "clip_fraction_outside_range": masked_mean(clipped, mask),
                      "loss": close(masked_mean(losses, mask), quoted, 6)})
    return {"source": "Schulman 2017, equation 7, as a mean over valid tokens; arithmetic", "cases": cases}


def value_loss():
    cases, eps = [], 0.4
    for value, old, target, quoted in ((1.0, 0.2, 0.9, 0.09), (0.3, 0.2, 1.0, 0.49)):
        clipped = old + min(max(value - old, -eps), eps)
        whole = close(max((value - target) ** 2, (clipped - target) ** 2), quoted, 6)
        cases.append({"values": [value], "old_values": [old], "returns": [target], "mask": [1], "clip_value": eps,
                      "loss_without_half": whole, "loss_with_half": whole / 2})
    return {"source": "clipped value loss of Colossal-AI's ChatGPT application (no factor 1/2), and with the 1/2 of "
                      "Huang 2024; arithmetic", "cases": cases}


def gae_of(rewards, values, gamma, lam, mask=None):
    """Advantages by the definition's double sum, not by the backward recursion that implementations use."""
    mask = mask or [1] * len(values)
    r, v = [x * m for x, m in zip(rewards, mask)], [x * m for x, m in zip(values, mask)]
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(v))]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(v))) * mask[t] for t in range(len(v))]


def gae():
    listed = (
        ("NVIDIA NeMo-Aligner, ppo_utils_test.py", [0, 0, 1, 0], [0, 1, 2, 3], 0.5, 0.0, None, [0.5, 0, 0.5, -3]),
        ("arithmetic", [0, 0, 0, 1], [0.5, 0.4, 0.3, 0.2], 1.0, 0.95, None, [0.40065, 0.527, 0.66, 0.8]),
        ("alibaba/ROLL pull request 447: padding must be zeroed before the recursion (wrong code gives [5.7, 6, 0])",
         [0, 1, 0], [0, 0, 100], 1.0, 0.95, [1, 1, 0], [0.95, 1, 0]),
    )
    cases = []
    for source, rewards, values, gamma, lam, mask, quoted in listed:
        advantages = [close(a, q, 5) for a, q in zip(gae_of(rewards, values, gamma, lam, mask), quoted)]
        cases.append({"source": source, "rewards": list(map(float, rewards)), "values": list(map(float, values)),
                      "mask": mask or [1] * len(values), "gamma": gamma, "lambda": lam, "advantages": advantages,
                      "returns": [(a + v) * m for a, v, m in zip(advantages, values, mask or [1] * len(values))]})
    return {"source": "Schulman 2016, equation 16; terminal value zero", "cases": cases}


def whitening():
    values, mask = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 1, 0], dtype=bool)
    mean, variance = float(values[mask].mean()), float(values[mask].var())
    whitened = np.where(mask, (values - mean) / math.sqrt(variance + 1e-8), 0.0)
    return {"source": "inputs of TRL's core tests; population variance as in algorithms that whiten over the global batch",
            "values": values.tolist(), "mask": mask.astype(int).tolist(), "mean": close(mean, 2.5, 6),
            "variance": close(variance, 0.25, 6), "unbiased_variance_not_used": float(values[mask].var(ddof=1)),
            "epsilon": 1e-8, "whitened": whitened.tolist()}


def kl_estimators():
    cases = []
    for d, k2, k3 in ((0.1, 0.005, 0.004837), (-0.1, 0.005, 0.005171), (1.0, 0.5, 0.367879), (-1.0, 0.5, 0.718282)):
        cases.append({"d": d, "k1": d, "k2": close(d * d / 2, k2, 6), "k3": close(math.exp(-d) - 1 + d, k3, 6)})
    return {"source": "Schulman 2020, with d = log p_actor - log p_reference under samples of the actor; arithmetic",
            "cases": cases}


def accumulation():
    windows = [[1.0, 2.0], [3.0, 4.0, 5.0, 6.0, 7.0]]
    every = [loss for window in windows for loss in window]
    return {"source": "OpenRLHF, tests/test_loss_aggregation.py", "micro_batches": windows,
            "mean": close(sum(every) / len(every), 4.0, 6),
            "mean_of_means_not_used": close(sum(sum(w) / len(w) for w in windows) / 2, 3.25, 6)}


def adaptive_kl():
    coefficient, kl, target, samples, horizon = 0.15, 7.88, 6.0, 512, 10_000
    error = min(max(kl / target - 1, -0.2), 0.2)
    return {"source": "Ziegler 2019, section 2.2; arithmetic", "coefficient": coefficient, "kl": kl, "target": target,
            "samples": samples, "horizon": horizon,
            "next_coefficient": close(coefficient * (1 + error * samples / horizon), 0.151536, 6)}


def adam_epsilon():
    """One PyTorch Adam step from zero state in which gradient and epsilon are equal: half the learning rate."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.999), eps=1e-5)
    parameter.grad = torch.full((1,), 1e-5, dtype=torch.float64)
    optimizer.step()
    tf1 = math.sqrt(1 - 0.999) / (1 - 0.9) * (0.1 * 1e-5) / (math.sqrt(0.001 * 1e-10) + 1e-5)
    return {"source": "torch.optim.Adam, first step; TensorFlow 1 adds epsilon before the bias correction (Huang 2024)",
            "gradient": 1e-5, "epsilon": 1e-5, "beta1": 0.9, "beta2": 0.999,
            "step_per_learning_rate": close(-parameter.item(), 0.5, 6),
            "tensorflow1_step_not_used": close(tf1, 0.030653, 6)}


def reward_loss():
    cases = [{"gap": gap, "loss": close(float(np.logaddexp(0.0, -gap)), quoted, digits)}
             for gap, quoted, digits in ((0.0025, 0.691898, 6), (0.0, math.log(2), 12), (-1e4, 1e4, 6), (1e4, 0.0, 6))]
    return {"source": "-log sigmoid(gap), InstructGPT equation 1; arithmetic (numpy logaddexp)", "cases": cases}


def entropy():
    logits = [[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, -1.0, 0.5]]
    values = [float(torch.distributions.Categorical(logits=torch.tensor(row, dtype=torch.float64)).entropy()) for row in logits]
    close(values[0], 1.386294, 6)
    return {"source": "torch.distributions.Categorical; the uniform input is NVIDIA NeMo-Aligner's",
            "cases": [{"logits": row, "entropy": value} for row, value in zip(logits, values)]}


def make_losses():
    """The golden arithmetic of the losses and estimators, each with where it comes from."""
    parts = (policy_loss, value_loss, gae, whitening, kl_estimators, accumulation, adaptive_kl, adam_epsilon, reward_loss,
             entropy)
    write_json("losses.json", {part.__name__: part() for part in parts})


# --- 5: AdamW ----------------------------------------------------------------------------------------------------------

def make_adamw():
    """Five steps of torch's AdamW with clipping on a matrix that decays and a bias that does not, in float64."""
    settings = {"learning_rate": 0.05, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-5, "weight_decay": 0.1, "max_grad_norm": 1.0}
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, bias = torch.nn.Parameter(draw(2, 3)), torch.nn.Parameter(draw(3))
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": settings["weight_decay"]}, {"params": [bias], "weight_decay": 0.0}],
        lr=settings["learning_rate"], betas=(settings["beta1"], settings["beta2"]), eps=settings["epsilon"])
    start = {"weight": weight.flatten().tolist(), "bias": bias.tolist()}
    steps = []
    for step in range(5):
        scale = 0.1 if step == 2 else 1.0      # the third gradient is short enough not to be clipped
        weight.grad, bias.grad = draw(2, 3) * scale, draw(3) * scale
        gradient = {"weight": weight.grad.flatten().tolist(), "bias": bias.grad.tolist()}
        norm = float(torch.nn.utils.clip_grad_norm_([weight, bias], settings["max_grad_norm"]))
        optimizer.step()
        steps.append({"gradient": gradient, "gradient_norm": norm, "weight": weight.flatten().tolist(), "bias": bias.tolist()})
    assert steps[2]["gradient_norm"] < 1.0 < steps[0]["gradient_norm"]
    write_json("adamw.json", {
        "source": f"torch {torch.__version__}: clip_grad_norm_ (which scales by max_norm / (norm + 1e-6)), then AdamW",
        **settings, "weight_shape": [2, 3], "start": start, "steps": steps})


# --- 6: adapters -------------------------------------------------------------------------------------------------------

def make_adapters():
    """Random adapters as PEFT writes them, and what PEFT computes with them, beside their base and merged into it."""
    rows, tensors, cases = sequences(), {}, {}
    for name, targets in (("gpt2", ["c_attn", "c_proj", "c_fc"]),
                          ("bloom", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
                          ("llama-gqa-untied", [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")])):
        base = transformers.AutoModelForCausalLM.from_pretrained(HERE / "models" / name, attn_implementation="eager")
        torch.manual_seed(31)
        model = peft.get_peft_model(base, peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM"))
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        for value in trained.values():
            value.data = torch.randn_like(value) * 0.3
        cases[name] = {"trained_parameters": sum(value.numel() for value in trained.values()),
                       **cross_entropy_gradients(model, rows)}
        model.save_pretrained(HERE / "adapters" / name)
        (HERE / "adapters" / name / "README.md").unlink(missing_ok=True)
        config = HERE / "adapters" / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": f"models/{name}"}, indent=2) + "\n")
        with torch.no_grad():
            for how, whole in (("adapter", model.eval()), ("merged", model.merge_and_unload())):
                for i, row in enumerate(rows):
                    tensors[f"{name}.{how}.{i}"] = run(whole, *padded([row], "left")).logits[0].numpy()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, HERE / "peft.safetensors")
    write_json("peft.json", {"source": f"peft {peft.__version__} with torch {torch.__version__}, fp32 on CPU", "cases": cases})


# --- 7: what torch.save writes -----------------------------------------------------------------------------------------

def make_pytorch():
    """Two of the models as `pytorch_model.bin`: in one file, head and embedding one matrix, and in shards of bf16; and odd tensors."""
    folder = HERE / "pytorch"
    (folder / "sharded").mkdir(parents=True, exist_ok=True)
    state = lambda name, dtype: transformers.AutoModelForCausalLM.from_pretrained(  # noqa: E731
        HERE / "models" / name, dtype=dtype).state_dict()
    torch.save(state("llama-tied-headdim", torch.float32), folder / "llama-tied-headdim.bin")
    whole = state("gpt2", torch.bfloat16)
    names, weight_map = sorted(whole), {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({name: whole[name] for name in part}, folder / "sharded" / file)
        weight_map.update({name: file for name in part})
    index = {"metadata": {"total_size": sum(t.numel() * 2 for t in whole.values())}, "weight_map": weight_map}
    (folder / "sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    numbers = torch.arange(24, dtype=torch.float32)
    torch.save({
        "whole": numbers.reshape(4, 6), "row": numbers.reshape(4, 6)[2], "transposed": numbers.reshape(4, 6).t(),
        "every_third": numbers[1::3], "half": numbers[:6].half(), "bfloat16": numbers[:6].bfloat16(),
        "parameter": torch.nn.Parameter(numbers[:2].clone()), "scalar": numbers[5], "empty": torch.zeros(0, 3),
        "steps": torch.tensor([7]), "repeated": numbers[3:4].expand(2, 3),
    }, folder / "odd.bin")


# --- 8: tables ---------------------------------------------------------------------------------------------------------

def make_parquet():
    """Records as Parquet, and the same as JSON Lines; and tables that are refused."""
    folder = HERE / "parquet"
    folder.mkdir(exist_ok=True)
    turn = lambda role: lambda content, **more: {"role": role, "content": content, **more}  # noqa: E731
    user, assistant = turn("user"), turn("assistant")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1.5, "a": [1, 2]}}}]
    dialogues = [
        {"messages": [user("x"), assistant("y", weight=0), user("q"), assistant("z", weight=1)], "tools": None},
        {"messages": [user("k", name="U"), assistant("", tool_calls=[call]),
                      {"role": "tool", "content": "3", "tool_call_id": "i"}, assistant("m")], "tools": tools},
        {"messages": [user("l\nl"), assistant("n", reasoning_content="o")], "tools": []},
    ]
    answered = [{**d, "messages": d["messages"][:-1]} for d in dialogues]
    pairs = [{"prompt": f"p{i % 7}", "chosen": f"c{i}", "rejected": f"r{i}", "score": math.nan, "image": b"\xff\xd8"}
             for i in range(300)]
    for name, records, how in (
            ("dialogues", dialogues, {"compression": "zstd", "row_group_size": 2}),
            ("asked", answered, {"compression": "gzip"}),
            ("pairs", pairs, {"compression": "snappy", "row_group_size": 100})):
        pq.write_table(pa.Table.from_pylist(records), folder / f"{name}.parquet", **how)
        said = [{key: value for key, value in r.items() if key not in ("score", "image")} for r in records]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in said), encoding="utf-8")
    prompts = [{"prompt": "x"}, {"prompt": None}]
    pq.write_table(pa.Table.from_pylist(prompts), folder / "null.parquet")
    pq.write_table(pa.Table.from_pylist(prompts), folder / "brotli.parquet", compression="brotli")
    pq.write_table(pa.table({"text": [b"x", b"\xff"]}), folder / "bytes.parquet", compression="none")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), folder / "empty.parquet")


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    make_glassllm()
    make_tiny_models()
    make_families()
    make_losses()
    make_adamw()
    make_adapters()
    make_pytorch()
    make_parquet()
    for path in HERE.rglob("*.safetensors"):
        path.chmod(0o644)
    total = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{HERE}: {total:,} bytes in all")


if __name__ == "__main__":
    main()
