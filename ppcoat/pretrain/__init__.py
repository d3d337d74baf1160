"""How the built-in tiny FLUX is made: text encoders -> autoencoder -> encoded drawings -> transformer ->
pipeline folder. Others use nothing of it but its command.
"""
