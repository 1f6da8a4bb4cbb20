from qtune.audit import issues
from qtune.audit.issues import Groups, Place


def test_all_rows_are_counted_and_the_first_places_kept(monkeypatch) -> None:
    monkeypatch.setattr(issues, "MOST_PLACES", 2)
    groups = Groups()
    for line in range(1, 5):
        groups.add("secret", f"r:{line}", "a key")
    assert groups.rows("secret") == groups.rows("secret", "unknown") == 4
    assert groups.by_code["secret"].places == [Place("r:1", "a key"), Place("r:2", "a key")]
