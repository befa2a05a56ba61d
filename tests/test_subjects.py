"""Subjects: site names, capture and replacement, folders, and the default model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sae_jax.subjects import (
    Site,
    Subject,
    from_hook_name,
    load_subject,
    next_token_loss,
    parse_site,
    to_hook_name,
)
from sae_jax.subjects.folder import write_folder
from sae_jax.subjects.llama import LlamaConfig, list_shapes
from sae_jax.subjects.sites import KINDS
from sae_jax.text import is_heldout, read_standard_library

CONFIG = LlamaConfig(
    vocab_size=300,
    d_model=16,
    d_mlp=24,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    context_length=12,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tied_head=False,
)
SITES = [f"{kind}.{layer}" for layer in range(CONFIG.n_layers) for kind in KINDS]
ODD_TEXTS = [
    "",
    " ",
    "def f(x):\n\treturn x  # tab\r\n\r\n        y = 1_000_000\n\n\n",
    "naïve café — 漢字 🐍🏳️‍🌈 e\u0301 \u00a0\u2028\u200b\ufeff \x00\x07\x1b\x7f",
    "trailing   \n   leading\n\x0b\x0c \r alone",
    "<|endoftext|> is text here, <|endoftext|>",
]


def make_weights(config: LlamaConfig, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32),
        list_shapes(config),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def make_tokenizer() -> Tokenizer:
    vocab = {"<|endoftext|>": 0}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def tiny() -> Subject:
    return Subject(make_weights(CONFIG, 0), CONFIG, make_tokenizer(), "tiny", "", 0)


@pytest.fixture(scope="module")
def tokens_bt() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 300, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def default() -> Subject:
    return load_subject()


@pytest.mark.parametrize("name", SITES)
def test_site_names_round_trip(name):
    site = parse_site(name)
    assert str(site) == name
    assert from_hook_name(to_hook_name(site)) == site


def test_hook_names_are_those_of_transformer_lens():
    names = {kind: to_hook_name(Site(kind, 3)) for kind in KINDS}
    assert names == {
        "resid_pre": "blocks.3.hook_resid_pre",
        "resid_mid": "blocks.3.hook_resid_mid",
        "resid_post": "blocks.3.hook_resid_post",
        "attn_out": "blocks.3.hook_attn_out",
        "mlp_out": "blocks.3.hook_mlp_out",
        "mlp_act": "blocks.3.mlp.hook_post",
    }


@pytest.mark.parametrize(
    "name", ["", "resid_post", "resid_post.", "resid_post.-1", "resid.3", "mlp_act.03"]
)
def test_bad_site_lists_the_kinds(name):
    with pytest.raises(ValueError, match=r"resid_pre\.L.*mlp_act\.L"):
        parse_site(name)
    with pytest.raises(ValueError, match=r"blocks\.L\.mlp\.hook_post"):
        from_hook_name(name)


def test_site_past_the_last_layer_lists_the_layers(tiny, tokens_bt):
    with pytest.raises(ValueError, match=r"0\.\.2.*resid_pre"):
        tiny.width("resid_post.3")
    with pytest.raises(ValueError, match=r"0\.\.2"):
        tiny.forward(tokens_bt, capture=["resid_post.3"])
    with pytest.raises(ValueError, match=r"0\.\.2"):
        tiny.forward(tokens_bt, replace={"mlp_out.7": lambda acts, tokens: acts})


def test_rows_past_the_context_are_refused(tiny):
    with pytest.raises(ValueError, match="context of 12 tokens.*have 13"):
        tiny.forward(np.zeros((1, 13), np.int32))


def test_captures_obey_the_equations_of_a_block(tiny, tokens_bt):
    logits_btv, acts = tiny.forward(tokens_bt, capture=SITES)
    assert logits_btv.shape == (2, 12, 300) and logits_btv.dtype == jnp.float32
    for name in SITES:
        assert acts[name].shape == (2, 12, tiny.width(name))
    for layer in range(CONFIG.n_layers):
        pre, attn, mid, act, mlp, post = (acts[f"{kind}.{layer}"] for kind in KINDS)
        w_down_md = tiny.weights["blocks"][layer]["w_down_md"]
        np.testing.assert_allclose(mid, pre + attn, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(post, mid + mlp, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(mlp, act @ w_down_md, rtol=1e-5, atol=1e-5)
        if layer:
            np.testing.assert_array_equal(pre, acts[f"resid_post.{layer - 1}"])


def test_logits_read_no_later_token(tiny, tokens_bt):
    changed_bt = tokens_bt.copy()
    changed_bt[:, 7:] = 5
    logits_btv, _ = tiny.forward(tokens_bt)
    changed_btv, _ = tiny.forward(changed_bt)
    np.testing.assert_array_equal(logits_btv[:, :7], changed_btv[:, :7])
    assert not np.allclose(logits_btv[:, 7:], changed_btv[:, 7:])


@pytest.mark.parametrize("name", ["resid_pre.0", "mlp_act.1", "resid_post.2"])
def test_capture_alone_equals_the_whole_run(tiny, tokens_bt, name):
    _, whole = tiny.forward(tokens_bt, capture=[name])
    logits_btv, cut = tiny.forward(tokens_bt, capture=[name], logits=False)
    assert logits_btv is None
    np.testing.assert_array_equal(cut[name], whole[name])


def test_capture_alone_reads_no_deeper_weights(tiny, tokens_bt):
    _, whole = tiny.forward(tokens_bt, capture=["resid_pre.1"])
    weights = {
        "embed_vd": tiny.weights["embed_vd"],
        "blocks": tiny.weights["blocks"][:2],
    }
    without = dataclasses.replace(tiny, weights=weights)
    _, acts = without.forward(tokens_bt, capture=["resid_pre.1"], logits=False)
    np.testing.assert_array_equal(acts["resid_pre.1"], whole["resid_pre.1"])
    assert without.forward(tokens_bt, logits=False) == (None, {})


@pytest.mark.parametrize("name", SITES)
def test_replacing_a_site_by_itself_changes_nothing(tiny, tokens_bt, name):
    logits_btv, acts = tiny.forward(tokens_bt, capture=[name])
    seen = []

    def put_back(captured_btd, acts_btd, tokens):
        seen.append(np.array_equal(tokens, tokens_bt))
        np.testing.assert_array_equal(acts_btd, captured_btd)
        return captured_btd

    replacement = jax.tree_util.Partial(put_back, acts[name])
    replaced_btv, _ = tiny.forward(tokens_bt, replace={name: replacement})
    np.testing.assert_array_equal(replaced_btv, logits_btv)
    assert seen == [True]


@pytest.mark.parametrize("name", SITES)
def test_zeros_in_place_of_a_site_change_the_loss(tiny, tokens_bt, name):
    def put_zeros(acts_btd, tokens):
        return jnp.zeros_like(acts_btd)

    logits_btv, _ = tiny.forward(tokens_bt)
    zeroed_btv, acts = tiny.forward(
        tokens_bt, capture=[name], replace={name: put_zeros}
    )
    assert not acts[name].any()  # captured after its replacement
    loss = next_token_loss(logits_btv, tokens_bt)
    assert abs(loss - next_token_loss(zeroed_btv, tokens_bt)).max() > 1e-2


def test_next_token_loss_is_the_cross_entropy(tokens_bt):
    logits_btv = np.random.default_rng(2).normal(0, 3, (2, 12, 300))
    shares_btv = np.exp(logits_btv) / np.exp(logits_btv).sum(-1, keepdims=True)
    expected = [
        [-np.log(shares_btv[b, t, tokens_bt[b, t + 1]]) for t in range(11)]
        for b in range(2)
    ]
    loss_bt = next_token_loss(jnp.asarray(logits_btv, jnp.float32), tokens_bt)
    assert loss_bt.dtype == jnp.float32
    np.testing.assert_allclose(loss_bt, expected, rtol=1e-5)


def test_subject_is_an_argument_of_a_compiled_function(tiny, tokens_bt):
    traces = []

    @jax.jit
    def run(subject, tokens, scale):
        traces.append(1)
        shrink = jax.tree_util.Partial(lambda scale, acts, _: scale * acts, scale)
        return subject.forward(tokens, replace={"mlp_out.1": shrink})[0]

    other = dataclasses.replace(tiny, weights=make_weights(CONFIG, 3))
    again = dataclasses.replace(tiny, tokenizer=make_tokenizer())
    first_btv = run(tiny, tokens_bt, 1.0)
    assert not np.allclose(first_btv, run(other, tokens_bt, 1.0))
    assert not np.allclose(first_btv, run(again, tokens_bt, 0.0))
    assert len(traces) == 1
    eager_btv, _ = tiny.forward(tokens_bt)
    np.testing.assert_allclose(first_btv, eager_btv, rtol=1e-4, atol=1e-4)
    copied = jax.tree.map(lambda leaf: leaf, tiny)
    assert (copied.name, copied.tokenizer) == (tiny.name, tiny.tokenizer)


@pytest.mark.parametrize("tied_head", [True, False])
def test_folder_round_trip(tmp_path, tiny, tokens_bt, tied_head):
    config = dataclasses.replace(CONFIG, tied_head=tied_head, rope_theta=500.0)
    weights = make_weights(config, 4)
    write_folder(tmp_path, config, weights, make_tokenizer().to_str(), np.float32)
    subject = load_subject(str(tmp_path))
    assert subject.config == config
    assert subject.name == tmp_path.name and len(subject.identity) == 16
    jax.tree.map(np.testing.assert_array_equal, subject.weights, weights)
    half = load_subject(str(tmp_path), dtype=jnp.bfloat16)
    logits_btv, _ = half.forward(tokens_bt)
    assert logits_btv.dtype == jnp.float32
    assert half.weights["embed_vd"].dtype == jnp.bfloat16


def test_folder_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_subject(str(tmp_path))
    write_folder(
        tmp_path, CONFIG, make_weights(CONFIG, 0), make_tokenizer().to_str(), np.float32
    )
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for change, message in (
        ({"architectures": ["T5Model"]}, "'T5Model' .* GPT2LMHeadModel, Llama.*torch"),
        ({"architectures": ["GPT2LMHeadModel"]}, "no tensor 'transformer"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh', only silu, .*gelu"),
        ({"hidden_size": 32}, r"shape .*16.*gives .*32"),
        ({"num_hidden_layers": 4}, r"no tensor 'model\.layers\.3"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"bos_token_id": 300}, "bos_token_id is 300; .*below vocab_size = 300"),
        ({"vocab_size": 256}, "tokenizer.json has token .* 256, .* vocab_size of 256"),
        ({"architectures": {"a": 1}}, "architecture \"{'a': 1}\" does not run in JAX"),
        ({"rope_parameters": ["default"]}, r"rope_parameters is \['default'\]"),
        ({"rope_theta": "many"}, "rope_theta is 'many', not a number above 0"),
        ({"hidden_size": 0}, "hidden_size is 0, not a whole number above 0"),
        ({"head_dim": 4.5}, "head_dim is 4.5, not a whole number above 0"),
        ({"head_dim": 3}, "head_dim = 3 even"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads = 3"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0, not true or false"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=message) as error:
            load_subject(str(tmp_path))
        assert "\n" not in str(error.value)
    path.write_text(json.dumps({k: v for k, v in fields.items() if k != "hidden_size"}))
    with pytest.raises(ValueError, match="'hidden_size' is missing"):
        load_subject(str(tmp_path))
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_subject(str(tmp_path))
    path.write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_subject(str(tmp_path))


@pytest.fixture
def tiny_folder(tmp_path):
    write_folder(
        tmp_path, CONFIG, make_weights(CONFIG, 0), make_tokenizer().to_str(), np.float32
    )
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_torn_file_is_named(tiny_folder, name):
    content = (tiny_folder / name).read_bytes()
    for n_bytes in (0, 5, len(content) // 2, len(content) - 1):
        (tiny_folder / name).write_bytes(content[:n_bytes])
        with pytest.raises(ValueError, match="is damaged .*fetch it again") as error:
            load_subject(str(tiny_folder))
        assert name in str(error.value) and "\n" not in str(error.value)


def test_identity_is_of_the_weights_and_of_what_the_config_says(tiny_folder):
    def identify(**changes):
        path = tiny_folder / "config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(fields))
        return load_subject(str(tiny_folder)).identity

    first = identify()
    assert identify(made_by="somebody") == first
    assert load_subject(str(tiny_folder), dtype=jnp.bfloat16).identity == first
    changed = [identify(rope_theta=5.0), identify(rms_norm_eps=0.5)]
    changed += [identify(bos_token_id=7)]
    weights = make_weights(CONFIG, 1)
    write_folder(tiny_folder, CONFIG, weights, make_tokenizer().to_str(), np.float32)
    assert len({first, *changed, identify()}) == 5


def test_no_token_of_a_text_is_cut_off_or_added(tiny_folder):
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tiny_folder / "tokenizer.json"))
    subject = load_subject(str(tiny_folder))
    assert len(subject.encode("abcdefg")) == 7 and len(subject.encode("a")) == 1
    assert subject.dtype == "float32"


def test_default_is_small_and_has_the_quickstart_site(default):
    assert default.name == "default" and default.context_length == 256
    assert default.width("resid_post.3") == default.d_model == 256
    sizes = [leaf.size for leaf in jax.tree.leaves(default.weights)]
    assert 2 * sum(sizes) <= 12e6
    assert default.vocab_size == default.tokenizer.get_vocab_size() == 4096


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_default_tokenizer_is_lossless(default, text):
    ids = default.encode(text)
    assert ids.dtype == np.int32 and default.bos_id not in ids
    assert default.tokenizer.decode(ids.tolist()) == text


def test_default_tokens_are_shown_as_text(default):
    ids = default.encode("    def __init__(self):\n        漢")
    shown = default.decode_tokens(ids)
    assert "\n        " in shown and " __init__" in shown
    assert "".join(shown).endswith("\\xe6\\xbc\\xa2")
    assert default.decode_tokens([default.bos_id]) == ["<|endoftext|>"]


def test_default_predicts_source_that_it_never_saw(default):
    heldout = [d for d in read_standard_library() if is_heldout(d.name, 20)]
    text = max(heldout, key=lambda document: len(document.text)).text
    rows = default.encode(text)[: 8 * 255].reshape(8, 255)
    tokens_bt = np.insert(rows, 0, default.bos_id, axis=1)
    logits_btv, _ = jax.jit(lambda s, tokens: s.forward(tokens))(default, tokens_bt)
    loss = next_token_loss(logits_btv, tokens_bt).mean()
    assert loss < 0.5 * np.log(default.vocab_size)
