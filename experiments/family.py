"""A family of smaller models for the default subject: the loss that compute buys.

    sae-jax harvest --site=resid_post.3 --max_rows=1100000 --out=store/
    python experiments/family.py --store=store/ --out=family/ [--extra_text=x.gz]
    sae-jax evaluate run/ --family=family/family.csv

Five Llamas of 0.15 to 1.1 M weights learn the default subject's text, with its
tokenizer and by its recipe, at 0.1 to 10 % of its compute, each over its own schedule.
The loss is the mean cross-entropy in nats a token, over the held-out contexts that
`evaluate` draws with seed 0, where also ce_sae is measured; give both the same
--sequences. The subject itself is the last of the table. With 6 FLOP for each weight
and token, two forward and four backward,

    compute = 6 tokens (weights of the blocks + V D of the head),    in TFLOP

which leaves out attention's scores (about a tenth of that) and the optimizer. A stopped
run goes on from its last minute, and what the table has is left as it is: for another
store or number of contexts delete the table, and the models are only measured again.

Cost: 34 TFLOP, 30 minutes on 2 CPU cores with much else to do, two thirds for the
largest model (4,000 to 7,000 tokens/s). experiments/family.csv is what it left, without
extra text, on the library of Python 3.11.7: 5.79 nats at 0.24 TFLOP to 3.14 at 23.6.
"""

import csv
import dataclasses
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from subject import corpus
from subject.checkpoint import State, restore, save
from subject.recipe import (
    Config,
    Data,
    draw_batch,
    init_weights,
    make_loss,
    make_optimizer,
    make_step,
    read_data,
    schedule,
)

from sae_jax.evals import EvaluateConfig
from sae_jax.evals.context import draw_sequences
from sae_jax.files import write_whole
from sae_jax.progress import Progress
from sae_jax.store import open_store
from sae_jax.subjects import Subject, load_subject, next_token_loss
from sae_jax.subjects.llama import LlamaConfig, list_shapes

_STORE = flags.DEFINE_string("store", "store", "Activation store of the subject.")
_OUT = flags.DEFINE_string("out", "family", "Where the table and the models are kept.")
_EXTRA_TEXT = flags.DEFINE_string("extra_text", None, "More text, a .jsonl.gz file.")
_SEQUENCES = flags.DEFINE_integer(
    "sequences", EvaluateConfig.sequences, "Held-out contexts to measure on."
)

_SUBJECT_TOKENS = 11_218_944  # that the shipped weights were trained on
_TFLOP = 1e12
_CONTEXTS_AT_ONCE = 16
_SAVE_SECONDS = 60.0


class Size(NamedTuple):
    """A model, and the share of the subject's compute that it learns with."""

    share: float
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    d_head: int
    batch_rows: int  # three quarters of them from the standard library


SIZES = (
    Size(0.001, 32, 48, 2, 2, 16, 4),
    Size(0.003, 48, 72, 2, 3, 16, 8),
    Size(0.01, 64, 96, 3, 2, 32, 8),
    Size(0.03, 96, 144, 4, 3, 32, 16),
    Size(0.1, 128, 192, 5, 4, 32, 16),
)


def main(argv: Sequence[str]) -> None:
    del argv
    subject, store = load_subject(), open_store(_STORE.value)
    if store.manifest.subject["identity"] != subject.identity:
        raise SystemExit(
            f"{store.path} was harvested from {store.manifest.subject['name']}, not "
            "from the default subject: harvest a store from it"
        )
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    table = Table(out / "family.csv")
    tokens_st = store.read_tokens(draw_sequences(store, 0, _SEQUENCES.value))
    assert isinstance(subject.config, LlamaConfig)
    whole = compute_tflop(subject.config, _SUBJECT_TOKENS)
    if "default subject" not in table.rows:
        table.add("default subject", whole, measure(subject, tokens_st))
    data = _read_data(subject, _EXTRA_TEXT.value)
    for size in SIZES:
        config = make_config(size, subject.config)
        of_step = compute_tflop(config.model, _tokens(config))
        n_steps = round(size.share * whole / of_step)
        tflop = n_steps * of_step
        name = f"d{size.d_model} l{size.n_layers}, {tflop:.3g} TFLOP"
        if name not in table.rows:
            member = train(name, config, n_steps, data, subject, out / name)
            table.add(name, tflop, measure(member, tokens_st))
    print(table.path.read_text(), end="")


