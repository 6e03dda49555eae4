"""Generators by what they are for; torch's global ones seeded inside and put back after."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfreeze.seeds import derive_seed, global_seed, numpy_generator, torch_generator


@given(st.integers(0, 2**63), st.text(max_size=20), st.lists(st.integers(0, 10**9), max_size=3))
def test_a_seed_fits_every_generator_and_depends_on_all_of_the_key(seed: int, purpose: str, key: list[int]) -> None:
    derived = derive_seed(seed, purpose, *key)
    assert 0 <= derived < 2**63
    others = [derive_seed(seed + 1, purpose, *key), derive_seed(seed, purpose + "x", *key)]
    others.append(derive_seed(seed, purpose, *key, 0))
    assert derived not in others
    assert derive_seed(seed, purpose, *key) == derived


def test_draws_inside_are_those_of_manual_seed_and_the_state_is_put_back() -> None:
    torch.manual_seed(derive_seed(7, "local training", 3, 5))
    expected = torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for _ in range(2):
        with global_seed(7, "local training", 3, 5):
            assert torch.equal(torch.nn.functional.dropout(torch.ones(50)), expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_generators_of_one_purpose_give_the_same_draws() -> None:
    assert torch.equal(
        torch.rand(5, generator=torch_generator(0, "shuffle", 1, 2)),
        torch.rand(5, generator=torch_generator(0, "shuffle", 1, 2)),
    )
    assert (numpy_generator(0, "fleet").random(5) == numpy_generator(0, "fleet").random(5)).all()
