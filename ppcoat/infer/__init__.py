"""Drawing with FLUX and NewBie-image, and scoring pictures. Others use `generate`, `lightning`,
`garment_scores` and `scores`.
"""
