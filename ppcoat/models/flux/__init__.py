"""FLUX.1 for ppdiffusers. Others use `FluxTransformer2DModel` (transformer), `FluxPipeline` (pipeline) and
those that edit (editing), what these see of pictures (picture_inputs), `FlowMatchEulerDiscreteScheduler`
(scheduler), `register` (registration), and the names of the Linears below.

ATTENTION_AND_MLP and MODULATION are all Linears inside FLUX's blocks: block list -> {name in Black Forest
Labs' code: diffusers' names (ours) of its rows, from the top}. Modulation is what makes shifts, scales and
gates from the time and the pooled text. NORMS are the norms that have weights, of queries and keys head by
head; OUTSIDE_BLOCKS the Linears elsewhere.
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
NORMS = {
    "transformer_blocks": {
        "img_attn.norm.query_norm": ("attn.norm_q",),
        "img_attn.norm.key_norm": ("attn.norm_k",),
        "txt_attn.norm.query_norm": ("attn.norm_added_q",),
        "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    },
    "single_transformer_blocks": {
        "norm.query_norm": ("attn.norm_q",),
        "norm.key_norm": ("attn.norm_k",),
    },
}
OUTSIDE_BLOCKS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
# diffusers' last modulation has scale before shift, BFL's shift before scale
HALVES_SWAPPED = "norm_out.linear"
