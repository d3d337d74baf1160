"""FLUX and NewBie-image, each in a folder of its own, and what both share: tensor files, a quantised base,
writing. Others use `loading`, `tensor_files`, `writing`, `quantized_base` and `pictures`.
"""
