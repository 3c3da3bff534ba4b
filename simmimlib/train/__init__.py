"""Training (paper section 4, appendix A): the loop, pre-training, fine-tuning, probes. Start with ``loop.py``."""
