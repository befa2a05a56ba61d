"""Every architecture against NumPy in float64, and on every mesh against itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from subject_folders import LLAMA, MODELS, T, run_numpy, write_model

from sae_jax.mesh import DATA, LATENT, batch_sharding
from sae_jax.subjects import load_subject, weights
from sae_jax.subjects import subject as subjects
from sae_jax.subjects.sites import KINDS
from sae_jax.subjects.weights import place_weight

SITES = tuple(f"{kind}.{layer}" for layer in range(2) for kind in KINDS)
FAMILIES = ["gpt2", "llama3", "biased", "mistral", "qwen2"]


@pytest.fixture(scope="module")
def tokens_bt() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (8, T)).astype(np.int32)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a model, and its tensors."""

    @functools.cache
    def write(name):
        folder = tmp_path_factory.mktemp(name)
        return folder, write_model(folder, MODELS[name])

    return write


@functools.partial(jax.jit, static_argnames="replaced")
def _run(subject, tokens_bt, scale, replaced=()):
    """Logits and all sites, where the replaced ones are scaled."""

    def shrink(scale, acts, tokens):
        return scale * acts * (1 + tokens[..., None] / 300)

    shrinking = jax.tree_util.Partial(shrink, scale)
    replace = dict.fromkeys(replaced, shrinking)
    return subject.forward(tokens_bt, capture=SITES, replace=replace)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_that_of_numpy(folder_of, tokens_bt, name):
    folder, tensors = folder_of(name)
    logits_btv, acts = _run(load_subject(str(folder)), tokens_bt[:1], 1.0)
    want_tv, want = run_numpy(MODELS[name], tensors, tokens_bt[0])
    assert want_tv.std() > 0.1
    np.testing.assert_allclose(logits_btv[0], want_tv, rtol=2e-5, atol=2e-5)
    assert set(acts) == set(want)
    for site, expected in want.items():
        np.testing.assert_allclose(acts[site][0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "biased"])
