"""Subjects in torch: sites by their equations, and the one in JAX as a reference."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_subjects import CONFIG, make_tokenizer, make_weights

from sae_jax.harvest import harvest
from sae_jax.subjects import load_subject
from sae_jax.subjects.folder import write_folder
from sae_jax.subjects.sites import KINDS
from sae_jax.subjects.tokens import read_special_tokens
from sae_jax.subjects.torch_model import TorchSubject, load_torch_subject
from sae_jax.text import Document, corpus_of

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SIZED = COMMON | {"intermediate_size": 24}
GROUPED = SIZED | {"num_key_value_heads": 2, "head_dim": 8}
FULL = set(KINDS)
PARALLEL = FULL - {"resid_mid"}
# The model type, its fields, and the kinds of sites that it has.
MODELS = {
    "gpt_neox": ("gpt_neox", SIZED | {"use_parallel_residual": True}, PARALLEL),
    "sequential": ("gpt_neox", SIZED | {"use_parallel_residual": False}, FULL),
    "gemma2": ("gemma2", GROUPED | {"sliding_window": 4}, FULL),
    "gemma3": ("gemma3_text", GROUPED | {"sliding_window": 4}, FULL),
    "opt": ("opt", COMMON | {"ffn_dim": 24, "word_embed_proj_dim": 16}, FULL),
    "qwen3": ("qwen3", GROUPED, FULL),
    "phi": ("phi", SIZED, PARALLEL),
    "phi3": ("phi3", GROUPED, FULL),
    "bloom": ("bloom", COMMON | {"seq_length": 12}, FULL),
    "gptj": ("gptj", COMMON | {"rotary_dim": 4, "n_positions": 12}, PARALLEL),
    "gpt2": ("gpt2", COMMON, FULL),
    "gpt_neo": (
        "gpt_neo",
        SIZED
        | {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
        FULL,
    ),
    "stablelm": ("stablelm", GROUPED, FULL),
    "mpt": (
        "mpt",
        COMMON | {"d_model": 16, "n_heads": 4, "n_layers": 3, "max_seq_len": 12},
        FULL,
    ),
    "falcon": ("falcon", COMMON | {"alibi": False, "parallel_attn": True}, PARALLEL),
    "olmo2": ("olmo2", GROUPED, FULL),
    "cohere": ("cohere", GROUPED, PARALLEL),
    "mixtral": (
        "mixtral",
        GROUPED | {"num_local_experts": 4},
        FULL - {"mlp_act"},
    ),
    # Norms over the sums, and a factor before them: nothing that is added is an output.
    "post_norm": (
        "opt",
        COMMON
        | {"ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        {"resid_pre", "resid_post"},
    ),
    "granite": (
        "granite",
        SIZED | {"residual_multiplier": 0.5},
        {"resid_pre", "resid_post"},
    ),
}


def write_model(folder: Path, model_type: str, fields: dict):
    """A folder of a random model, whose norms and biases do not vanish."""
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.2 * torch.randn(weights.shape, generator=generator)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(make_tokenizer().to_str())
    return model.eval()


def change_config(folder: Path, **changes):
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    kept = {name: value for name, value in fields.items() if value is not ...}
    path.write_text(json.dumps(kept))


def name_sites(kinds) -> list[str]:
    return [f"{kind}.{layer}" for layer in range(3) for kind in KINDS if kind in kinds]


@pytest.fixture(scope="module")
def tokens_bt() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 300, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """The model in transformers, the subject of its folder, and its kinds of sites."""
    model_type, fields, kinds = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = write_model(folder, model_type, fields)
    return model, load_torch_subject(folder), kinds


@pytest.fixture(scope="module")
def neox(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("neox")
    write_model(folder, *MODELS["gpt_neox"][:2])
    return folder


def assert_close(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def test_sites_obey_the_equations_and_the_model(case, tokens_bt):
    model, subject, kinds = case
    logits_btv, acts = subject.forward(tokens_bt, name_sites(kinds))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_bt).long(), output_hidden_states=True)
    assert_close(logits_btv, expected.logits.numpy())
    assert (subject.n_layers, subject.d_model, subject.vocab_size) == (3, 16, 300)
    assert subject.context_length == 12
    for layer in range(3):
        x, post = acts[f"resid_pre.{layer}"], acts[f"resid_post.{layer}"]
        assert_close(x, expected.hidden_states[layer].numpy())
        if "mlp_out" in kinds:
            attn, mlp = acts[f"attn_out.{layer}"], acts[f"mlp_out.{layer}"]
            assert_close(x + attn + mlp, post)
            assert np.abs(attn).max() > 1e-3 and np.abs(mlp).max() > 1e-3
        if "resid_mid" in kinds:
            assert_close(acts[f"resid_mid.{layer}"], x + attn)
            assert_close(post, acts[f"resid_mid.{layer}"] + mlp)
    for site, acts_btd in acts.items():
        assert acts_btd.shape == (2, 12, subject.width(site))
        assert acts_btd.dtype == jnp.float32


def test_sites_that_are_not_there_are_refused(case, tokens_bt):
    _, subject, kinds = case
    for kind in FULL - kinds:
        with pytest.raises(ValueError, match=rf"no site '{kind}.1' .*; give one of"):
            subject.capture(tokens_bt, (f"{kind}.1",))
    with pytest.raises(ValueError, match=r"its layers are 0\.\.2"):
        subject.width("resid_pre.3")


def test_captures_alone_equal_the_whole_run(case, tokens_bt):
    _, subject, kinds = case
    _, acts = subject.forward(tokens_bt, name_sites(kinds))
    for site in ("resid_pre.0", *(f"{kind}.1" for kind in kinds), "resid_post.2"):
        alone = subject.capture(tokens_bt, (site,))[site]
        assert alone.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(alone, acts[site].astype(jnp.bfloat16))


def test_replacing_a_site_by_itself_changes_nothing(case, tokens_bt):
    _, subject, kinds = case
    sites = [f"{kind}.1" for kind in kinds]
    logits_btv, acts = subject.forward(tokens_bt, sites)
    for site in sites:
        replace = {site: lambda _, tokens, site=site: acts[site]}
        put_back_btv, captured = subject.forward(tokens_bt, [site], replace)
        assert_close(put_back_btv, logits_btv)
        np.testing.assert_array_equal(captured[site], acts[site])


def test_what_a_replacement_changes_flows_on(case, tokens_bt):
    """Equations hold with a replaced site, and nothing before it changes."""
    _, subject, kinds = case
    sites = name_sites(kinds)
    _, before = subject.forward(tokens_bt, sites)
    for kind in kinds:
        new = np.random.default_rng(2).normal(size=before[f"{kind}.1"].shape)
        new = jnp.asarray(new, jnp.float32)
        replace = {f"{kind}.1": lambda acts_btd, tokens, new=new: new}
        logits_btv, acts = subject.forward(tokens_bt, sites, replace)
        assert np.isfinite(logits_btv).all()
        np.testing.assert_array_equal(acts[f"{kind}.1"], new)
        for earlier in KINDS[: KINDS.index(kind)]:
            if earlier in kinds:
                same = acts[f"{earlier}.1"], before[f"{earlier}.1"]
                np.testing.assert_array_equal(*same)
        if kind == "resid_post":
            np.testing.assert_array_equal(acts["resid_pre.2"], new)
            continue
        assert np.abs(acts["resid_post.1"] - before["resid_post.1"]).max() > 1e-3
        if "resid_mid" in kinds:
            assert_close(acts["resid_post.1"], acts["resid_mid.1"] + acts["mlp_out.1"])
        if kind == "resid_mid":
            assert np.abs(acts["mlp_out.1"] - before["mlp_out.1"]).max() > 1e-3
        elif "resid_mid" in kinds:
            assert_close(acts["resid_mid.1"], acts["resid_pre.1"] + acts["attn_out.1"])


def test_nothing_past_the_last_site_is_run(neox, tokens_bt):
    subject = load_torch_subject(neox)
    with torch.no_grad():
        for block in subject.blocks[1:]:
            for weights in block.module.parameters():
                weights.fill_(float("nan"))
    ran = []
    for block in subject.blocks:
        block.module.register_forward_hook(lambda *_: ran.append(1))
    acts = subject.capture(tokens_bt, ("attn_out.0", "resid_pre.1"))
    assert len(ran) == 1
    assert all(np.isfinite(a.astype(np.float32)).all() for a in acts.values())
    assert subject.forward(tokens_bt, logits=False) == (None, {})
    assert len(ran) == 1


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = dataclasses.replace(CONFIG, rope_theta=500.0)
    tokenizer = make_tokenizer().to_str()
    write_folder(folder, config, make_weights(config, 0), tokenizer, np.float32)
    return folder


def test_torch_and_jax_agree_at_every_site(llama, tokens_bt):
    ours, theirs = load_subject(str(llama)), load_torch_subject(llama)
    sites = name_sites(FULL)
    expected_btv, expected = ours.forward(tokens_bt, sites)
    logits_btv, acts = theirs.forward(tokens_bt, sites)
    assert_close(logits_btv, expected_btv)
    captured = theirs.capture(tokens_bt, sites)
    for site in sites:
        assert theirs.width(site) == ours.width(site)
        assert_close(acts[site], expected[site])
        scale = float(jnp.abs(expected[site]).max())
        np.testing.assert_allclose(
            captured[site].astype(np.float32),
            expected[site].astype(jnp.bfloat16).astype(np.float32),
            rtol=2**-7,
            atol=1e-5 * scale,
        )
    for field in ("name", "bos_id", "context_length", "vocab_size", "n_layers"):
        assert getattr(theirs, field) == getattr(ours, field)
    assert (theirs.d_model, theirs.dtype) == (ours.d_model, ours.dtype)
    text = "def f(x):\n\treturn 'naïve <|endoftext|>'"
    ids = ours.encode(text)
    np.testing.assert_array_equal(theirs.encode(text), ids)
    assert theirs.decode_tokens(ids) == ours.decode_tokens(ids)


def test_torch_and_jax_leave_the_same_store(llama, tmp_path):
    """The same text in the same contexts, and activations that are close."""
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(10**6, size=80))) for _ in range(12)]
    corpus = corpus_of(Document(f"{i}.txt", text) for i, text in enumerate(texts))
    sites = ["resid_pre.0", "mlp_act.1", "resid_post.2"]
    stores = [
        harvest(subject, corpus, tmp_path / name, sites, progress=False)
        for name, subject in (
            ("jax", load_subject(str(llama))),
            ("torch", load_torch_subject(llama)),
        )
    ]
    ours, theirs = stores
    assert ours.manifest.rows == theirs.manifest.rows
    assert ours.manifest.tokenizer == theirs.manifest.tokenizer
    for split in ("train", "heldout"):
        sequences = ours.sequences(split)
        np.testing.assert_array_equal(
            ours.read_tokens(sequences), theirs.read_tokens(sequences)
        )
        for site in sites:
            acts, expected = (
                store.read_contexts(site, sequences)[0].astype(np.float32)
                for store in stores
            )
            np.testing.assert_allclose(acts, expected, rtol=0.01, atol=0.01)


def test_replacements_get_the_same_in_torch_and_jax(llama, tokens_bt):
    def halve(acts_btd, tokens):
        assert tokens.shape == (2, 12)
        return acts_btd / 2 + tokens[..., None]

    for kind in KINDS:
        replace = {f"{kind}.1": halve}
        expected_btv, _ = load_subject(str(llama)).forward(tokens_bt, (), replace)
        logits_btv, _ = load_torch_subject(llama).forward(tokens_bt, (), replace)
        assert_close(logits_btv, expected_btv)


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "opt"])
def test_bfloat16_has_the_same_sites(tmp_path, tokens_bt, name):
    model_type, fields, kinds = MODELS[name]
    write_model(tmp_path, model_type, fields)
    subject = load_torch_subject(tmp_path, dtype="bfloat16")
    assert subject.dtype == "bfloat16"
    sites = name_sites(kinds)
    _, acts = subject.forward(tokens_bt, sites)
    captured = subject.capture(tokens_bt, sites)
    _, exact = load_torch_subject(tmp_path).forward(tokens_bt, sites)
    for site in sites:
        assert acts[site].dtype == jnp.bfloat16
        np.testing.assert_array_equal(captured[site], acts[site])
        error = np.linalg.norm(acts[site].astype(np.float32) - exact[site])
        assert error < 0.1 * np.linalg.norm(exact[site])
        replace = {site: lambda acts_btd, tokens: acts_btd}
        put_back, _ = subject.forward(tokens_bt, sites, replace)
        np.testing.assert_array_equal(put_back, subject.forward(tokens_bt)[0])


def test_identity_is_of_the_weights_and_of_what_the_config_says(neox, tmp_path):
    def identify(weights: bool = False, **changes) -> str:
        for file in neox.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        if weights:
            tensors = load_torch_subject(tmp_path).model
            tensors.gpt_neox.embed_in.weight.data[0, 0] += 1
            tensors.save_pretrained(tmp_path)
        change_config(tmp_path, **changes)
        return load_torch_subject(tmp_path, dtype="float32").identity

    plain = identify()
    assert len(plain) == 16
    assert identify(transformers_version="0", dtype="bfloat16") == plain
    assert len({plain, identify(weights=True), identify(rotary_pct=0.5)}) == 3
    assert load_torch_subject(neox, name="a/b", dtype="bfloat16").identity == plain


def test_shards_are_the_same_weights(neox, tmp_path, tokens_bt):
    model = load_torch_subject(neox).model
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "tokenizer.json").write_text(make_tokenizer().to_str())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    found, expected = (load_torch_subject(root) for root in (tmp_path, neox))
    site = ("resid_post.2",)
    np.testing.assert_array_equal(
        *(subject.capture(tokens_bt, site)[site[0]] for subject in (found, expected))
    )
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        load_torch_subject(tmp_path)


def test_special_tokens_are_those_of_config_and_tokenizer(neox, tmp_path):
    shutil.copytree(neox, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()

    def load(**changes) -> TorchSubject:
        change_config(tmp_path, **changes)
        return load_torch_subject(tmp_path)

    assert load().bos_id == 0 and load().special_ids == (0,)
    subject = load(bos_token_id=..., eos_token_id=[3, 4], pad_token_id=7)
    assert subject.bos_id is None
    assert (subject.pad_id, subject.special_ids) == (7, (3, 4, 7))
    with pytest.raises(ValueError, match="bos_token_id is 300; give the id, below"):
        load(bos_token_id=300)


@pytest.mark.parametrize("says", [None, "<|endoftext|>"])
def test_special_tokens_are_those_of_the_same_folder_in_jax(llama, tmp_path, says):
    """A Qwen's config.json has a BOS token, and its tokenizer_config.json none."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, bos_token_id=3, eos_token_id=[4, 5])
    generation = {"bos_token_id": 6, "eos_token_id": [7, 8]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": says}))
    ours, theirs = load_subject(str(tmp_path)), load_torch_subject(tmp_path)
    assert ours.bos_id == (None if says is None else 3)
    for name in ("bos_id", "special_ids", "pad_id"):
        assert getattr(theirs, name) == getattr(ours, name)


def test_special_tokens_of_the_part_on_text(tmp_path):
    part = {"bos_token_id": 3, "eos_token_id": 4}
    fields = {"eos_token_id": None, "pad_token_id": 5, "text_config": part}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    special = read_special_tokens(tmp_path, make_tokenizer(), 300, None)
    assert (special.bos_id, special.special_ids, special.pad_id) == (3, (3, 4, 5), 5)


def test_an_index_that_names_other_files_is_refused(neox, tmp_path):
    shutil.copytree(neox, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {"gpt_neox.embed_in.weight": "../other.safetensors"}}
    path = tmp_path / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not the name of a safetensors file beside"):
        load_torch_subject(tmp_path / "model")


def test_rows_that_do_not_fit_are_refused(neox):
    subject = load_torch_subject(neox)
    with pytest.raises(ValueError, match="a context of 12 tokens, the rows have 13"):
        subject.capture(np.zeros((1, 13), np.int32), ("resid_pre.0",))
    with pytest.raises(ValueError, match=r"tokens 0\.\.299, the rows 0\.\.300"):
        subject.capture(np.full((1, 2), 300, np.int32), ("resid_pre.0",))


def test_pickled_weights_are_refused(neox, tmp_path):
    """The pickle would leave a file behind if anything unpickled it."""
    import pickle

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "config.json").write_bytes((neox / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle"):
        load_torch_subject(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_code_in_a_folder_is_refused_and_not_run(neox, tmp_path):
    for file in neox.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).touch()\n"
    (tmp_path / "own.py").write_text(code)
    change_config(tmp_path, auto_map={"AutoModelForCausalLM": "own.Model"})
    with pytest.raises(ValueError, match="field 'auto_map' asks for code"):
        load_torch_subject(tmp_path)
    change_config(tmp_path, auto_map=..., model_type="own")
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_torch_subject(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_weights_that_are_missing_are_not_drawn_at_random(neox, tmp_path):
    from safetensors.numpy import load_file, save_file

    for file in neox.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights .* as gpt_neox.layers.1.mlp"):
        load_torch_subject(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_torch_subject(tmp_path)


def test_models_that_read_later_tokens_are_refused(tmp_path):
    write_model(tmp_path, "bert", SIZED | {"is_decoder": False})
    with pytest.raises(ValueError, match="depend on later tokens"):
        load_torch_subject(tmp_path)


def test_tokenizers_that_do_not_fit_are_refused(neox, tmp_path):
    for file in neox.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["model"]["vocab"]["far"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="token .far. with id 300, .* of 300: give"):
        load_torch_subject(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        load_torch_subject(tmp_path)


def test_tokenizers_of_an_older_form_are_converted(neox, tmp_path):
    for file in neox.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    vocab = json.loads(make_tokenizer().to_str())["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    names = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    text = "def <|endoftext|> f(x): naïve"
    np.testing.assert_array_equal(
        load_torch_subject(tmp_path).encode(text), load_torch_subject(neox).encode(text)
    )


def test_without_the_extra_one_line_tells_the_cure(neox):
    code = (
        "import sys, pathlib\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import sae_jax, sae_jax.subjects.hub\n"
        "from sae_jax.subjects.torch_model import load_torch_subject\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "try: load_torch_subject(pathlib.Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, neox],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("pip install 'sae_jax[torch]'\n")
    assert "'gpt_neox' needs torch and transformers, and torch is" in done.stdout
