"""Weights in and out.

In: of whose names (``formats``), into a model (``checkpoints``). Out: to plain timm (``export``), under Hugging Face's
names (``huggingface``), as folders that others open (``folders``), with a model card (``card``).
"""
