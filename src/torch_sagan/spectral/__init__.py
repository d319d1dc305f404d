"""Spectral normalization of one weight (``norm``) and of whole models (``models``).

``iteration`` is the mathematics of one weight, ``grouped`` that of many at once. ``selection`` finds layers by name,
``legacy`` knows PyTorch's older hook, ``recalibration`` fits buffers to averaged weights. ``operator_norms`` measures
what a model's layers do to feature maps.
"""
