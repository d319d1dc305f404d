"""Weights that others have published: recognize a file, build the network that it needs, and load it.

``loading`` has the public function. A dialect is how one framework names what its residual network has.
"""
