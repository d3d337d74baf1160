"""NewBie-image: NextDiT and its two text encoders. Others use `NewbiePipeline` (pipeline), `NextDiT_CLIP`
(nextdit), the loaders of files.py and `write_newbie_folder` (convert).
"""
