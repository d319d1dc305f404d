"""Attention in models that exist already: insert it and remove it (``insert``), and see where it could go and what it
would cost there (``points``).
"""
