"""The generator and the discriminator of SAGAN, the blocks and conditional layers that they are made of, and the
weights that other implementations publish for them.
"""
