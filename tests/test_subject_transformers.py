"""Our models against those in transformers: token ids, logits, every site."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_subjects import CONFIG, ODD_TEXTS, make_tokenizer, make_weights

import sae_jax.subjects
from sae_jax.config import MeshConfig
from sae_jax.mesh import make_mesh
from sae_jax.subjects import load_subject
from sae_jax.subjects.folder import write_folder
from sae_jax.subjects.sites import KINDS

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

T = 24
GPT2 = {"vocab_size": 300, "n_positions": T, "n_embd": 32, "n_layer": 3, "n_head": 4}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": T,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 50.0, **parameters}}


_LLAMA3 = _rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=12,
)
_YARN = _rope("yarn", factor=3.0, original_max_position_embeddings=8)
_YARN_OPTIONS = _rope(
    "yarn",
    factor=3.0,
    original_max_position_embeddings=8,
    beta_fast=2,
    beta_slow=0.5,
    truncate=False,
    mscale=0.7,
    mscale_all_dim=1.3,
)
_BIASES = {"attention_bias": True, "mlp_bias": True}
_HALF_WINDOWED = {"use_sliding_window": True, "max_window_layers": 1}
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
    "gpt2-scales": (
        "GPT2",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
    ),
    "gpt2-unscaled": (
        "GPT2",
        GPT2 | {"scale_attn_weights": False, "activation_function": "quick_gelu"},
    ),
    "llama2": ("Llama", LLAMA | {"num_key_value_heads": 4}),
    "llama-biases": ("Llama", LLAMA | _BIASES | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-one-head": ("Llama", LLAMA | {"num_key_value_heads": 1, "head_dim": 12}),
    "llama3": ("Llama", LLAMA | _LLAMA3 | {"tie_word_embeddings": True}),
    "linear": ("Llama", LLAMA | _rope("linear", factor=3.0)),
    "dynamic": ("Llama", LLAMA | _rope("dynamic", factor=3.0)),
    "yarn": ("Llama", LLAMA | _YARN),
    "yarn-options": ("Llama", LLAMA | _YARN_OPTIONS),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 5, "head_dim": 12}),
    "mistral-open": ("Mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True, "bos_token_id": None}),
    "qwen2-window": ("Qwen2", LLAMA | {"sliding_window": 5} | _HALF_WINDOWED),
}
FAMILIES = ["gpt2", "llama3", "mistral", "qwen2"]


def save_model(folder, name, **saving):
    """A folder as transformers writes it, of a model in which every weight counts."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            is_scale = parameter.ndim == 1 and parameter.mean() == 1
            parameter.normal_(1.0 if is_scale else 0.0, 0.2)
    model.save_pretrained(folder, **saving)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def run_transformers(folder, tokens_bt, dtype=torch.float32):
    """The logits, and what hooks see at every site, as float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    seen = {}

    def keep(name, value):
        value = value[0] if isinstance(value, tuple) else value
        seen[name] = value.detach().float().numpy()

    def read_input(module, name):
        module.register_forward_pre_hook(lambda _, inputs: keep(name, inputs))

    def read_output(module, name):
        module.register_forward_hook(lambda _, inputs, output: keep(name, output))

    is_gpt2 = model.config.model_type == "gpt2"
    for i, block in enumerate(model.transformer.h if is_gpt2 else model.model.layers):
        read_input(block, f"resid_pre.{i}")
        read_output(block.attn if is_gpt2 else block.self_attn, f"attn_out.{i}")
        norm = block.ln_2 if is_gpt2 else block.post_attention_layernorm
        read_input(norm, f"resid_mid.{i}")
        down = block.mlp.c_proj if is_gpt2 else block.mlp.down_proj
        read_input(down, f"mlp_act.{i}")
        read_output(block.mlp, f"mlp_out.{i}")
        read_output(block, f"resid_post.{i}")
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens_bt).long()).logits
    return logits.float().numpy(), seen


def run_ours(folder, tokens_bt, **loading):
    subject = load_subject(str(folder), **loading)
    sites = [f"{kind}.{i}" for i in range(subject.n_layers) for kind in KINDS]
    run = jax.jit(lambda subject, tokens: subject.forward(tokens, capture=sites))
    return run(subject, tokens_bt)


def check_equal(folder, tokens_bt, **loading):
    logits_btv, acts = run_ours(folder, tokens_bt, **loading)
    expected_btv, seen = run_transformers(folder, tokens_bt)
    assert np.std(expected_btv) > 0.1
    np.testing.assert_allclose(logits_btv, expected_btv, rtol=1e-4, atol=1e-4)
    assert set(acts) == set(seen)
    for site in seen:
        np.testing.assert_allclose(acts[site], seen[site], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def tokens_bt() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (2, T)).astype(np.int32)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_site(tmp_path, tokens_bt, name):
    check_equal(save_model(tmp_path, name), tokens_bt)


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_files_on_a_mesh(tmp_path, tokens_bt, name):
    save_model(tmp_path, name, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_equal(tmp_path, tokens_bt, mesh=make_mesh(MeshConfig(2, 4)))


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(tmp_path, tokens_bt, name):
    """As far from float32 as transformers is in bfloat16, no further."""
    save_model(tmp_path, name)
    want_btv, want = run_transformers(tmp_path, tokens_bt)
    theirs_btv, theirs = run_transformers(tmp_path, tokens_bt, torch.bfloat16)
    ours_btv, ours = run_ours(tmp_path, tokens_bt, dtype=jnp.bfloat16)
    theirs["logits"], ours["logits"], want["logits"] = theirs_btv, ours_btv, want_btv
    for site, expected in want.items():
        error, usual = (
            np.linalg.norm(np.asarray(found[site], np.float32) - expected)
            for found in (ours, theirs)
        )
        assert error < 1.5 * usual + 1e-6, site
        assert usual < 0.1 * np.linalg.norm(expected), site


@pytest.mark.parametrize("name", ["llama2", "llama3", "linear", "yarn", "mistral"])
def test_the_older_spelling_of_rotary_positions(tmp_path, tokens_bt, name):
    path = save_model(tmp_path, name) / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    fields["rope_scaling"] = None if rope["type"] == "default" else rope
    path.write_text(json.dumps(fields))
    check_equal(tmp_path, tokens_bt)


@pytest.mark.parametrize("outside", [{}, {"rope_theta": 70.0}])
@pytest.mark.parametrize("inside", [{}, {"rope_theta": 90.0}])
def test_both_spellings_of_rotary_positions(tmp_path, tokens_bt, outside, inside):
    """What was saved by one version and then given a scaling as for another."""
    path = save_model(tmp_path, "linear") / "config.json"
    fields = json.loads(path.read_text()) | outside
    fields["rope_scaling"] = {"rope_type": "linear", "factor": 2.0, **inside}
    path.write_text(json.dumps(fields))
    check_equal(tmp_path, tokens_bt)


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_fields_have_the_defaults_of_transformers(tmp_path, tokens_bt, name):
    path = save_model(tmp_path, name) / "config.json"
    fields = json.loads(path.read_text())
    kept = {
        *("architectures", "model_type", "vocab_size", "n_positions", "n_embd"),
        *("n_layer", "n_head", "hidden_size", "intermediate_size", "head_dim"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        "tie_word_embeddings",
    }
    fields = {name: value for name, value in fields.items() if name in kept}
    path.write_text(json.dumps(fields))
    check_equal(tmp_path, tokens_bt)
    subject = load_subject(str(tmp_path))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert subject.context_length == config.max_position_embeddings
    if name != "gpt2":
        assert subject.config.rms_norm_eps == config.rms_norm_eps
        assert subject.config.window == getattr(config, "sliding_window", None)


def test_names_without_a_prefix(tmp_path, tokens_bt):
    """As the first GPT-2 files have them, with the buffers of old versions."""
    path = save_model(tmp_path, "gpt2") / "model.safetensors"
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(path).items()
    }
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, T, T), np.float32))
    save_file(tensors, path, metadata={"format": "pt"})
    check_equal(tmp_path, tokens_bt)


@pytest.mark.parametrize("tied_head", [True, False])
def test_a_folder_of_our_own(tmp_path, tied_head):
    config = dataclasses.replace(CONFIG, tied_head=tied_head, rope_theta=500.0)
    weights = make_weights(config, 0)
    write_folder(tmp_path, config, weights, make_tokenizer().to_str(), np.float32)
    tokens_bt = np.random.default_rng(0).integers(0, 300, (2, 12)).astype(np.int32)
    check_equal(tmp_path, tokens_bt)


def test_default_subject():
    subject = load_subject()
    folder = Path(sae_jax.subjects.__file__).parent / "default"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ODD_TEXTS[:-1]:  # the last one spells out the special token
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == subject.encode(text).tolist()
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.bos_token_id == subject.bos_id
    assert subject.special_ids == tuple(tokenizer.all_special_ids)
    ids = subject.encode("import os\n\n\ndef walk(top):\n    return os.walk(top)\n")
    tokens_bt = np.insert(ids, 0, subject.bos_id)[None]
    logits_btv, _ = subject.forward(tokens_bt)
    expected_btv, _ = run_transformers(folder, tokens_bt)
    np.testing.assert_allclose(logits_btv, expected_btv, rtol=1e-3, atol=1e-3)