class Table:
    """The rows (compute, loss) by name, on disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {
            row["name"]: (float(row["compute"]), float(row["loss"]))
            for row in csv.DictReader(lines)
        }

    def add(self, name: str, tflop: float, loss: float) -> None:
        """Also writes the table, by rising compute."""
        self.rows[name] = tflop, loss
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", "compute", "loss"])
        for known, (compute, its_loss) in sorted(
            self.rows.items(), key=lambda item: item[1]
        ):
            writer.writerow([known, f"{compute:.6g}", f"{its_loss:.6f}"])
        write_whole(self.path, text.getvalue())


def compute_tflop(config: LlamaConfig, n_tokens: int) -> float:
    """Of training on so many tokens, by the formula above."""
    blocks = list_shapes(config)["blocks"]
    n_weights = sum(math.prod(shape) for block in blocks for shape in block.values())
    n_weights += config.vocab_size * config.d_model
    return 6 * n_tokens * n_weights / _TFLOP


def make_config(size: Size, of_subject: LlamaConfig) -> Config:
    """The subject's recipe for a model of this size; one head's keys serve all."""
    model = dataclasses.replace(
        of_subject,
        d_model=size.d_model,
        d_mlp=size.d_mlp,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        n_kv_heads=1,
        d_head=size.d_head,
    )
    extra_rows = size.batch_rows // 4
    return Config(model, size.batch_rows - extra_rows, extra_rows)


def train(
    name: str, config: Config, n_steps: int, data: Data, subject: Subject, folder: Path
) -> Subject:
    """The model after all steps; on its way it is saved every minute."""
    folder.mkdir(exist_ok=True)
    weights = init_weights(config.model, config.seed)
    member = dataclasses.replace(
        subject, weights=weights, config=config.model, name=name
    )
    optimizer = make_optimizer(config)
    state = restore(folder, State(weights, optimizer.init(weights)))
    step, saved = make_step(make_loss(member), optimizer), time.monotonic()
    with Progress(n_steps * _tokens(config), "tokens", name) as progress:
        while state.step < n_steps:
            rate = config.muon_rate * schedule(state.step / n_steps, config)
            tokens_bt = draw_batch(config, data, state.step)
            weights, opt_state, loss = step(
                state.weights, state.optimizer, tokens_bt, rate
            )
            state = State(
                weights, opt_state, state.step + 1, state.tokens + tokens_bt.size
            )
            progress.update(state.tokens, loss=float(loss))
            if state.step == n_steps or time.monotonic() - saved > _SAVE_SECONDS:
                save(folder, state)
                saved = time.monotonic()
    return dataclasses.replace(member, weights=state.weights)


def measure(subject: Subject, tokens_st: np.ndarray) -> float:
    """Nats for each predicted token of all contexts."""

    @jax.jit
    def compute_loss(subject: Subject, tokens_bt: jax.Array) -> jax.Array:
        logits_btv, _ = subject.forward(tokens_bt)
        assert logits_btv is not None
        return next_token_loss(logits_btv, tokens_bt).mean(axis=1)

    losses: list[np.ndarray] = []
    with Progress(len(tokens_st), "contexts", f"measure {subject.name}") as progress:
        for first in range(0, len(tokens_st), _CONTEXTS_AT_ONCE):
            tokens_bt = jnp.asarray(tokens_st[first : first + _CONTEXTS_AT_ONCE])
            losses.append(np.asarray(compute_loss(subject, tokens_bt), np.float64))
            progress.update(first + len(tokens_bt))
    return float(np.concatenate(losses).mean())


def _tokens(config: Config) -> int:
    """In a step."""
    return (config.library_rows + config.extra_rows) * config.model.context_length


def _read_data(subject: Subject, extra_text: str | None) -> Data:
    library, heldout = corpus.split_standard_library()
    return read_data(subject.tokenizer, library, heldout, extra_text)


if __name__ == "__main__":
    app.run(main)
