"""Rows of inputs and wanted outputs of a layer, correlated like activations, for the tests of the calibration."""

import torch

from kron_hf.calibration.moments import Moments


def correlated_rows(rows, in_features, out_features, *, noise=0.3, mean=1.0):
    """X `[rows, in]`, whose covariance has eigenvalues over four orders of magnitude, and t `[rows, out]`."""
    scales = torch.logspace(0, -2, in_features, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(in_features, in_features).double())[0]
    x = (torch.randn(rows, in_features).double() * scales) @ turn + mean
    t = x @ torch.randn(in_features, out_features).double() / in_features**0.5
    return x, t + noise * t.std(0, correction=0) * torch.randn(rows, out_features).double()


def covariances_of(x, t, weights=None):
    moments = Moments(x.shape[1], t.shape[1])
    moments.update(x, t, weights)
    return moments.result()


def residual_share(x, t, weight, output_weights=None):
    """The relative squared output error, from the residuals of every row."""
    d = torch.ones(t.shape[1]).double() if output_weights is None else output_weights
    bias = t.mean(0) - weight @ x.mean(0)
    residuals = t - x @ weight.T - bias
    return float((residuals.square() * d).sum() / ((t - t.mean(0)).square() * d).sum())
