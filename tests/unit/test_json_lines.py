import json
from pathlib import Path

from m4train.json_lines import keep_lines, read_lines


def test_whole_lines_up_to_the_step_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert keep_lines(path, 3) == read_lines(path) == []
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5]
    assert keep_lines(path) == keep_lines(path, 9) == [{"step": step} for step in range(1, 6)]
    assert path.read_text().endswith('{"step": 5}\n')
    assert keep_lines(path, 3) == [{"step": step} for step in range(1, 4)]
    assert path.read_text().count("\n") == 3
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
