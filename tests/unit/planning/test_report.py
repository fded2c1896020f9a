from app.planning.plan import Change
from app.planning.report import advice


def test_each_change_that_fits_is_advised_with_its_peak():
    assert advice([Change("--data.batch_size 2", 2_500_000), Change("--a 1", 999)]).splitlines()[1:] == [
        "    --data.batch_size 2    (2.5 MB)",
        "    --a 1    (999 bytes)",
    ]
