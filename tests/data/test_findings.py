from qtune.data import findings
from qtune.data.findings import Groups, Place


def test_all_rows_are_counted_and_the_first_places_kept(monkeypatch) -> None:
    monkeypatch.setattr(findings, "MOST_PLACES", 2)
    groups = Groups()
    for line in range(1, 5):
        groups.add("secret", f"r:{line}", "a key")
    assert groups.rows("secret") == groups.rows("secret", "unknown") == 4
    assert groups.by_code["secret"].places == [Place("r:1", "a key"), Place("r:2", "a key")]
