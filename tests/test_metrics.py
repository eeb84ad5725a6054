"""Scores against their definitions: loops, scipy's matrix square root, crops by hand."""

import math

import pytest
import torch

from senseflow import metrics
from senseflow.metrics import (
    AlignmentModel,
    ScoreNet,
    dithered,
    frechet_distance,
    half_floor,
    kid,
    mean_cosine,
    patches,
    recall_at_1,
    train_alignment,
)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kid_by_loops(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased MMD^2 as it is defined, one pair at a time."""

    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = math.fsum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = math.fsum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = math.fsum(k(a, b) for a in x for b in y) / (n * m)
    return xx + yy - 2 * xy


@pytest.mark.parametrize("rows", [5, 1024])
def test_kid_matches_its_definition(monkeypatch, rows):
    monkeypatch.setattr(metrics, "KERNEL_ROWS", rows)  # 5: several blocks, the last one shorter
    x, y = normals(13, 7) + 0.3, 1.5 * normals(17, 7, seed=1)
    assert kid(x, y) == pytest.approx(kid_by_loops(x, y), rel=1e-12)
    scaled_x, scaled_y = (x - y.mean(0)) / y.std(0, False), (y - y.mean(0)) / y.std(0, False)
    assert kid(x, y, standardise=True) == pytest.approx(kid_by_loops(scaled_x, scaled_y), rel=1e-12)


def test_kid_is_unbiased():
    """Over many pairs of samples of one distribution the mean is 0 within its standard error."""
    values = torch.tensor([kid(normals(20, 4, seed=2 * s), normals(20, 4, seed=2 * s + 1)) for s in range(300)])
    assert abs(values.mean()) < 4 * values.std() / 300**0.5


def test_identical_sets_show_the_missing_diagonal():
    """For x = y the unbiased estimate is 2 (mean off the diagonal - mean over all), below 0."""
    x = normals(20, 4)
    kernel = (x @ x.T / 4 + 1) ** 3
    off = (kernel.sum() - kernel.trace()) / (20 * 19)
    assert kid(x, x) == pytest.approx(float(2 * (off - kernel.mean())), rel=1e-12)
    assert kid(x, x) < -0.1


# 9 and 8 are fewer than the 12 features: singular covariances
@pytest.mark.parametrize(("n", "m"), [(200, 150), (200, 9), (8, 9)])
def test_frechet_distance_matches_scipy(n, m):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = normals(n, 12) @ normals(12, 12, seed=5), normals(m, 12, seed=1) + 0.5
    sx, sy = torch.cov(x.T), torch.cov(y.T)
    root = linalg.sqrtm((sx @ sy).numpy())
    expected = float((x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace() - 2 * root.real.trace())
    # sqrtm of a singular matrix is good to sqrt(eps) only, which is why ours does not use it
    rel = 1e-10 if min(n, m) > 12 else 1e-6
    assert frechet_distance(x, y) == pytest.approx(expected, rel=rel)


def test_frechet_distance_closed_form():
    x = normals(500, 6)
    assert frechet_distance(x, x + 2.0) == pytest.approx(6 * 4.0, rel=1e-12)
    # Gaussians of one shape, scales 1 and 3: |mean shift|^2 + (3 - 1)^2 tr S
    centred = x - x.mean(0)
    expected = 4 * float(torch.cov(x.T).trace())
    assert frechet_distance(centred, 3 * centred) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(x, x) < 1e-12
    assert frechet_distance(x.float(), x.float() + 2) == pytest.approx(24.0, rel=1e-6)


def test_shapes_are_refused():
    for bad in (normals(1, 4), normals(4, 3), normals(4)):
        with pytest.raises(ValueError, match="features must be"):
            kid(bad, normals(4, 4))
        with pytest.raises(ValueError, match="features must be"):
            frechet_distance(normals(4, 4), bad)


def test_half_floor_is_small_and_repeatable():
    x = normals(400, 5)
    assert half_floor(x) == half_floor(x)
    assert half_floor(x) != half_floor(x, seed=1)
    floor_kid, floor_fd = half_floor(x)
    assert abs(floor_kid) < 0.1 < kid(x, x + 1) and floor_fd < 0.3 < frechet_distance(x, x + 1)


def test_patches_by_hand():
    images = torch.arange(2 * 5 * 6).view(2, 1, 5, 6)
    four = patches(images, 2, 4)
    assert four.shape == (8, 1, 2, 2)
    assert four[:4, 0].tolist() == [
        [[0, 1], [6, 7]],
        [[4, 5], [10, 11]],
        [[18, 19], [24, 25]],
        [[22, 23], [28, 29]],
    ]
    assert torch.equal(four[4:], four[:4] + 30)  # the second image's crops follow the first's
    assert patches(images, 3, 1)[0, 0].tolist() == [[7, 8, 9], [13, 14, 15], [19, 20, 21]]  # centre
    assert patches(images, 2, 9)[4, 0].tolist() == [[14, 15], [20, 21]]  # middle of the 3 x 3 grid
    for size, n in ((6, 1), (0, 1), (2, 3), (2, 0)):
        with pytest.raises(ValueError, match="must be"):
            patches(images, size, n)


class Channels:
    """Feature net of the tests: channel means and one constant feature."""

    def features(self, pixels):
        means = pixels.mean((2, 3))
        return torch.cat([means, torch.ones(len(means), 1)], 1)


def test_score_net_standardises_and_survives_disk(tmp_path):
    from senseflow.config import UserError

    pixels = normals(10, 3, 4, 4).float() * 0.2 + 0.1
    scores = ScoreNet.fit(Channels(), pixels, batch=4)
    features = scores(pixels, batch=3)
    torch.testing.assert_close(features[:, :3].mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(features[:, :3].std(0, False), torch.ones(3), rtol=1e-6, atol=0)
    assert torch.equal(features[:, 3], torch.zeros(10))  # constant feature: 0, not nan
    file = tmp_path / "sub" / "scale.safetensors"
    scores.save(file)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert torch.equal(ScoreNet.load(file, Channels())(pixels), scores(pixels))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="cannot be read"):
        ScoreNet.load(file, Channels())
    with pytest.raises(UserError, match="cannot be read"):
        ScoreNet.load(tmp_path / "absent", Channels())


def test_dither_hides_a_fraction_of_a_level_and_survives_disk(tmp_path):
    pixels = torch.full((4, 3, 64, 64), 1.0)
    noise = dithered(pixels, 4.0, seed=1) - pixels
    # 49152 numbers: their deviation is known to 1 / sqrt(2 * 49152) = .0032, five of these are allowed
    assert abs(float(noise.std()) * 127.5 / 4 - 1) < 0.016 and abs(float(noise.mean())) * 127.5 / 4 < 0.023
    assert torch.equal(dithered(pixels, 4.0, 1), pixels + noise) and not torch.equal(
        dithered(pixels, 4.0, 2), pixels + noise
    )
    assert dithered(pixels, 0.0, 1) is pixels

    scores = ScoreNet.fit(Channels(), normals(10, 3, 4, 4).float(), dither=4.0, seed=1)
    scores.save(tmp_path / "scale.safetensors")
    back = ScoreNet.load(tmp_path / "scale.safetensors", Channels())
    assert float(back.dither) == 4.0 and torch.equal(back(pixels, seed=2), scores(pixels, seed=2))
    levels = 127.5 * (pixels.mean() - scores(pixels, seed=2)[:, :3] * scores.std[:3] - scores.mean[:3])
    assert float(levels.abs().max()) < 5 * 4 / 64  # of each mean, over 64 x 64 pixels


def toy(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two noisy views of one hidden vector per class, through different random maps."""
    hidden = normals(n, 8)
    image = hidden @ normals(8, 20, seed=1) + 0.05 * normals(n, 20, seed=2)
    text = hidden @ normals(8, 12, seed=3) + 0.05 * normals(n, 12, seed=4)
    return image.float(), text.float()


def test_alignment_learns_pairs_it_has_not_seen():
    image, text = toy(300)
    model = train_alignment(image[:250], text[:250], seed=0, steps=150)
    with torch.no_grad():
        seen = model.images(image[250:]), model.texts(text[250:])
    untrained = train_alignment(image[:250], text[:250], seed=0, steps=0)
    with torch.no_grad():
        before = untrained.images(image[250:]), untrained.texts(text[250:])
    assert recall_at_1(*before) < 0.15  # chance is 0.02
    assert recall_at_1(*seen) > 0.8
    assert mean_cosine(*seen) > mean_cosine(*before) + 0.3
    assert mean_cosine(seen[0], seen[1].roll(1, 0)) < mean_cosine(*seen) - 0.3


def test_alignment_is_deterministic_and_leaves_the_global_seed():
    image, text = toy(20)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = train_alignment(image, text, seed=3, steps=5)
    assert torch.equal(torch.rand(1), expected)
    again, other = (train_alignment(image, text, seed=s, steps=5) for s in (3, 4))
    state = first.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    assert not all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_info_nce_by_hand():
    """Images 0 and 1 share a caption: each direction wants half on either, all on 2 for image 2."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.5, 3.0, -1.0], [0.0, 1.0, 2.0]]).double()

    def rows(m):
        log_p = [[v - math.log(sum(map(math.exp, row))) for v in row] for row in m]
        first = -(log_p[0][0] + log_p[0][1]) / 2
        second = -(log_p[1][0] + log_p[1][1]) / 2
        return (first + second - log_p[2][2]) / 3

    expected = (rows(logits.tolist()) + rows(logits.T.tolist())) / 2
    found = metrics.info_nce(logits, torch.tensor([4, 4, 7]))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_alignment_with_several_images_per_caption():
    image, text = toy(30)
    images = image.repeat(4, 1) + 0.1 * normals(120, 20, seed=9).float()
    labels = torch.arange(30).repeat(4)
    model = train_alignment(images, text, seed=0, steps=60, labels=labels)
    with torch.no_grad():
        pair = model.images(images), model.texts(text)
    assert recall_at_1(*pair, labels) > 0.95
    assert recall_at_1(*pair, labels.roll(1)) < 0.1  # the labels were used


def test_recall_by_hand():
    text = torch.eye(3)
    image = torch.tensor([[2.0, 1, 0], [1, 5, 0], [0, 3, 2]])  # the third is nearer to text 1
    assert recall_at_1(image, text) == pytest.approx(2 / 3)
    assert recall_at_1(image, text, torch.tensor([0, 1, 1])) == 1.0
    expected = (2 / 5**0.5 + 5 / 26**0.5 + 2 / 13**0.5) / 3
    assert mean_cosine(image, text) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="pair up"):
        recall_at_1(image[:2], text)
    with pytest.raises(ValueError, match="labels"):
        recall_at_1(image, text, torch.tensor([0, 1, 3]))


def test_alignment_model_survives_disk(tmp_path):
    from senseflow.config import UserError

    image, text = toy(20)
    model = train_alignment(image, text, seed=0, steps=3)
    model.save(tmp_path / "a.safetensors")
    back = AlignmentModel.load(tmp_path / "a.safetensors")
    assert torch.equal(back.images(image), model.images(image)) and torch.equal(back.texts(text), model.texts(text))
    ScoreNet(Channels(), torch.zeros(4), torch.ones(4)).save(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="has no tensor"):
        AlignmentModel.load(tmp_path / "b.safetensors")
