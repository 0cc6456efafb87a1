//! Task files.

use super::*;
use occult_model::eval::read_items;

#[test]
fn broken_lines_are_named() {
    let temp = tempfile::tempdir().expect("temp");
    let path = temp.path().join("task.jsonl");
    let good = "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 1}\n";
    for (line, words) in [
        ("{", ["line 2", "task.jsonl"]),
        ("{\"context\": \"a\", \"choices\": [\"b\"]}", ["line 2", "answer"]),
        ("{\"context\": \"a\", \"choices\": [\"b\"], \"answer\": 1}", ["line 2", "there are 1 choices"]),
        ("{\"context\": \"a\", \"choices\": [\"\"], \"answer\": 0}", ["line 2", "empty"]),
    ] {
        fs::write(&path, format!("{good}{line}\n")).expect("write");
        let message = read_items(&path).expect_err("broken").to_string();
        assert!(words.iter().all(|w| message.contains(w)), "{message}");
    }
    fs::write(&path, "\n\n").expect("write");
    assert!(read_items(&path).expect_err("empty").to_string().contains("no questions"));
}
