"""Classifiers of frozen features (paper section 4.2): k nearest neighbours, and a linear one."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # C of scikit-learn, the inverse of the regularisation's strength
SIMILARITIES = 2**26  # held at a time: 256 MB


@torch.inference_mode()
def weighted_vote(train: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float) -> Tensor:
    """The class of each query: its k nearest training images by cosine vote, each with exp(cosine / temperature).

    train [N, D], labels [N], queries [M, D] -> [M]. Memory does not grow with N x M.
    """
    train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
    predicted = [labels[:0]]
    for part in queries.split(max(1, SIMILARITIES // len(train))):
        cosines, nearest = (part @ train.T).topk(k)  # [m, k], the nearest first
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # in units of the nearest one's: no overflow
        votes = weights.new_zeros(len(part), int(labels.max()) + 1).scatter_add_(1, labels[nearest], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def fit_linear(features: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Pipeline, float]:
    """Logistic regression on standardised features [N, D] and labels [N]: the classifier and its C.

    C is the one of ``STRENGTHS`` that does best on a held-out tenth of these (training) images, the strongest of equal
    ones; then all are fitted. No validation image has a say. Each class needs two images.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, so that each tenth image holds out of all
    held = np.isin(np.arange(len(labels)), order[::10])

    def fit(strength: float, rows: np.ndarray | slice) -> Pipeline:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        return classifier.fit(features[rows], labels[rows])

    scores = [fit(strength, ~held).score(features[held], labels[held]) for strength in STRENGTHS]
    best = STRENGTHS[int(np.argmax(scores))]
    return fit(best, slice(None)), best
