import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from torch import nn

from postern.anomaly import MaxSoftmax
from tests.anomaly.networks import digits, noise, trained


def test_score_is_the_largest_probability():
    _, _, test, _ = digits()
    with torch.no_grad():
        logits = trained()(test).double().numpy()
    scores = MaxSoftmax(trained(), batch_size=50).fit().score_samples(test)
    np.testing.assert_allclose(scores, softmax(logits, axis=1).max(axis=1), rtol=1e-5)


def test_calibrated_decisions():
    _, _, test, _ = digits()
    detector = MaxSoftmax(trained()).calibrate(test)
    assert 0.95 <= (detector.predict(test) == 1).mean() < 0.96
    assert (detector.predict(noise(100)) == -1).mean() > 0.1


def test_scikit_learn_conventions_and_bad_input():
    assert clone(MaxSoftmax(trained(), batch_size=7)).get_params()["batch_size"] == 7
    with pytest.raises(ValueError, match=r"\[batch, classes\], got \[5, 1, 8, 8\]"):
        MaxSoftmax(nn.Identity()).score_samples(noise(5))
    with pytest.raises(ValueError, match="batch_size"):
        MaxSoftmax(trained(), batch_size=0).score_samples(noise(5))
