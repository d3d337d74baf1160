"""How the built-in tiny FLUX is made: drawings -> autoencoder -> text towers -> transformer -> pipeline
folder.
"""