@pytest.mark.parametrize("site", [f"{kind}.0" for kind in KINDS])
def test_a_replacement_takes_the_place_of_the_site(folder_of, tokens_bt, name, site):
    """What is downstream changes, what is upstream does not."""
    subject = load_subject(str(folder_of(name)[0]))
    clean_btv, clean = _run(subject, tokens_bt, 0.0)
    logits_btv, acts = _run(subject, tokens_bt, 0.0, (site,))
    assert not acts[site].any()
    assert not np.allclose(logits_btv, clean_btv, atol=1e-2)
    for before in SITES[: SITES.index(site)]:
        np.testing.assert_array_equal(acts[before], clean[before])
    if site == "attn_out.0":  # nothing was added to the stream
        np.testing.assert_array_equal(acts["resid_mid.0"], acts["resid_pre.0"])
    if site == "mlp_out.0":
        np.testing.assert_array_equal(acts["resid_post.0"], acts["resid_mid.0"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mesh_changes_nothing(folder_of, tokens_bt, name, mesh):
    folder, _ = folder_of(name)
    alone = load_subject(str(folder))
    spread = load_subject(str(folder), mesh=mesh)
    assert spread.identity == alone.identity
    replaced = ("attn_out.0", "mlp_act.1")
    want_btv, want = _run(alone, tokens_bt, 0.5, replaced)
    by_row = jax.device_put(tokens_bt, batch_sharding(mesh))
    compiled = _run.lower(spread, by_row, 0.5, replaced).compile()
    logits_btv, acts = compiled(spread, by_row, 0.5)
    np.testing.assert_allclose(logits_btv, want_btv, rtol=1e-4, atol=1e-4)
    for site in SITES:
        np.testing.assert_allclose(acts[site], want[site], rtol=1e-4, atol=1e-4)
    n_held = _check_parts(spread.weights, mesh)
    n_argued = compiled.memory_analysis().argument_size_in_bytes
    assert n_argued <= n_held + 64 * (2 + len(jax.tree.leaves(spread.weights)))
    if mesh.shape[LATENT] >= 4:
        assert n_held < 0.3 * sum(x.nbytes for x in jax.tree.leaves(spread.weights))


def _check_parts(weights, mesh) -> int:
    """Each device holds its part of each matrix; how many bytes of all weights."""
    for leaf in jax.tree.leaves(weights):
        shards = leaf.addressable_shards
        assert len(shards) == mesh.size
        if leaf.ndim == 2 and leaf.shape[0] != T:  # all but the position table
            n_parts = mesh.shape[LATENT]
            assert {shard.data.size * n_parts for shard in shards} == {leaf.size}
    first = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(weights)]
    return sum(part.nbytes for part in first)


@pytest.mark.parametrize(
    ("mesh", "n_rows"), [((8, 1), 8), ((2, 4), 8), ((2, 4), 3)], indirect=["mesh"]
)
def test_captures_of_the_protocol(folder_of, tokens_bt, mesh, n_rows):
    """Rows are over the data axis where it divides them, and computed so always."""
    folder, _ = folder_of("gpt2")
    sites = ("mlp_act.0", "resid_post.0")
    alone = load_subject(str(folder)).capture(tokens_bt, sites)
    subject = load_subject(str(folder), mesh=mesh)
    acts = subject.capture(tokens_bt[:n_rows], sites)
    assert set(acts) == set(alone) == set(sites)
    n_parts = mesh.shape[DATA] if n_rows == 8 else 1
    for site in sites:
        assert acts[site].dtype == jnp.bfloat16
        part = acts[site].addressable_shards[0].data
        assert part.shape == (n_rows // n_parts, T, subject.width(site))
        found, want = (np.asarray(a[site], np.float32) for a in (acts, alone))
        np.testing.assert_allclose(found, want[:n_rows], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mesh", [(4, 1), (2, 4)], indirect=True)
def test_any_number_of_rows_is_spread(folder_of, tokens_bt, monkeypatch, mesh):
    """A device computes no more for five rows than for those that fill them up."""
    subject = load_subject(str(folder_of("gpt2")[0]), mesh=mesh)
    compiled, flops = subjects._capture, []

    def capture(*arguments):
        cost = compiled.lower(*arguments).compile().cost_analysis()
        flops.append(cost["flops"])
        return compiled(*arguments)

    monkeypatch.setattr(subjects, "_capture", capture)
    n_parts = mesh.shape[DATA]
    n_each = -(-5 // n_parts)
    for n_rows in (5, n_parts * n_each, n_parts):
        subject.capture(tokens_bt[:n_rows], ("resid_post.0",))
    five, filled, one_each = flops
    assert five == pytest.approx(filled, rel=0.1)
    assert five == pytest.approx(n_each * one_each, rel=0.1)


@pytest.mark.parametrize("mesh", [(2, 4)], indirect=True)
def test_no_matrix_is_gathered(tmp_path, mesh):
    """Where heads and widths divide, devices exchange sums of activations alone."""
    write_model(tmp_path, LLAMA)
    subject = load_subject(str(tmp_path), mesh=mesh)

    @jax.jit
    def run(subject, tokens_bt):
        return subject.forward(tokens_bt, ["resid_post.1"], logits=False)[1]

    tokens_bt = jax.ShapeDtypeStruct((8, T), jnp.int32)
    program = run.lower(subject, tokens_bt).compile().as_text()
    assert not re.findall(r"= \S+ all-gather", program)
    assert 1 <= len(re.findall(r"= \S+ all-reduce\(", program)) <= 5


def test_capture_runs_nothing_past_the_deepest_site(folder_of, tokens_bt):
    subject = load_subject(str(folder_of("gpt2")[0]))

    def count_flops(*sites):
        run = jax.jit(lambda subject: subject.forward(tokens_bt, sites, logits=False))
        return run.lower(subject).compile().cost_analysis()["flops"]

    early, whole = count_flops("resid_post.0"), count_flops("resid_post.1")
    assert 0.4 * whole < early < 0.6 * whole
    assert count_flops("resid_pre.1") < 1.01 * early
    subject.capture(tokens_bt, ("resid_post.0",))


@pytest.mark.parametrize("name", ["gpt2", "biased"])
def test_bfloat16_is_that_of_the_products_alone(folder_of, tokens_bt, name):
    subject = load_subject(str(folder_of(name)[0]), dtype=jnp.bfloat16)
    run = functools.partial(_run, replaced=())
    logits_btv, acts = jax.eval_shape(run, subject, tokens_bt, 1.0)
    assert logits_btv.dtype == jnp.float32
    assert {act.dtype for act in acts.values()} == {jnp.dtype(jnp.bfloat16)}
    text = str(jax.make_jaxpr(lambda s: s.forward(tokens_bt))(subject))
    for operation in ("rsqrt", "exp"):  # of the norms and of the softmax
        types = re.findall(rf":(\w+)\[[\d,]*\] = {operation}\b", text)
        assert types and set(types) == {"f32"}, operation


@pytest.mark.parametrize(
    ("name", "shape", "n_shards", "spec"),
    [
        ("w_q_dh", (32, 64), 4, (None, LATENT)),
        ("w_k_dg", (32, 16), 4, (LATENT, None)),  # two heads on four devices
        ("w_k_dg", (30, 16), 4, (None, None)),
        ("b_k_g", (16,), 4, (None,)),
        ("w_o_hd", (64, 32), 8, (LATENT, None)),
        ("embed_vd", (300, 32), 4, (LATENT, None)),
        ("embed_vd", (301, 32), 4, (None, LATENT)),
        ("embed_vd", (301, 30), 4, (None, None)),
        ("attn_norm_d", (32,), 4, ()),
        ("position_td", (16, 32), 4, ()),
        ("w_up_dm", (32, 48), 1, (None, LATENT)),
    ],
)
def test_places_of_weights(name, shape, n_shards, spec):
    units = {"h": 8, "g": 2, "m": 48, "v": shape[0]}
    assert place_weight(name, shape, units, n_shards) == PartitionSpec(*spec)


@pytest.mark.parametrize("mesh", [(2, 4)], indirect=True)
def test_no_more_of_a_file_is_read_than_the_part(folder_of, monkeypatch, mesh):
    """Parts as large as a share of the tensor, each once."""
    read, parts = weights._Reader._read, []

    def note(self, spans):
        array = read(self, spans)
        parts.append(array.nbytes)
        return array

    monkeypatch.setattr(weights._Reader, "_read", note)
    subject = load_subject(str(folder_of("llama3")[0]), mesh=mesh)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(subject.weights))
    assert max(parts) <= 4 * 300 * 32 / mesh.shape[LATENT]
    assert sum(parts) == total
