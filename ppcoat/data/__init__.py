"""Pictures and captions -> checked examples -> buckets -> batches of latents and embeddings, cached. Others
use `examples`, `cache`, `batches`, `captions`, `sources`, `laion`, and `garments`, which draws pictures to
train on.
"""
