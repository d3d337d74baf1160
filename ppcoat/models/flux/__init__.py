"""FLUX.1 for ppdiffusers. Others use `FluxTransformer2DModel` (transformer), `FluxPipeline` (pipeline),
`FlowMatchEulerDiscreteScheduler` (scheduler) and `register` (registration).
"""
