from app.tables import Table, cell


def test_a_column_without_any_value_is_left_out():
    columns = {"exit": ["1", "2"], "speedup": [cell(1.25, "{:.1f}x"), cell(None, "{:.1f}x")], "gap": ["-", "-"]}
    table = Table.of_columns("Exits", columns)
    assert table == Table("Exits", ("exit", "speedup"), [("1", "1.2x"), ("2", "-")])
    assert table.as_markdown() == "**Exits**\n\n| exit | speedup |\n| --- | --- |\n| 1 | 1.2x |\n| 2 | - |"
