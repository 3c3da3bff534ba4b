"""Runs as ``report.runs`` reads them, and arms as ``pipeline.arms`` does, made up."""

import pandas as pd

PLACES = ["default", "pretraining", "scope", "loss", "ratio", "method", "gain", "depth", "conv"]


def _arm(question, label, paper, reference=None, **more):
    reference = reference or {"arm": "default", "paper": 82.8, "paper_linear": None}
    about = {"question": question, "place": PLACES.index(question), "heading": f"Which {question}?", "label": label}
    about |= {"paper": paper, "probes": False, "also": []}
    return {**about, "paper_linear": None, "reference": reference, "pretrain": {}, **more}


OF_MAE = {"arm": "mae", "paper": 84.8, "paper_linear": 65.5}
ARMS = {
    "default": _arm("default", "Default", 82.8),
    "scratch": _arm("pretraining", "Scratch", None),
    "reconstruct_all": _arm("scope", "All", 81.7),
    "l2": _arm("loss", "L2", 82.7),
    "smooth_l1": _arm("loss", "Smooth L1", 82.7),
    "ratio_20": _arm("ratio", "Ratio 0.2", 82.8),
    "mae": _arm("method", "MAE", None, probes=True),
    "mae_2": _arm("depth", "MAE 2", 84.9, OF_MAE, paper_linear=70.0, probes=True),
    "mae_8": _arm("depth", "MAE 8", 84.9, OF_MAE, paper_linear=73.5, probes=True),
    "own_scratch": _arm("conv", "Own scratch", None, {"arm": "own_scratch", "paper": None, "paper_linear": None}),
    "own": _arm("conv", "Own", None, {"arm": "own_scratch", "paper": None, "paper_linear": None}),
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
