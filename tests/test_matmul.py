"""Products of the compute dtype: values, gradients, and what is multiplied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from sae_jax import state
from sae_jax.config import MeshConfig, SaeConfig
from sae_jax.matmul import matmul
from sae_jax.mesh import make_mesh
from sae_jax.step import make_step
from sae_jax.store import open_store


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_values_and_gradients_are_those_of_the_product(dtype, tolerance):
    rng = np.random.default_rng(0)
    a, b, g = rng.normal(size=(5, 7)), rng.normal(size=(7, 3)), rng.normal(size=(5, 3))
    value, pull = jax.vjp(lambda a, b: matmul(a, b, dtype), *map(jnp.float32, (a, b)))
    expected_values = (a @ b, g @ b.T, a.T @ g)
    for ours, expected in zip((value, *pull(jnp.float32(g))), expected_values):
        assert ours.dtype == jnp.float32
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < tolerance


def test_a_bfloat16_step_multiplies_only_bfloat16_matrices(planted_store):
    sae = SaeConfig(n_latents=128, k=3, k_aux=8, compute_dtype="bfloat16")
    mesh = make_mesh(MeshConfig(2, 4))
    config = synthetic.make_config(sae=sae)
    setup = synthetic.make_setup(config, mesh, open_store(planted_store))
    acts_bd = jax.ShapeDtypeStruct((64, 16), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(make_step(setup))(state.abstract(setup), acts_bd)
    products = list(_find_products(jaxpr.jaxpr))
    assert len(products) >= 5  # the encoder's two, the decoder's three
    assert set(products) == {("bfloat16", "bfloat16")}


def _find_products(jaxpr):
    """The dtypes of the factors of every product of two matrices."""
    for equation in jaxpr.eqns:
        factors = [variable.aval for variable in equation.invars]
        is_product = equation.primitive.name == "dot_general"
        if is_product and all(len(factor.shape) == 2 for factor in factors):
            yield tuple(str(factor.dtype) for factor in factors)
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _find_products(inner)
