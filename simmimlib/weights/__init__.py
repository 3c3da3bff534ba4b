"""Weights in and out: of whose names (``formats``), into a model (``checkpoints``), out to plain timm (``export``)."""
