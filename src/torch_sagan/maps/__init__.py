"""Attention maps of any model: recorded while it runs (``record``), laid over images (``overlay``), and explored in a
page (``explorer``).
"""
