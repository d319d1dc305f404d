"""Where training images come from: the sources that `--data` names, folders with their cache and labels, and what makes
batches of them in workers and in a thread.
"""
