"""The algebra of separable kernels, against literal sums and against other optimisers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenconv as tc
from tokenconv.analysis import Order, degrees_of_freedom, factorise, khatri_rao, separability

ORDERS = list(Order)


def random_kernel(out_dim=6, per_group=4, sides=(3, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_dim, per_group, *sides, generator=generator, dtype=torch.float64)


def literal_sum(factors, per_group, groups):
    """W[o, i] = sum_t P[o, i, t] * D[.., t], with every index written out."""
    out_dim = len(factors.pointwise)
    weight = torch.zeros(out_dim, per_group, *factors.depthwise.shape[2:], dtype=torch.float64)
    for o in range(out_dim):
        for i in range(per_group):
            channel = o // (out_dim // groups) * per_group + i  # that filter o sees as its i-th
            kernels = factors.depthwise[channel if factors.order == "dw_pw" else o]
            for t in range(factors.rank):
                weight[o, i] += factors.pointwise[o, i, t] * kernels[t]
    return weight


@settings(deadline=None, max_examples=60)
@given(
    groups=st.sampled_from([1, 2, 3]),
    out_per_group=st.integers(1, 4),
    per_group=st.integers(1, 5),
    sides=st.sampled_from([(1, 1), (3, 3), (3, 2), (1, 5)]),
    order=st.sampled_from(ORDERS),
    rank=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_what_is_lost_is_the_energy_that_was_cut_off(
    groups, out_per_group, per_group, sides, order, rank, seed
):
    weight = random_kernel(groups * out_per_group, per_group, sides, seed)
    spectrum = separability(weight, groups=groups).spectra[order]
    most = spectrum.values.shape[1]
    rank = min(rank, most)
    factors = factorise(weight, rank, order=order, groups=groups)
    expanded = factors.expand()
    torch.testing.assert_close(expanded, literal_sum(factors, per_group, groups))
    lost = (expanded - weight).square().sum().item()
    total = weight.square().sum().item()
    discarded = spectrum.values[:, rank:].square().sum().item()
    assert lost == pytest.approx(discarded, rel=1e-10, abs=1e-26 * total)
    assert spectrum.errors == sorted(spectrum.errors, reverse=True)
    assert spectrum.errors[rank - 1] == pytest.approx((discarded / total) ** 0.5)
    assert spectrum.errors[-1] == 0
    assert spectrum.explained[-1] == 1


@pytest.mark.parametrize("order", ORDERS)
def test_it_is_no_worse_than_a_thousand_starts_of_another_optimiser(order):
    """Random pairs, then alternating least squares, which is exact in each half step."""
    weight = random_kernel(5, 4)
    best = (factorise(weight, 2, order=order).expand() - weight).square().sum()
    matrices = weight.flatten(2) if order == "pw_dw" else weight.flatten(2).transpose(0, 1)
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(1000, *matrices.shape[:2], 2, generator=generator, dtype=torch.float64)
    losses = []
    for _ in range(30):
        right = torch.linalg.lstsq(left, matrices.expand(1000, -1, -1, -1)).solution
        losses.append((left @ right - matrices).square().sum((1, 2, 3)))
        left = torch.linalg.lstsq(right.mT, matrices.mT.expand(1000, -1, -1, -1)).solution.mT
    assert losses[0].min() > 1.05 * best
    assert losses[-1].min() >= best * (1 - 1e-12)
    assert losses[-1].median() < 1.01 * best  # the other optimiser does optimise


@pytest.mark.parametrize("order", ORDERS)
def test_a_kernel_that_is_separable_is_found_again(order):
    made = factorise(random_kernel(6, 5), 1, order=order).expand()
    for other in ORDERS:
        spectrum = separability(made).spectra[other]
        assert (spectrum.rank_for(energy=1) == 1) == (other is order)
    torch.testing.assert_close(factorise(made, 1, order=order).expand(), made)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rank", [1, 2])
def test_one_kernel_has_one_canonical_form(order, rank):
    factors = factorise(random_kernel(6, 5), rank, order=order)
    mix = torch.randn(len(factors.depthwise), rank, rank, dtype=torch.float64)
    depthwise = torch.einsum("ctu,cuxy->ctxy", mix, factors.depthwise)
    back = torch.linalg.inv(mix)
    pointwise = torch.einsum(
        "oiu,iut->oit" if order == "dw_pw" else "oiu,out->oit", factors.pointwise, back
    )
    other = type(factors)(order, depthwise, pointwise)
    torch.testing.assert_close(other.expand(), factors.expand())
    assert not torch.allclose(other.depthwise, factors.depthwise)
    canonical = other.canonical()
    torch.testing.assert_close(canonical.depthwise, factors.depthwise)
    torch.testing.assert_close(canonical.pointwise, factors.pointwise)
    flat = canonical.depthwise.flatten(2)
    torch.testing.assert_close(flat @ flat.mT, torch.eye(rank).expand(len(flat), -1, -1).double())
    assert (flat.gather(2, flat.abs().argmax(2, keepdim=True)) > 0).all()


def test_khatri_rao_form():
    pointwise, depthwise = torch.randn(6, 4), torch.randn(9, 4)
    product = khatri_rao(pointwise, depthwise)
    for c in range(4):
        torch.testing.assert_close(product[:, c], torch.kron(pointwise[:, c], depthwise[:, c]))
    factors = factorise(random_kernel(6, 4), 1)
    columns = khatri_rao(factors.pointwise[..., 0], factors.depthwise.flatten(1).T)
    torch.testing.assert_close(columns, factors.expand().transpose(0, 1).flatten(1).T)
    with pytest.raises(ValueError, match="as many columns, got 4 and 3"):
        khatri_rao(pointwise, torch.randn(9, 3))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rank", "groups"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_degrees_of_freedom_are_the_rank_of_the_jacobian(order, rank, groups):
    weight = random_kernel(4, 4)
    factors = factorise(weight, rank, order=order, groups=groups)

    def expanded(depthwise, pointwise):
        return type(factors)(order, depthwise, pointwise).expand().flatten()

    parts = torch.autograd.functional.jacobian(expanded, (factors.depthwise, factors.pointwise))
    jacobian = torch.cat([part.flatten(1) for part in parts], dim=1)
    found = torch.linalg.matrix_rank(jacobian, rtol=1e-9)
    assert degrees_of_freedom(weight, rank, order=order, groups=groups) == found
    assert found <= factors.depthwise.numel() + factors.pointwise.numel()


def test_the_scale_between_both_parts_is_no_freedom():
    weight = torch.empty(128, 64, 3, 3)
    assert degrees_of_freedom(weight) == 64 * 9 + 64 * 128 - 64
    assert degrees_of_freedom(weight, order="pw_dw") == 128 * 9 + 64 * 128 - 128
    assert degrees_of_freedom(weight, 9) == weight.numel()


def test_correlations_of_structured_and_of_random_kernels():
    blueprint = factorise(random_kernel(32, 24), 1, order="pw_dw").expand()
    found = separability(blueprint)
    assert found.intra_kernel_correlation == pytest.approx(1)
    assert found.cross_kernel_correlation < 0.5
    found = separability(random_kernel(32, 24, seed=3))
    assert found.intra_kernel_correlation == pytest.approx(found.of_random["pw_dw"], rel=0.05)
    assert found.cross_kernel_correlation == pytest.approx(found.of_random["dw_pw"], rel=0.05)


def test_no_energy_is_kept_whole():
    spectrum = separability(torch.zeros(4, 3, 3, 3)).spectra[Order.DW_PW]
    assert spectrum.explained == [1.0] * 4
    assert spectrum.rank_for(energy=0.9) == 1
    assert factorise(torch.zeros(4, 3, 3, 3)).expand().count_nonzero() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "expected a rank from 1 to 5, got 0"),
        ({"rank": 6}, "expected a rank from 1 to 5, got 6"),
        ({"order": "dwpw"}, "unknown order 'dwpw': did you mean dw_pw"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        factorise(random_kernel(5, 4), **arguments)


def test_fewest_pairs_for_a_share_or_an_error():
    spectrum = separability(random_kernel(8, 8)).spectra[Order.DW_PW]
    for rank, (kept, error) in enumerate(zip(spectrum.explained, spectrum.errors, strict=True), 1):
        assert spectrum.rank_for(energy=kept) == rank
        assert spectrum.rank_for(max_error=error) == rank
        assert kept == pytest.approx(1 - error**2)
    for words in ({"energy": 0.0}, {"energy": 1.1}, {"max_error": 1.0}, {"max_error": -0.1}):
        with pytest.raises(ValueError, match="expected 0 <"):
            spectrum.rank_for(**words)


def test_errors_of_this_room_have_the_one_root():
    assert issubclass(tc.AnalysisError, tc.TokenConvError)
