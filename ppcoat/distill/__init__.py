"""FLUX-Lightning: FLUX distilled to a LoRA of four steps. Others use `flux_lightning`."""
