"""Looking into an SAE: the text that each latent fires on."""

from sae_jax.viewer.contexts import LatentView, TopContext, top_contexts

__all__ = ["LatentView", "TopContext", "top_contexts"]
