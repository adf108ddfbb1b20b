"""The orders of samples: permutations, mixtures, and the published order against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radlads.data.order import BLOCK, MagicPrime, Mixture, Shuffled, is_prime, magic_prime
from radlads.errors import RadladsError

# Protocol section 1.8: the primes of the published configs for a stream of this many tokens.
DCLM_TOKENS = 1_500_087_317
PUBLISHED = {256: 5859677, 512: 2929793, 1024: 1464917, 2048: 732461, 4096: 366227, 8192: 183089, 16384: 91541}


@given(samples=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_every_epoch_visits_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    order = Shuffled(samples, seed)
    assert len(order) == samples
    assert sorted(order.place(epoch * samples + i) for i in range(samples)) == list(range(samples))


def test_epochs_and_seeds_differ_and_the_order_is_fixed() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [Shuffled(100, seed).place(number * 100 + i) for i in range(100)]

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) != epoch(2, 0)
    # The order is part of what a recipe means: it must not change from one version to the next.
    assert epoch(1337, 0)[:6] == [35, 51, 92, 62, 21, 80]


def test_the_order_is_well_mixed() -> None:
    order = Shuffled(10_000, 5)
    places = np.array([order.place(i) for i in range(10_000)])
    assert abs(np.corrcoef(np.arange(10_000), places)[0, 1]) < 0.04
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.04


def test_a_huge_stream_needs_no_table() -> None:
    places = {Shuffled(10**15, 1).place(i) for i in range(1000)}
    assert len(places) == 1000 and max(places) < 10**15


@pytest.mark.parametrize(("seq_len", "prime"), PUBLISHED.items())
def test_the_published_primes_are_found(seq_len: int, prime: int) -> None:
    assert magic_prime(DCLM_TOKENS // seq_len) == prime
    assert 0.99 < prime / (DCLM_TOKENS / seq_len) <= 1 and prime % 3 == 2 and is_prime(prime)


def test_the_published_order_by_hand() -> None:
    # P = 17: floor(17 * 0.6180...) = 10; ii = 1, 2, 3: 10, 80 mod 17 = 12, 270 mod 17 = 15
    order = MagicPrime(20)
    assert (len(order), [order.place(i) for i in range(3)]) == (17, [10, 12, 15])
    assert sorted(order.place(i) for i in range(17)) == list(range(17))
    # P = 2929793: floor(2929793 * 0.6180339887...) = 1810711; 1810711 * 8 - 4 * 2929793 = 2766516
    published = MagicPrime(DCLM_TOKENS // 512)
    assert [published.place(i) for i in range(2)] == [1810711, 2766516]


def test_the_published_order_does_not_depend_on_processes() -> None:
    # Upstream: ii = 1 + epoch * 40320 + idx * world_size + rank, with 40320 samples in an "epoch".
    order, prime = MagicPrime(10_000), magic_prime(10_000)
    factor = int(prime * ((5**0.5 - 1) / 2))
    for world in (1, 8):
        seen = {}
        for epoch in (0, 2):
            for idx in (0, 1, 40320 // world - 1):
                for rank in range(world):
                    position = epoch * 40320 + idx * world + rank
                    seen[position] = factor * (1 + position) ** 3 % prime
        assert all(order.place(position) == place for position, place in seen.items())


def test_too_few_samples_for_a_prime() -> None:
    assert magic_prime(3) == 2
    with pytest.raises(RadladsError, match="R302"):
        MagicPrime(2)


@settings(deadline=None, max_examples=25)
@given(weights=st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=5), seed=st.integers(0, 2**62))
def test_a_mixture_keeps_its_proportions_and_visits_each_position_of_a_part_once(weights: list[float], seed: int) -> None:
    mixture = Mixture(tuple(weights), seed)
    found = [mixture.find(index) for index in range(2 * BLOCK)]
    for part, weight in enumerate(weights):
        inside = [position for number, position in found if number == part]
        assert inside == list(range(len(inside)))
        assert abs(len(inside) / (2 * BLOCK) - weight / sum(weights)) <= len(weights) / BLOCK
        assert inside


def test_the_mixture_is_fixed_and_seeded() -> None:
    def parts(seed: int) -> list[int]:
        return [Mixture((3.0, 1.0), seed).find(index)[0] for index in range(200)]

    assert parts(1) == parts(1) != parts(2)
    assert parts(1337)[:12] == FIXED


FIXED = [0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0]
