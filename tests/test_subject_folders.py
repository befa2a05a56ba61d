"""Model folders: several weight files, tokenizers, special tokens, and refusals."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from subject_folders import GPT2, LLAMA, MISTRAL, QWEN2, write_model, write_tensors
from test_subjects import make_tokenizer
from tokenizers import AddedToken

from sae_jax.subjects import load_subject
from sae_jax.subjects.folder import write_folder
from sae_jax.subjects.llama import list_shapes

INDEX = "model.safetensors.index.json"


def _change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refuse(folder, message, error=ValueError):
    with pytest.raises(error, match=message) as raised:
        load_subject(str(folder))
    assert "\n" not in str(raised.value)


def test_the_identity_of_the_default_subject_stays():
    """Stores that were harvested from it name it."""
    assert load_subject().identity == "4c6acdfcd70e8fc6"


@pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_several_files_are_one_model(tmp_path, fields):
    (tmp_path / "one").mkdir()
    tensors = write_model(tmp_path / "one", fields)
    (tmp_path / "three").mkdir()
    write_model(tmp_path / "three", fields, n_files=3)
    one, three = (load_subject(str(tmp_path / name)) for name in ("one", "three"))
    jax.tree.map(np.testing.assert_array_equal, one.weights, three.weights)
    before = three.identity
    last = sorted(tensors)[-1]  # in the third file
    write_tensors(tmp_path / "three", tensors | {last: tensors[last] + 1}, 3)
    assert load_subject(str(tmp_path / "three")).identity != before


@pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_names_without_a_prefix(tmp_path, fields):
    tensors = write_model(tmp_path, fields)
    subject = load_subject(str(tmp_path))
    bare = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items()}
    if "lm_head.weight" in tensors:
        bare["lm_head.weight"] = tensors["lm_head.weight"]
    save_file(bare, tmp_path / "model.safetensors")
    again = load_subject(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, subject.weights, again.weights)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a\\b.safetensors", "x.bin", ""]
)
def test_an_index_that_names_other_files_is_refused(tmp_path, name):
    tensors = write_model(tmp_path, LLAMA, n_files=2)
    save_file(tensors, tmp_path.parent / "other.safetensors")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    _refuse(tmp_path, "index.json: .* is not the name of a safetensors file beside it")


def test_a_missing_or_torn_file_of_several_is_named(tmp_path):
    write_model(tmp_path, LLAMA, n_files=3)
    second = tmp_path / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-9])
    _refuse(tmp_path, "00002-of-00003.safetensors is damaged .*fetch it again")
    second.unlink()
    _refuse(tmp_path, "no model-00002-of-00003.safetensors in", FileNotFoundError)
    second.write_bytes(content)
    third = tmp_path / "model-00003-of-00003.safetensors"
    save_file(dict(list(load_file(third).items())[1:]), third)
    _refuse(tmp_path, "index.json: no tensor '.*', which config.json implies")
    for weight_map in ({}, None, ["a"]):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        _refuse(tmp_path, "index.json: weight_map is .*, not an object")


def test_a_pickle_is_refused(tmp_path):
    write_model(tmp_path, GPT2)
    (tmp_path / "model.safetensors").unlink()
    _refuse(tmp_path, "no model.safetensors in", FileNotFoundError)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    _refuse(tmp_path, "pytorch_model.bin is a pickle.*save_pretrained")


_ROPE = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "'longrope', only .*yarn"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "field 'factor' is missing"),
        (LLAMA, {"rope_scaling": _ROPE}, "field 'high_freq_factor' is missing"),
        (
            LLAMA,
            {"rope_scaling": _ROPE | {"high_freq_factor": 0.5}},
            "high_freq_factor = 0.5 must be above low_freq_factor = 1.0",
        ),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "an object of its own for 'full_attention'",
        ),
        (LLAMA, {"attention_bias": True}, "no tensor 'model.*self_attn.*.bias'"),
        (LLAMA, {"attention_bias": 1}, "attention_bias is 1, not true or false"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "the weights are quantized"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
        (QWEN2, {"max_window_layers": "a"}, "max_window_layers is 'a'"),
        (QWEN2, {"layer_types": ["full_attention"]}, "not a list of 2"),
        (QWEN2, {"layer_types": ["other"] * 2}, "layer_types holds 'other'"),
        (GPT2, {"n_head": 5}, "n_embd = 32 must be a multiple of n_head = 5"),
        (GPT2, {"activation_function": "sin"}, "activation_function is 'sin', only"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT2, {"n_embd": 16}, r"shape \(.*\), config.json gives \("),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, fields, changes, message):
    write_model(tmp_path, fields)
    _change(tmp_path, **changes)
    _refuse(tmp_path, rf"(config\.json|safetensors): .*{message}")


def test_quantized_weights_are_refused(tmp_path):
    tensors = write_model(tmp_path, GPT2)
    name = "transformer.wte.weight"
    tensors[name] = np.ones(tensors[name].shape, np.int8)
    write_tensors(tmp_path, tensors, 1)
    _refuse(tmp_path, "transformer.wte.weight is I8; .* before they were quantized")


def test_layers_that_a_list_gives_a_window(tmp_path):
    write_model(tmp_path, QWEN2)
    assert load_subject(str(tmp_path)).config.windowed_layers == (1,)
    _change(tmp_path, layer_types=["sliding_attention", "full_attention"])
    config = load_subject(str(tmp_path)).config
    assert (config.window, config.windowed_layers) == (3, (0,))


def test_special_tokens_of_the_folder(tmp_path):
    write_model(tmp_path, LLAMA)
    generation = tmp_path / "generation_config.json"
    of_tokenizer = tmp_path / "tokenizer_config.json"

    def read(**changes):
        _change(tmp_path, **changes)
        subject = load_subject(str(tmp_path))
        return subject.bos_id, subject.special_ids, subject.pad_id

    assert read() == (0, (0,), 0)
    assert read(eos_token_id=[5, 7]) == (0, (0, 5, 7), 5)
    assert read(pad_token_id=9) == (0, (0, 5, 7, 9), 9)
    assert read(pad_token_id=-1, bos_token_id=-1) == (None, (5, 7), 5)
    assert read(bos_token_id=None) == (None, (5, 7), 5)
    of_tokenizer.write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    assert read() == (0, (0, 5, 7), 5)
    generation.write_text(json.dumps({"bos_token_id": 4, "eos_token_id": 8}))
    assert read() == (4, (4, 5, 7, 8), 5)
    of_tokenizer.write_text(json.dumps({"bos_token": None}))
    assert read(bos_token_id=4)[0] is None
    generation.write_text(json.dumps({"bos_token_id": 900}))
    _change(tmp_path, bos_token_id=None)
    message = "generation_config.json: bos_token_id is 900; .*vocab_size = 300"
    _refuse(tmp_path, message)


@pytest.mark.parametrize(
    ("fields", "bos_id"), [(LLAMA, 1), (MISTRAL, 1), (QWEN2, None), (GPT2, None)]
)
def test_a_config_without_the_field_has_the_usual_bos_token(tmp_path, fields, bos_id):
    """That of GPT-2, 50256, is beyond this vocabulary."""
    write_model(tmp_path, {k: v for k, v in fields.items() if k != "bos_token_id"})
    assert load_subject(str(tmp_path)).bos_id == bos_id


def test_an_added_token_is_special_or_too_high(tmp_path):
    write_model(tmp_path, GPT2)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    tokenizer.add_tokens(["plain"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_subject(str(tmp_path)).special_ids == (0, 257)
    fields = json.loads(tokenizer.to_str())
    fields["model"]["vocab"]["plain"] = 300
    fields["added_tokens"][1]["id"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    message = "tokenizer.json has token 'plain' with id 300, .* vocab_size of 300: give"
    _refuse(tmp_path, message)


def test_the_older_files_of_a_gpt2_tokenizer(tmp_path):
    tokenizer = make_tokenizer()
    write_model(tmp_path, GPT2)
    (tmp_path / "tokenizer.json").unlink()
    vocab = tokenizer.get_vocab()
    vocab["ab"] = len(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    subject = load_subject(str(tmp_path))
    text = "tab  née\n"
    ids = subject.encode(text)
    assert len(ids) == len(text.encode()) - 1
    assert subject.tokenizer.decode(ids.tolist()) == text
    assert "ab" in subject.decode_tokens(ids)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na zzz\n")
    _refuse(tmp_path, "vocab.json is damaged")


def test_a_tokenizer_of_other_files_is_refused(tmp_path):
    write_model(tmp_path, LLAMA)
    (tmp_path / "tokenizer.json").unlink()
    _refuse(tmp_path, "no tokenizer.json in", FileNotFoundError)
    for name in ("vocab.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
        message = f"no tokenizer.json in .*, and {name} .*save_pretrained"
        _refuse(tmp_path, message, FileNotFoundError)


def test_only_a_plain_llama_is_written(tmp_path):
    write_model(tmp_path, MISTRAL)
    config = load_subject(str(tmp_path)).config
    with pytest.raises(ValueError, match="only a Llama without options"):
        write_folder(tmp_path / "new", config, list_shapes(config), "", np.float32)
    assert not (tmp_path / "new").exists()


def test_a_special_token_that_is_spelled_out_stays_text(tmp_path):
    write_model(tmp_path, GPT2)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode("<|endoftext|>").ids) == 1
    subject = load_subject(str(tmp_path))
    assert len(subject.encode("<|endoftext|>")) == 13 and subject.special_ids == (0,)
