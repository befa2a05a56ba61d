"""Small random models in Hugging Face folders, and their forward pass in NumPy.

Tensors have the names and the orientation that transformers gives them; the forward
pass is of one row, in float64, position by position.
"""

import json
import math

import numpy as np
from safetensors.numpy import save_file
from test_subjects import make_tokenizer

T = 16
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_positions": T,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 8,
    "bos_token_id": 0,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": T,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50.0,
    "bos_token_id": 0,
}
LLAMA3 = LLAMA | {
    "num_key_value_heads": 2,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
}
BIASED = LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 6}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 5}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
QWEN2 |= {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
MODELS = {
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False, "n_inner": 40},
    "gpt2-scales": GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "llama": LLAMA,
    "llama3": LLAMA3,
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "biased": BIASED,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
}


def write_model(folder, fields, seed=0, n_files=1):
    """Write the folder; its tensors, float32, are returned."""
    rng = np.random.default_rng(seed)
    shapes = _list_gpt2(fields) if "n_embd" in fields else _list_llama(fields)
    tensors = {}
    for name, shape in shapes.items():
        is_scale = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight"))
        centre = float(is_scale or "ln_f.weight" in name)
        tensors[name] = rng.normal(centre, 0.2, shape).astype(np.float32)
    write_tensors(folder, tensors, n_files)
    (folder / "config.json").write_text(json.dumps(fields))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return tensors


