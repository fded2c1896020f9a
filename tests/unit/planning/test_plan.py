"""What a device has room for; tests/contract/test_plan.py plans whole runs."""

from app.planning.plan import Machine


def test_a_tenth_of_a_device_stays_free():
    assert [Machine(device_memory=1000.0).has_room_for(peak) for peak in (900, 901)] == [True, False]
    assert Machine().has_room_for(1) is None
