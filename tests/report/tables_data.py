"""Runs as ``report.runs`` reads them, and arms as ``pipeline.arms`` does, made up."""

import pandas as pd


def _arm(question, label, paper):
    return {"question": question, "heading": f"Which {question}?", "label": label, "paper": paper, "pretrain": {}}


ARMS = {
    "default": _arm("default", "Default", 82.8),
    "scratch": _arm("pretraining", "Scratch", None),
    "reconstruct_all": _arm("scope", "All", 81.7),
    "l2": _arm("loss", "L2", 82.7),
    "smooth_l1": _arm("loss", "Smooth L1", 82.7),
    "ratio_20": _arm("ratio", "Ratio 0.2", 82.8),
}


def runs(**top1):
    same = {"data": "digits", "data_digest": "d", "labelled_images": 10, "device": "a CPU", "precision": "float32"}
    same |= {"versions": "torch 2", "commit": "abc", "code": "def"}
    rows = [
        {"arm": arm, "seed": seed, "top1": value, "top1_best": value + 1, "validated": 3, **same}
        for arm, values in top1.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)
