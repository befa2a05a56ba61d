"""What a run will cost before it has a machine: memory, traffic, time, and which mesh.

`choose_mesh` is the rule by which a run places itself. `make_plan` answers `sae-jax
plan`: an analytic model of the step (`memory`, `traffic`, `estimate`) for any topology,
and beside it what the compiler says, where one works without the hardware (`compiler`).
"""

from sae_jax.plan.plan import EFFICIENCY, Plan, make_plan
from sae_jax.plan.rule import choose_mesh
from sae_jax.plan.table import format_plan
from sae_jax.plan.topology import Topology, parse

__all__ = [
    "EFFICIENCY",
    "Plan",
    "Topology",
    "choose_mesh",
    "format_plan",
    "make_plan",
    "parse",
]
