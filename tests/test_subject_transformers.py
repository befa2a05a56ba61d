"""Our Llama against the one in transformers: token ids and logits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from test_subjects import CONFIG, ODD_TEXTS, make_tokenizer, make_weights

import sae_jax.subjects
from sae_jax.subjects import load_subject
from sae_jax.subjects.folder import write_folder

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def run_transformers(folder, tokens_bt) -> tuple[np.ndarray, list[np.ndarray]]:
    """The logits and the residual stream before each block, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        output = model(torch.from_numpy(tokens_bt).long(), output_hidden_states=True)
    return output.logits.numpy(), [state.numpy() for state in output.hidden_states]


@pytest.mark.parametrize("tied_head", [True, False])
def test_random_model_with_grouped_heads(tmp_path, tied_head):
    config = dataclasses.replace(CONFIG, tied_head=tied_head, rope_theta=500.0)
    weights = make_weights(config, 0)
    write_folder(tmp_path, config, weights, make_tokenizer().to_str(), np.float32)
    tokens_bt = np.random.default_rng(0).integers(0, 300, (2, 12)).astype(np.int32)
    sites = [f"resid_pre.{layer}" for layer in range(config.n_layers)]
    logits_btv, acts = load_subject(str(tmp_path)).forward(tokens_bt, capture=sites)
    expected_btv, states = run_transformers(tmp_path, tokens_bt)
    np.testing.assert_allclose(logits_btv, expected_btv, rtol=1e-4, atol=1e-4)
    for site, state in zip(sites, states):
        np.testing.assert_allclose(acts[site], state, rtol=1e-4, atol=1e-4)


def test_default_subject():
    subject = load_subject()
    folder = Path(sae_jax.subjects.__file__).parent / "default"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ODD_TEXTS[:-1]:  # the last one spells out the special token
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == subject.encode(text).tolist()
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.bos_token_id == subject.bos_id
    ids = subject.encode("import os\n\n\ndef walk(top):\n    return os.walk(top)\n")
    tokens_bt = np.insert(ids, 0, subject.bos_id)[None]
    logits_btv, _ = subject.forward(tokens_bt)
    expected_btv, _ = run_transformers(folder, tokens_bt)
    np.testing.assert_allclose(logits_btv, expected_btv, rtol=1e-3, atol=1e-3)
