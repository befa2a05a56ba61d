"""Eight virtual CPU devices for every test, and the fixtures that many share."""

import collections
import os
import shutil
import tempfile

# Read at the first device query: eight virtual devices on few cores deadlock when the
# CPU client sizes its thread pool by the number of cores.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests, and the processes that they start, ask for the same programs again and again:
# each is compiled once in a run of the tests. Read when jax is imported.
PROGRAMS = tempfile.mkdtemp(prefix="sae_jax-programs-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", PROGRAMS)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402
import synthetic  # noqa: E402

from sae_jax.config import MeshConfig  # noqa: E402
from sae_jax.mesh import make_mesh  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

MESHES = [(1, 1), (1, 8), (2, 4), (8, 1)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files with slow tests come first, then those with many: a long one that began
    last would leave the other cores with nothing to do."""
    paths = collections.Counter(item.path for item in items)
    slow = collections.Counter(i.path for i in items if i.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], -paths[item.path]))


def pytest_unconfigure():
    shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(params=MESHES, ids=lambda shape: "x".join(map(str, shape)))
def mesh(request):
    """Each (data, latent) mesh that sharded code must agree on."""
    return make_mesh(MeshConfig(*request.param))


@pytest.fixture
def x64():
    """float64 throughout: what is left over from the oracle is rounding alone."""
    with jax.enable_x64():
        yield


@pytest.fixture(scope="session")
def planted_store(tmp_path_factory):
    """The path of a complete store with a planted dictionary."""
    return synthetic.write_store(tmp_path_factory.mktemp("planted") / "store")
