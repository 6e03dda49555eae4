"""Who is asked together: groups that no number of ranks changes, and work that is spread."""

from hypothesis import given
from hypothesis import strategies as st

from fedfreeze.server.asking import groups_to_ask

FLEETS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def asked(samples: list[int], world_size: int, most_samples: int = 50):
    caps = [1000 + device for device in range(len(samples))]
    return groups_to_ask(range(len(samples)), samples, caps, most_samples=most_samples, world_size=world_size)


@given(FLEETS, st.integers(1, 5), st.integers(1, 100))
def test_each_device_is_asked_once_in_order_and_groups_hold_to_their_limit(samples, world_size, most_samples):
    groups = asked(samples, world_size, most_samples)
    assert [device for group in groups for device in group.devices] == list(range(len(samples)))
    for group in groups:
        assert group.cap_bytes == tuple(1000 + device for device in group.devices)
        assert len(group.devices) == 1 or sum(samples[device] for device in group.devices) <= most_samples


@given(FLEETS, st.integers(1, 5), st.integers(1, 5))
def test_no_number_of_ranks_changes_who_is_asked_together(samples, one, other):
    assert [group.devices for group in asked(samples, one)] == [group.devices for group in asked(samples, other)]


@given(FLEETS, st.integers(1, 5))
def test_no_rank_has_more_than_a_group_beyond_another(samples, world_size):
    groups = asked(samples, world_size)
    work = [0] * world_size
    for group in groups:
        work[group.rank] += sum(samples[device] for device in group.devices)
    largest = max(sum(samples[device] for device in group.devices) for group in groups)
    assert max(work) - min(work) <= largest


def test_nobody_is_asked_in_no_group():
    assert groups_to_ask([], [], [], most_samples=10, world_size=2) == ()
