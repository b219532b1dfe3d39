"""Measures of similarity: definitions in float64, outside oracles, one protocol."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pyrepr
from pyrepr import similarity
from pyrepr.similarity import (
    CCA,
    CKA,
    CKNNA,
    MEASURES,
    RSA,
    DistanceCorrelation,
    JaccardKNN,
    LinearRegression,
    MutualKNN,
    Procrustes,
    RelativeCosine,
    as_measure,
    geotopological,
    rdm,
    rsa,
)
from pyrepr.stats import LayerMoments

ALL = [
    CKA(),
    CKA("rbf"),
    MutualKNN(5),
    JaccardKNN(5),
    CKNNA(5),
    RSA(),
    RSA("sqeuclidean", "cosine_cov"),
    RSA("euclidean", "corr", "geotopological", 0.2, 0.7),
    DistanceCorrelation(),
    RelativeCosine(20),
    Procrustes(),
    Procrustes("angular"),
    CCA(),
    CCA("svcca"),
    CCA("svcca", dims=3),
    CCA("pwcca"),
    LinearRegression(),
]
names = [m.key for m in ALL]


def layers(n=80, dtype=torch.float64):
    x = torch.randn(n, 12, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(12, 9, dtype=torch.float64)) + 0.3 * torch.randn(n, 9, dtype=torch.float64)
    z = y @ torch.randn(9, 7, dtype=torch.float64) + 2
    return [a.to(dtype) for a in (x, y, z)]


def close(a, b, **tolerance):
    b = torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


@pytest.mark.parametrize("measure", ALL, ids=names)
def test_protocol(measure):
    xs = layers()
    atol = 1e-6 if measure == Procrustes("angular") else 1e-10  # arccos near 1 has half the digits
    own, cross = measure.matrix(xs), measure.matrix(xs[:2], xs)
    assert own.shape == (3, 3) and cross.shape == (2, 3) and own.dtype == torch.float64
    close(cross, own[:2], atol=atol)
    close(measure(xs[0], xs[2]), own[0, 2])
    if measure.symmetric:
        close(own, own.T, atol=atol)
    else:
        assert float((own - own.T).abs().max()) > 1e-5
    if not isinstance(measure, LinearRegression):
        close(own.diagonal(), torch.ones(3), atol=max(atol, 1e-9))
    assert as_measure(measure.key) == measure and measure.describe() and hash(measure)
    low = measure.matrix([x.float() for x in xs])
    assert low.dtype == torch.float32
    close(low, own, rtol=1e-4, atol=1e-3 if measure == Procrustes("angular") else 1e-5)  # arccos near 1
    half = measure.matrix([x.bfloat16() for x in xs])
    assert half.dtype == torch.float32
    if measure.streams:
        moments = LayerMoments().update([x[:30] for x in xs]).update([x[30:] for x in xs])
        close(measure.of_moments(moments), own, rtol=1e-8, atol=atol)
        moments = LayerMoments().update([x[:30] for x in xs[:2]], [x[:30] for x in xs])
        close(
            measure.of_moments(moments.update([x[30:] for x in xs[:2]], [x[30:] for x in xs])),
            cross,
            rtol=1e-8,
            atol=atol,
        )
    else:
        with pytest.raises(ValueError, match="needs the rows"):
            measure.of_moments(LayerMoments().update(xs))


@pytest.mark.parametrize("measure", ALL, ids=names)
def test_what_does_not_matter(measure):
    """Rotations and shifts of a layer; a common order of the samples."""
    x, y, _ = layers()
    value = measure(x, y)
    order = torch.arange(80) if isinstance(measure, LinearRegression) else torch.randperm(80)
    turned = x @ torch.linalg.qr(torch.randn(12, 12, dtype=x.dtype)).Q
    shift = 0.0
    if not isinstance(measure, (MutualKNN, JaccardKNN, CKNNA, RelativeCosine)):
        shift = 3.0
    if isinstance(measure, RSA) and measure.metric == "correlation":
        close(measure(2 * x + 3, y), value)
        return
    if isinstance(measure, RelativeCosine):
        close(measure(2 * turned, y), value)
        return
    if measure.key == "pwcca":
        close(measure(x, y @ torch.randn(9, 9, dtype=y.dtype) + 1), value, rtol=1e-8)  # of the second, any linear map
        return
    close(measure((2 * turned + shift)[order], y[order]), value, rtol=1e-7)


@pytest.mark.parametrize("measure", ALL, ids=names)
def test_independence_and_chance(measure):
    n = 400
    values = [float(measure(torch.randn(n, 6).double(), torch.randn(n, 6).double())) for _ in range(12)]
    chance = measure.chance(n)
    if chance is not None:
        error = np.std(values) / math.sqrt(len(values))
        slack = 0.03 if isinstance(measure, LinearRegression) else 1e-6
        assert abs(np.mean(values) - chance) < 4 * error + slack


def test_mutual_knn_is_its_definition():
    x, y, _ = layers()
    scores = [a / a.norm(dim=1, keepdim=True) for a in (x, y)]
    sets = []
    for a in scores:
        s = a @ a.T
        s.fill_diagonal_(-9)
        sets.append([set(row.argsort(descending=True)[:10].tolist()) for row in s])
    common = [len(a & b) for a, b in zip(*sets, strict=True)]
    close(similarity.mutual_knn(x, y), np.mean(common) / 10)
    close(JaccardKNN(10)(x, y), np.mean([c / (20 - c) for c in common]))
    close(MutualKNN(10).chance(80), 10 / 79)


def test_many_neighbours_take_the_other_way():
    x, y, _ = layers()
    a, b = (similarity.neighbours.nearest(v, 40, "cosine") for v in (x, y))
    both = [len(set(p.tolist()) & set(q.tolist())) for p, q in zip(a, b, strict=True)]
    close(MutualKNN(40)(x, y), np.mean(both) / 40)


def test_duplicates_are_neighbours_of_each_other_and_ties_go_by_number():
    x = torch.randn(6, 3).repeat(5, 1)[torch.randperm(30)]  # every row five times
    found = similarity.neighbours.nearest(x, 2, "sqeuclidean")
    for i in range(30):
        same = [j for j in range(30) if j != i and torch.equal(x[j], x[i])]
        assert found[i].tolist() == same[:2]
    close(MutualKNN(4)(x, x), 1)


@pytest.mark.parametrize("metric", ["cosine", "ip", "sqeuclidean"])
def test_neighbours_are_scikit_learns(metric):
    from sklearn.neighbors import NearestNeighbors

    x = layers()[0]
    rows = x.numpy()
    if metric == "ip":
        expected = torch.tensor(np.argsort(-(rows @ rows.T) + np.diag([np.inf] * 80), axis=1)[:, :7])
    else:
        model = NearestNeighbors(metric=metric, algorithm="brute").fit(rows)
        expected = torch.tensor(model.kneighbors(n_neighbors=7, return_distance=False))
    assert torch.equal(similarity.neighbours.nearest(x, 7, metric), expected.sort(1).values)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_cknna_is_its_dense_definition(estimator, metric):
    x, y, _ = layers()
    n, k = 80, 10
    rows = [a / a.norm(dim=1, keepdim=True) if metric == "cosine" else a for a in (x, y)]
    kernels, masks = [a @ a.T for a in rows], []
    for kernel in kernels:
        scores = kernel.clone()
        if estimator == "unbiased":
            scores.fill_diagonal_(-torch.inf)
        masks.append(torch.zeros(n, n, dtype=x.dtype).scatter_(1, scores.topk(k).indices, 1))

    def hsic(a, b):
        if estimator == "biased":
            h = torch.eye(n, dtype=a.dtype) - 1 / n
            return torch.trace(a @ h @ b @ h)
        a, b = a.clone().fill_diagonal_(0), b.clone().fill_diagonal_(0)
        mixed = (a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b).sum() / (n - 2)
        return mixed / (n * (n - 3))

    both = masks[0] * masks[1]
    cross = hsic(both * kernels[0], both * kernels[1])
    own = [hsic(m * kernel, m * kernel) for m, kernel in zip(masks, kernels, strict=True)]
    close(CKNNA(k, metric, estimator)(x, y), cross / (own[0] * own[1]).sqrt())
    if (estimator, metric) == ("unbiased", "cosine"):
        close(similarity.cknna(x, y), cross / (own[0] * own[1]).sqrt())


def test_rsa_is_rsatoolboxs():
    import rsatoolbox

    x, y, _ = layers(40)
    sets = [rsatoolbox.data.Dataset(a.numpy()) for a in (x, y)]
    for method, theirs in (("correlation", "correlation"), ("sqeuclidean", "euclidean")):
        rdms = [rsatoolbox.rdm.calc_rdm(s, method=theirs) for s in sets]
        ours = [rdm(a, method) for a in (x, y)]
        for a, b, width in zip(ours, rdms, (12, 9), strict=True):
            close(a / (width if method == "sqeuclidean" else 1), b.dissimilarities[0], rtol=1e-8)
        for how in ("corr", "cosine", "spearman", "cosine_cov"):
            close(rsa(*ours, how), rsatoolbox.rdm.compare(*rdms, method=how)[0, 0], rtol=1e-7)
            close(RSA(method, how)(x, y), rsa(*ours, how))
    close(RSA("sqeuclidean", "cosine_cov")(x, y), pyrepr.cka(x, y, estimator="biased"))


def test_rdms_are_scipys():
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    x, y, _ = layers(30)
    for metric in ("correlation", "cosine", "euclidean", "sqeuclidean"):
        close(rdm(x, metric), pdist(x.numpy(), metric))
    coarse = [(rdm(a, "euclidean") * 2).round() for a in (x, y)]  # with ties
    close(rsa(*coarse, "spearman"), spearmanr(*(c.numpy() for c in coarse)).statistic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_are_scipys(dtype):
    from scipy.stats import rankdata

    x = (torch.randn(3000) * 50).round().to(dtype) / 50
    x[:4] = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    close(similarity.geometry._ranks(x) + 1, rankdata(x.numpy()))


def test_geotopological():
    from rsatoolbox.rdm import RDMs
    from rsatoolbox.rdm.transform import geotopological_transform

    d = rdm(layers(20)[0])
    kept = d.clone()
    theirs = geotopological_transform(RDMs(d[None].numpy().copy()), low=0.2, up=0.7).dissimilarities[0]
    close(geotopological(d, 0.2, 0.7), theirs)
    assert torch.equal(d, kept)
    whole = geotopological(d, 0, 1)
    close(whole, (d - d.min()) / (d.max() - d.min()))
    step = geotopological(d, 0.5, 0.5)
    assert set(step.unique().tolist()) == {0.0, 1.0} and abs(float(step.mean()) - 0.5) < 0.01
    close(geotopological(d, 0.9, 1.1, quantiles=False), ((d - 0.9) / (1.1 - 0.9)).clamp(0, 1))


def test_distance_correlation_is_its_definition():
    x, y, _ = layers()
    n = 80

    def u_centred(a):
        d = torch.cdist(a, a, compute_mode="donot_use_mm_for_euclid_dist")
        u = d - d.sum(0) / (n - 2) - d.sum(1)[:, None] / (n - 2) + d.sum() / ((n - 1) * (n - 2))
        return u.fill_diagonal_(0)

    a, b = u_centred(x), u_centred(y)
    close(DistanceCorrelation()(x, y), (a * b).sum() / (a.norm() * b.norm()))


def test_procrustes_and_cca_are_scipys():
    from scipy.linalg import subspace_angles
    from scipy.spatial import procrustes

    x, y, _ = layers()
    padded = torch.cat([y, torch.zeros(80, 3, dtype=y.dtype)], 1)
    close(1 - Procrustes()(x, y) ** 2, procrustes(x.numpy(), padded.numpy())[2])
    centred = [a - a.mean(0) for a in (x, y)]
    cosines = np.cos(subspace_angles(*(a.numpy() for a in centred)))
    close(CCA()(x, y), cosines.mean())
    parts = []
    for a in centred:
        u, s, _ = torch.linalg.svd(a, full_matrices=False)
        share = (s**2).cumsum(0) / (s**2).sum()
        parts.append(u[:, : int((share < 0.9).sum()) + 1] * s[: int((share < 0.9).sum()) + 1])
    close(CCA("svcca", 0.9)(x, y), np.cos(subspace_angles(*(p.numpy() for p in parts))).mean())


def test_wide_layers_go_by_samples():
    """More features than samples: the same values from the samples' side."""
    x, y, _ = layers(30)
    wide = x @ torch.linalg.qr(torch.randn(500, 12, dtype=x.dtype)).Q.T
    for measure in (Procrustes(), CCA(), CCA("svcca"), LinearRegression()):
        close(measure(wide, y), measure(x, y), rtol=1e-6, atol=1e-6 if measure.name != "linear_regression" else 10.0)
    r2 = LinearRegression()(wide / wide.square().mean().sqrt(), y)
    scaled = LinearRegression(alpha=12 / 500)(x, y)
    close(r2, scaled, rtol=1e-8)
    with pytest.raises(ValueError, match="mean CCA needs more samples than features, got 30 samples, 29 directions"):
        CCA()(torch.randn(30, 40), torch.randn(30, 3))
    assert 0 < float(CCA("svcca", dims=4)(torch.randn(30, 40), torch.randn(30, 40))) < 0.9


