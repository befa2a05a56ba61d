"""The model card that goes with the weights, and what tokenizers need to know."""

import json
from pathlib import Path

from subject.corpus import BOS, HELDOUT_EVERY
from subject.measure import Figures

from sae_jax.subjects.llama import LlamaConfig


def write_card(
    folder: Path, config: LlamaConfig, figures: Figures, training: dict[str, str]
) -> None:
    """Write README.md, and tokenizer_config.json for transformers.

    `training` maps what was done (data, tokens, time) to words for it.
    """
    tokenizer_fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context_length,
        "bos_token": BOS,
        "eos_token": BOS,
        "clean_up_tokenization_spaces": False,
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(tokenizer_fields, indent=2) + "\n")
    rows = "\n".join(f"| {name} | {value} |" for name, value in training.items())
    (folder / "README.md").write_text(
        f"""---
language: en
license: mit
library_name: transformers
---
# The default subject of sae_jax

A small language model of Python source, made to be read from: it is what the
quickstart trains sparse autoencoders on. Llama architecture, {config.n_layers} layers,
d_model {config.d_model}, MLP width {config.d_mlp}, {config.n_heads} query and \
{config.n_kv_heads} key-value heads of width {config.d_head},
a byte-level BPE of {config.vocab_size} tokens, context {config.context_length}, \
tied embeddings, bfloat16 weights.
Every document begins with `{BOS}` (the BOS token).

## How well it predicts
Bits per byte of the {figures.heldout_modules} standard library modules that neither the
model nor its tokenizer was trained on ({figures.heldout_bytes:,} bytes, \
{figures.heldout_tokens:,} tokens,
Python {figures.python}), concatenated in the order of their names:

| | bits per byte |
|---|---|
| this model | **{figures.bits_per_byte:.3f}** |
| `xz -9e`, one stream | {figures.xz_bits_per_byte:.3f} |
| `gzip -9`, one stream | {figures.gzip_bits_per_byte:.3f} |

The compressors start from nothing; the model has read the rest of the library, some
lines of which come again in these modules.

Every byte counts; windows half a context apart score each token once, with at least
half a context before it where there is that much. Recompute the figures with
`python experiments/subject/measure.py`, on the Python version above: another version
has other modules.

## How it was trained
`python experiments/train_subject.py`, which says how in full.

| | |
|---|---|
{rows}

A module is held out where the first 8 bytes of the SHA-256 of its name, such as
`json/decoder.py`, are a multiple of {HELDOUT_EVERY}.

## Licence
The weights come under the licence of sae_jax (MIT). The source they were trained on is
that of the Python standard library, under the Python Software Foundation License
version 2, and the Python Enhancement Proposals, each in the public domain or under
CC0-1.0. A model can repeat what it read: a passage that it repeats stays under the
licence of its source.

## Not for
Writing programs, answering questions, or anything but the study of what is inside.
""",
        encoding="utf-8",
    )
