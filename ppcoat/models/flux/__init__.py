"""FLUX.1 for ppdiffusers. Others use `FluxTransformer2DModel` (transformer), `FluxPipeline` (pipeline; what
it sees of a control picture: control), `FlowMatchEulerDiscreteScheduler` (scheduler), `register`
(registration), and the names of the Linears below.

ATTENTION_AND_MLP and MODULATION are all Linears inside FLUX's blocks: block list -> {name in Black Forest
Labs' code: diffusers' names (ours) of its rows, from the top}. Modulation is what makes shifts, scales and
gates from the time and the pooled text.
"""

ATTENTION_AND_MLP = {
    "transformer_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    "single_transformer_blocks": {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
    },
}
MODULATION = {
    "transformer_blocks": {"img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",)},
    "single_transformer_blocks": {"modulation.lin": ("norm.linear",)},
}