def test_linear_regression_is_scikit_learns():
    from sklearn.linear_model import Ridge

    x, y, _ = layers()
    scaled = ((x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()).numpy()
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    error = total = 0.0
    for fold in range(5):
        train, test = (order[torch.arange(80) % 5 != fold].numpy(), order[torch.arange(80) % 5 == fold].numpy())
        model = Ridge(alpha=2.0).fit(scaled[train], y[train].numpy())
        error += ((model.predict(scaled[test]) - y[test].numpy()) ** 2).sum()
        total += ((y[test] - y[train].mean(0)) ** 2).sum().item()
    close(LinearRegression(2.0)(x, y), 1 - error / total)


def test_relative_representations():
    x, y, _ = layers()
    index = (3, 17, 40, 79)
    relative = [similarity.relative_representation(a, a[list(index)]) for a in (x, y)]
    close(relative[0], torch.nn.functional.cosine_similarity(x[:, None], x[list(index)][None], dim=2))
    expected = torch.nn.functional.cosine_similarity(*relative, dim=1).mean()
    close(RelativeCosine(index)(x, y), expected)
    close(
        similarity.relative_representation(x, y[:, :1].repeat(1, 12)[:5], "euclidean")[7, 2], -(x[7] - y[2, 0]).norm()
    )


def test_match_units_finds_a_permutation():
    x = torch.randn(200, 10)
    order = torch.randperm(10)
    y = -x[:, order] * torch.rand(10) + 0.1 * torch.randn(200, 10)
    match = similarity.match_units(x, y, signed=False)
    assert torch.equal(order[match.y_units], match.x_units)
    assert bool((match.correlations < -0.5).all()) and bool((match.correlations.abs().diff() <= 0).all())
    moments = pyrepr.stats.Moments().update(x[:50], y[:50]).update(x[50:], y[50:])
    close(similarity.match_units(moments, signed=False).correlations, match.correlations, rtol=1e-6)
    with pytest.raises(ValueError, match="y must be"):
        similarity.match_units(x)


DIFFERENTIABLE = [
    CKA(), CKNNA(5), RSA("correlation", "corr"), RSA("euclidean", "cosine_cov"), DistanceCorrelation(),
    RelativeCosine(6), Procrustes(), CCA(), LinearRegression(),
]  # fmt: skip


@pytest.mark.parametrize("measure", DIFFERENTIABLE, ids=[m.key for m in DIFFERENTIABLE])
def test_gradients(measure):
    x, y = torch.randn(16, 4).double().requires_grad_(), torch.randn(16, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(measure, (x, y), atol=1e-5)


@pytest.mark.parametrize("measure", [MutualKNN(5), DistanceCorrelation(), Procrustes()], ids=lambda m: m.key)
def test_standard_error(measure):
    """Against the spread over 60 draws of the data. The jackknife errs upwards, for sets of neighbours by half."""
    values, errors = [], []
    for i in range(60):
        x = torch.randn(100, 5)
        y = x @ torch.ones(5, 5) + torch.randn(100, 5)
        values.append(float(measure(x, y)))
        if i < 12:
            errors.append(float(measure.stderr([x], [y])[0, 0]))
    assert 0.7 < np.mean(errors) / np.std(values) < 2.2


def test_standard_error_of_groups():
    """Ten copies of every sample are no more samples."""
    x, y, _ = layers(60, torch.float32)
    copies, group = torch.arange(60).repeat_interleave(10), torch.arange(60).repeat_interleave(10)
    many = [x[copies] + 1e-3 * torch.randn(600, 12), y[copies] + 1e-3 * torch.randn(600, 9)]
    measure = Procrustes()
    alone = measure.stderr([x], [y])
    grouped = measure.stderr(many[:1], many[1:], groups=group)
    wrong = measure.stderr(many[:1], many[1:])
    assert 0.5 < float(grouped / alone) < 2 and float(wrong / alone) < 0.5
    with pytest.raises(ValueError, match="draws must be at most the number of groups, 60, got 99"):
        measure.stderr(many[:1], many[1:], groups=group, draws=99)


@pytest.mark.parametrize("measure", ALL, ids=names)
def test_degenerate_layers_are_nan_and_named(measure):
    xs = layers(dtype=torch.float32)
    xs[1] = torch.ones(80, 4)
    with pytest.warns(UserWarning, match="same features"):
        values = measure.matrix(xs)
    assert values[1].isnan().all() and values[:, 1].isnan().all() and values[0, 2].isfinite()


def test_shorthand():
    assert as_measure("cka") == CKA() and as_measure(MutualKNN) == MutualKNN()
    assert as_measure("mutual_knn(k=5)") == MutualKNN(5) and as_measure("Mutual-kNN") == MutualKNN()
    assert as_measure("rsa(metric=cosine, method=corr)") == RSA("cosine", "corr")
    assert as_measure("relative_cosine(anchors=(1, 2, 3))") == RelativeCosine((1, 2, 3))
    assert as_measure("svcca(dims=5)") == CCA("svcca", dims=5) and CCA("pwcca").key == "pwcca"
    assert CKA(kernel="rbf").key == "cka(kernel=rbf)"
    assert set(MEASURES) >= {"cka", "cca", "cknna", "distance_correlation", "jaccard_knn", "linear_regression"}
    for text, message in (
        ("mutual_kn", "near matches: mutual_knn"),
        ("mutual_knn(j=3)", "no option 'j'; it has k, metric"),
        ("mutual_knn(3)", "options are written name=value"),
        ("mutual_knn(k=0)", "k must be a positive integer"),
        ("rsa(metric=manhattan)", "metric must be one of"),
        ("cca(kind=foo)", "kind must be one of mean, svcca, pwcca"),
    ):
        with pytest.raises(ValueError, match=message):
            as_measure(text)
    with pytest.raises(TypeError, match="a measure must be a name or a Measure, got int"):
        as_measure(3)


def test_bad_input():
    x, y, _ = layers()
    for call, message in (
        (lambda: MutualKNN(90)(x, y), "x must have at least 91 samples for mutual kNN, k = 90, cosine, got 80"),
        (lambda: CKNNA(1), "k must be at least 2"),
        (lambda: MutualKNN()(x, y[:70]), "y must have the n of x, 80 samples, got 70"),
        (lambda: RelativeCosine((3, 99))(x, y), "must have at least 100 samples"),
        (
            lambda: RelativeCosine((0, 90))(x, y),
            "x must have at least 91 samples for relative cosine, 2 anchors, got 80",
        ),
        (lambda: RelativeCosine(0), "anchors must be a positive number or numbers"),
        (lambda: RelativeCosine(torch.randn(3, 7)), "anchors must be a positive number or numbers of samples, got"),
        (lambda: geotopological(torch.rand(9), 0.8, 0.2), "low and up must be 0 ≤ low ≤ up ≤ 1"),
        (lambda: rsa(torch.rand(3), torch.rand(6)), "d2 must have the length of d1, 3, got 6"),
        (lambda: rdm(x, "manhattan"), "metric must be one of"),
        (lambda: similarity.relative_representation(x, y), "anchors must have the width of x, 12, got 9"),
        (lambda: LinearRegression(0), "alpha must be a positive finite number"),
        (lambda: Procrustes("round"), "kind must be 'shape' or 'angular'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
