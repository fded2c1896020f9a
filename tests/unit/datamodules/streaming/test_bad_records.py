import pytest

from app.errors import DataError
from datamodules.readers.records import BadRecord, Document, LostRecords
from datamodules.streaming.bad_records import BadRecords


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "datamodules")
    return caplog


def records(*, good: int, bad: int = 0, chunks: int = 0, max_share: float = 0.1) -> BadRecords:
    found = BadRecords("web", max_share=max_share)
    for _ in range(good):
        found.count(Document("a", "text", origin="text"))
    for number in range(bad):
        found.count(BadRecord(f"a:{number}", "malformed"))
    found.chunks = chunks
    return found


def passes(found: BadRecords, *, complete: bool) -> bool:
    try:
        found.check(complete=complete)
    except DataError:
        return False
    return True


def test_records_are_counted_and_empty_ones_are_no_damage(logged: pytest.LogCaptureFixture) -> None:
    found = records(good=3, bad=2)
    logged.clear()
    found.count(BadRecord("b.py", "empty"))
    assert not logged.records
    assert (found.seen, found.skipped, found.failed, found.chunks) == (6, 3, 2, 0)


def test_of_all_records_exactly_the_share_may_be_bad() -> None:
    assert passes(records(good=90, bad=10, chunks=2), complete=True)
    assert not passes(records(good=89, bad=11, chunks=2), complete=True)
    assert not passes(records(good=8, bad=1), complete=True)
    some_empty = records(good=9, bad=1)
    for _ in range(5):
        some_empty.count(BadRecord("b.py", "empty"))
    assert passes(some_empty, complete=True)
    assert passes(records(good=0, max_share=0.0), complete=True)
    assert not passes(records(good=5, bad=1, max_share=0.0), complete=True)


def test_of_a_part_more_may_be_bad_by_chance_and_three_chunks_at_once() -> None:
    """16 chunks of 100 records, a quarter may be bad: 400, and 3 * sqrt(4) + 3 chunks more."""
    allowed = 400 + 900
    assert passes(records(good=1600 - allowed, bad=allowed, chunks=16, max_share=0.25), complete=False)
    assert not passes(records(good=1600 - allowed - 1, bad=allowed + 1, chunks=16, max_share=0.25), complete=False)
    assert not passes(records(good=1600 - allowed, bad=allowed, chunks=16, max_share=0.25), complete=True)
    assert passes(records(good=0, bad=9), complete=False)  # within the first chunk nothing is known


def test_a_bad_record_longer_than_many_chunks_is_one_record() -> None:
    assert passes(records(good=0, bad=1, chunks=60, max_share=0.01), complete=False)
    assert passes(records(good=2000, bad=1, chunks=62, max_share=0.01), complete=True)
    assert not passes(records(good=0, bad=10, chunks=60, max_share=0.01), complete=False)


def test_what_is_lost_counts_for_as_much_as_a_chunk_has() -> None:
    found = records(good=40, chunks=4)
    found.count(LostRecords("a.gz", "damaged"))
    assert (found.seen, found.failed, found.skipped) == (50, 10, 1)
    first = records(good=0)
    first.count(LostRecords("a.gz", "damaged"))
    assert (first.seen, first.failed) == (1, 1)
    begun = records(good=7)
    begun.count(LostRecords("a.gz", "damaged"))
    assert (begun.seen, begun.failed) == (14, 7)


def test_the_report_names_source_share_and_the_first_location_of_each_reason() -> None:
    found = records(good=1, bad=3)
    found.count(BadRecord("b:7", "no field"))
    with pytest.raises(DataError) as caught:
        found.check(complete=True)
    assert str(caught.value) == (
        "source 'web': 4 of 5 records are bad, more than max_bad_share 0.1; mend or exclude them, give a glob, or raise"
        " max_bad_share\n  a:0: malformed (and 2 more)\n  b:7: no field"
    )
    assert records(good=1).examples() == ""


def test_twenty_reasons_are_reported_and_the_first_goes_on_counting() -> None:
    found = records(good=0)
    for number in range(25):
        found.count(BadRecord(f"a:{number}", f"reason {number}"))
    found.count(BadRecord("a:99", "reason 0"))
    lines = found.examples().splitlines()[1:]
    assert lines == ["  a:0: reason 0 (and 1 more)", *(f"  a:{number}: reason {number}" for number in range(1, 20))]


def test_twenty_records_are_logged_one_by_one_and_each_once(logged: pytest.LogCaptureFixture) -> None:
    found = records(good=0, bad=19)
    found.count(BadRecord("a:0", "malformed"))  # in the second epoch
    assert [record.getMessage() for record in logged.records] == [
        f"source 'web': skipped a:{number}: malformed" for number in range(19)
    ]
    found.count(BadRecord("a:19", "malformed"))
    found.count(BadRecord("a:20", "malformed"))
    assert [record.getMessage() for record in logged.records][19:] == [
        "source 'web': skipped a:19: malformed",
        "source 'web': further skipped records are only counted",
    ]
    assert found.skipped == 22


def test_quiet_ones_are_not_logged(logged: pytest.LogCaptureFixture) -> None:
    found = BadRecords("web", max_share=0.1, quiet=True)
    found.count(BadRecord("a:0", "malformed"))
    assert not logged.records
    assert found.skipped == 1
