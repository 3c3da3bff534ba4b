"""The model (paper section 3): masks, encoder, head, target and loss; weights in and out. Start with ``simmim.py``."""