def write_tensors(folder, tensors, n_files):
    if n_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(n_files):
        file = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::n_files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run_numpy(fields, tensors, tokens_t):
    """Logits [T, V] and every site, of one row."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    run = _run_gpt2 if "n_embd" in fields else _run_llama
    return run(fields, tensors, tokens_t)


def _list_gpt2(fields):
    v, d = fields["vocab_size"], fields["n_embd"]
    m = fields.get("n_inner", 4 * d)
    shapes = {"transformer.wte.weight": (v, d)}
    shapes["transformer.wpe.weight"] = (fields["n_positions"], d)
    for i in range(fields["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            shapes[f"transformer.h.{i}.{norm}.weight"] = (d,)
            shapes[f"transformer.h.{i}.{norm}.bias"] = (d,)
        for name, n_in, n_out in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, m),
            ("mlp.c_proj", m, d),
        ):
            shapes[f"transformer.h.{i}.{name}.weight"] = (n_in, n_out)
            shapes[f"transformer.h.{i}.{name}.bias"] = (n_out,)
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    if not fields.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (v, d)
    return shapes


def _list_llama(fields):
    v, d, m = (fields[n] for n in ("vocab_size", "hidden_size", "intermediate_size"))
    n_heads, n_groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    e = fields.get("head_dim", d // n_heads)
    is_qwen = fields["architectures"] == ["Qwen2ForCausalLM"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(fields["num_hidden_layers"]):
        block = f"model.layers.{i}"
        shapes[f"{block}.input_layernorm.weight"] = (d,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (d,)
        for name, n_in, n_out, has_bias in (
            ("self_attn.q_proj", d, n_heads * e, "attention_bias"),
            ("self_attn.k_proj", d, n_groups * e, "attention_bias"),
            ("self_attn.v_proj", d, n_groups * e, "attention_bias"),
            ("self_attn.o_proj", n_heads * e, d, "attention_bias"),
            ("mlp.gate_proj", d, m, "mlp_bias"),
            ("mlp.up_proj", d, m, "mlp_bias"),
            ("mlp.down_proj", m, d, "mlp_bias"),
        ):
            shapes[f"{block}.{name}.weight"] = (n_out, n_in)
            is_qkv = name[-6:] in ("q_proj", "k_proj", "v_proj")
            if fields.get(has_bias) or (is_qwen and is_qkv):
                shapes[f"{block}.{name}.bias"] = (n_out,)
    if not fields.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (v, d)
    return shapes


def _run_gpt2(fields, tensors, tokens_t):
    def project(x, name):
        prefix = f"transformer.h.{i}.{name}"
        return x @ tensors[f"{prefix}.weight"] + tensors[f"{prefix}.bias"]

    def normalize(x, name):
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return z * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def activate(x):
        cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + np.tanh(cubic))

    embed, sites = tensors["transformer.wte.weight"], {}
    x = embed[tokens_t] + tensors["transformer.wpe.weight"][: len(tokens_t)]
    n_heads = fields["n_head"]
    for i in range(fields["n_layer"]):
        sites[f"resid_pre.{i}"] = x
        z = normalize(x, f"transformer.h.{i}.ln_1")
        scale = (fields["n_embd"] / n_heads) ** -0.5
        if fields.get("scale_attn_by_inverse_layer_idx"):
            scale /= i + 1
        query, key, value = np.split(project(z, "attn.c_attn"), 3, axis=-1)
        mixed = _attend(*(_split(a, n_heads) for a in (query, key, value)), scale, T)
        sites[f"attn_out.{i}"] = project(mixed, "attn.c_proj")
        x = sites[f"resid_mid.{i}"] = x + sites[f"attn_out.{i}"]
        z = normalize(x, f"transformer.h.{i}.ln_2")
        sites[f"mlp_act.{i}"] = activate(project(z, "mlp.c_fc"))
        sites[f"mlp_out.{i}"] = project(sites[f"mlp_act.{i}"], "mlp.c_proj")
        x = sites[f"resid_post.{i}"] = x + sites[f"mlp_out.{i}"]
    head = tensors.get("lm_head.weight", embed)
    return normalize(x, "transformer.ln_f") @ head.T, sites


def _run_llama(fields, tensors, tokens_t):
    def project(x, name):
        prefix = f"model.layers.{i}.{name}"
        return x @ tensors[f"{prefix}.weight"].T + tensors.get(f"{prefix}.bias", 0.0)

    def normalize(x, name):
        power = (x**2).mean(-1, keepdims=True)
        eps = fields["rms_norm_eps"]
        return x / np.sqrt(power + eps) * tensors[f"{name}.weight"]

    embed, sites = tensors["model.embed_tokens.weight"], {}
    x = embed[tokens_t]
    n_heads, n_groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    for i in range(fields["num_hidden_layers"]):
        sites[f"resid_pre.{i}"] = x
        z = normalize(x, f"model.layers.{i}.input_layernorm")
        query = _rotate(fields, _split(project(z, "self_attn.q_proj"), n_heads))
        key = _rotate(fields, _split(project(z, "self_attn.k_proj"), n_groups))
        value = _split(project(z, "self_attn.v_proj"), n_groups)
        scale = query.shape[-1] ** -0.5
        mixed = _attend(query, key, value, scale, _get_window(fields, i))
        sites[f"attn_out.{i}"] = project(mixed, "self_attn.o_proj")
        x = sites[f"resid_mid.{i}"] = x + sites[f"attn_out.{i}"]
        z = normalize(x, f"model.layers.{i}.post_attention_layernorm")
        gate = project(z, "mlp.gate_proj")
        act = gate / (1 + np.exp(-gate)) * project(z, "mlp.up_proj")
        sites[f"mlp_act.{i}"] = act
        sites[f"mlp_out.{i}"] = project(act, "mlp.down_proj")
        x = sites[f"resid_post.{i}"] = x + sites[f"mlp_out.{i}"]
    head = tensors.get("lm_head.weight", embed)
    return normalize(x, "model.norm") @ head.T, sites


def _split(x, n_heads):
    return x.reshape(len(x), n_heads, -1)


def _attend(query_the, key_tge, value_tge, scale, window):
    """One position and one head after the other."""
    n_heads, n_groups = query_the.shape[1], key_tge.shape[1]
    out = np.zeros(query_the.shape)
    for t in range(len(query_the)):
        seen = slice(max(0, t - window + 1), t + 1)
        for head in range(n_heads):
            group = head * n_groups // n_heads
            scores = scale * key_tge[seen, group] @ query_the[t, head]
            shares = np.exp(scores - scores.max())
            out[t, head] = shares / shares.sum() @ value_tge[seen, group]
    return out.reshape(len(out), -1)


def _rotate(fields, x_the):
    """As complex numbers, whose real half comes first."""
    half = x_the.shape[-1] // 2
    turning = x_the[..., :half] + 1j * x_the[..., half:]
    angles = np.outer(np.arange(len(x_the)), _list_frequencies(fields, half))
    turned = turning * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _list_frequencies(fields, half):
    rope = fields.get("rope_scaling", {})
    kind = rope.get("rope_type", rope.get("type"))
    frequencies = []
    for i in range(half):
        frequency = fields["rope_theta"] ** (-i / half)
        if kind == "linear":
            frequency /= rope["factor"]
        if kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            length = rope["original_max_position_embeddings"]
            wave = 2 * math.pi / frequency
            if wave > length / low:
                frequency /= rope["factor"]
            elif wave > length / high:
                kept = (length / wave - low) / (high - low)
                frequency = (1 - kept) * frequency / rope["factor"] + kept * frequency
        frequencies.append(frequency)
    return frequencies


def _get_window(fields, layer):
    architecture = fields["architectures"][0]
    if architecture == "LlamaForCausalLM" or layer < fields.get("max_window_layers", 0):
        return T
    return fields["sliding_window"]
