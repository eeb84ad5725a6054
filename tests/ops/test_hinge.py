"""Hinge losses by hand, over heads of different sizes."""

import pytest
import torch

from senseflow_kernels import hinge_discriminator, hinge_generator

REAL = [torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[0.0], [3.0]])]
FAKE = [torch.tensor([[-2.0, 0.5], [-0.5, -3.0]]), torch.tensor([[1.0], [-1.0]])]
W = torch.tensor([0.25, 1.0])


def test_by_hand():
    # generator: sample means of FAKE are -.5/3 and -4.5/3
    torch.testing.assert_close(hinge_generator(FAKE, W), torch.tensor((0.25 * 0.5 + 4.5) / 3 / 2))
    # real: relu(1 - D) = 0, .5, 1 and 2, 0, 0; fake: relu(1 + D) = 0, 1.5, 2 and .5, 0, 0
    out = hinge_discriminator(REAL, FAKE, W)
    expected = (0.25 * 1.5 / 3 + 2 / 3) / 2 + (0.25 * 3.5 / 3 + 0.5 / 3) / 2
    torch.testing.assert_close(out.loss, torch.tensor(expected))
    torch.testing.assert_close(out.real_mean, torch.tensor(5.5 / 6))
    torch.testing.assert_close(out.fake_mean, torch.tensor(-5.0 / 6))
    torch.testing.assert_close(out.accuracy, torch.tensor(0.5 * (4 / 6 + 4 / 6)))


def test_gradients_by_hand():
    real = [t.clone().requires_grad_() for t in REAL]
    fake = [t.clone().requires_grad_() for t in FAKE]
    hinge_discriminator(real, fake, W).loss.backward()
    each = W / (3 * 2)
    torch.testing.assert_close(
        real[0].grad, torch.stack([torch.tensor([0.0, -each[0]]), torch.tensor([-each[1], 0.0])])
    )
    torch.testing.assert_close(fake[1].grad, torch.tensor([[each[0]], [0.0]]))


def test_errors():
    with pytest.raises(ValueError, match="no heads"):
        hinge_generator([])
    with pytest.raises(ValueError, match="weight must have shape"):
        hinge_generator(FAKE, torch.ones(3))
