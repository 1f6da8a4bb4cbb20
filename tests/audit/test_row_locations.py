from qtune.audit.row_locations import Places, parted


def test_places_come_back_as_they_were() -> None:
    given = ["rows.jsonl:1", "rows.jsonl:12,345", "x row 7.parquet row 9", "rows.jsonl:2"]
    places = Places()
    for place in given:
        places.add(place)
    assert [places[row] for row in range(len(places))] == given


def test_a_name_may_hold_what_parts_names() -> None:
    assert parted("a:b row 3:1,017") == ("a:b row 3:", 1017)
