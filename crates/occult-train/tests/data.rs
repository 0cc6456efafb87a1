//! Files in, batches out: formats, errors, masks, packing, order.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;

use occult_train::data::*;
use occult_train::{Result, TrainError};
use proptest::prelude::*;

/// One id per character; chats as `<role>text|`.
struct Letters;

impl Tokenize for Letters {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(text.chars().map(|c| if c == '|' { 1 } else { c as u32 }).collect())
    }
    fn end(&self) -> u32 {
        1
    }
    fn chat(&self, turns: &[Turn], prompt: bool) -> Result<Option<String>> {
        let text: String = turns.iter().map(|t| format!("<{}>{}|", t.role, t.content)).collect();
        Ok(Some(if prompt { text + "<assistant>" } else { text }))
    }
}

fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::File::create(&path).unwrap().write_all(content).unwrap();
    (dir, path)
}

fn records(name: &str, content: &str) -> Result<Vec<Record>> {
    let (_dir, path) = file(name, content.as_bytes());
    let mut out = vec![];
    for_each_record(&path, Format::detect(&path)?, &mut |r, _| {
        out.push(r);
        Ok(())
    })?;
    Ok(out)
}

fn fails(name: &str, content: &[u8]) -> String {
    let (dir, path) = file(name, content);
    let mut writer = StoreWriter::create(&dir.path().join("store"), "").unwrap();
    build_store(&[(path, None)], &Letters, &mut writer).unwrap_err().to_string()
}

#[test]
fn formats_are_found_by_content() {
    let text = records("a.txt", "\u{feff}one\ntwo\n<|endoftext|>\nthree\n").unwrap();
    assert_eq!(text, [Record::Text("one\ntwo\n".into()), Record::Text("three\n".into())]);
    let task = Record::Instruction { instruction: "do".into(), input: "x".into(), output: "y".into() };
    let bare = Record::Instruction { instruction: "do".into(), input: String::new(), output: "y".into() };
    let list = r#"[{"instruction":"do","input":"x","output":"y"},
                   {"instruction":"do","output":"y"}]"#;
    assert_eq!(records("a.json", list).unwrap(), [task.clone(), bare]);
    let lines = "\n{\"instruction\":\"do\",\"input\":\"x\",\"output\":\"y\"}\n\n";
    assert_eq!(records("a.jsonl", lines).unwrap(), [task]);
    assert_eq!(records("a.jsonl", "{\"text\":\"t\"}").unwrap(), [Record::Text("t".into())]);
    let chat = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;
    assert!(matches!(&records("c.jsonl", chat).unwrap()[0], Record::Chat(turns) if turns.len() == 2));
    // A text that begins with a brace is a text.
    assert_eq!(records("a.txt", "{x}").unwrap(), [Record::Text("{x}".into())]);
}

#[test]
fn errors_name_the_file_and_the_line() {
    for (name, content, expected) in [
        ("e.txt", &b""[..], "the file is empty"),
        ("e.jsonl", b"\n \n", "the file is empty"),
        ("b.txt", b"fine\nab\0c\n", "b.txt, line 2: not a text file: byte 2 of the line is zero"),
        ("b.txt", b"fine\n\xff\xfe\n", "b.txt, line 2: not a UTF-8 text file: byte 0"),
        ("j.jsonl", b"{\"text\":\"a\"}\n{\"text\":\n", "j.jsonl, line 2: broken JSON"),
        ("j.json", b"[{\"instruction\":\"a\",\"output\":\"b\"},\n{]", "j.json, line 2: broken JSON"),
        ("m.jsonl", b"{\"instruction\":\"a\"}\n", "m.jsonl, line 1: missing field `output`"),
        (
            "m.json",
            b"[{\"instruction\":\"a\",\"output\":\"b\"},{\"output\":\"b\"}]",
            "record 2: missing field",
        ),
        ("t.jsonl", b"{\"text\":1}\n", "line 1: field `text` is not a text"),
        (
            "n.jsonl",
            b"\n\n text: a\n",
            "n.jsonl, line 3: begins with 't'; a .jsonl file is expected to hold JSON",
        ),
        ("n.json", b"\xef\xbb\xbf\"a\"", "n.json, line 1: begins with '\"'"),
        ("o.jsonl", b"{\"prose\":\"x\"}\n", "has the fields [prose]; expected text, or"),
        ("c.jsonl", b"{\"messages\":[{\"role\":\"user\",\"content\":\"q\"}]}", "no message of the assistant"),
        (
            "c.jsonl",
            b"{\"messages\":[{\"role\":\"user\"}]}",
            "line 1: field `messages`: missing field `content`",
        ),
    ] {
        let message = fails(name, content);
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
}

#[test]
fn a_chat_needs_a_template_that_only_appends() {
    struct Bare;
    impl Tokenize for Bare {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Letters.encode(text)
        }
        fn end(&self) -> u32 {
            1
        }
    }
    struct Rewriting;
    impl Tokenize for Rewriting {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Letters.encode(text)
        }
        fn end(&self) -> u32 {
            1
        }
        fn chat(&self, turns: &[Turn], prompt: bool) -> Result<Option<String>> {
            let text = Letters.chat(turns, prompt)?.unwrap_or_default();
            Ok(Some(format!("{}{text}", turns.len())))
        }
    }
    let turn = |role: &str, content: &str| Turn { role: role.into(), content: content.into() };
    let chat = Record::Chat(vec![turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")]);
    assert!(encode(&chat, &Bare).unwrap_err().to_string().contains("no chat template"));
    assert!(encode(&chat, &Rewriting).unwrap_err().to_string().contains("renders message 2 differently"));
    assert!(encode(&chat, &Letters).is_ok());
}

fn learned(encoded: &Encoded) -> String {
    let chosen = encoded.ids.iter().zip(&encoded.learn).filter(|(_, l)| **l);
    chosen.map(|(id, _)| char::from_u32(*id).unwrap()).collect()
}

#[test]
fn only_answers_are_learned() {
    let task = Record::Instruction { instruction: "do".into(), input: String::new(), output: "yes".into() };
    let encoded = encode(&task, &Letters).unwrap();
    assert_eq!(learned(&encoded), "yes\u{1}");
    assert!(encoded.ids.len() > 50);
    let turn = |role: &str, content: &str| Turn { role: role.into(), content: content.into() };
    let chat = vec![turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")];
    let encoded = encode(&Record::Chat(chat.clone()), &Letters).unwrap();
    assert_eq!(learned(&encoded), "a\u{1}b\u{1}");
    let text: String = encoded.ids.iter().map(|i| char::from_u32(*i).unwrap()).collect();
    assert_eq!(text.replace('\u{1}', "|"), Letters.chat(&chat, false).unwrap().unwrap());
    assert_eq!(learned(&encode(&Record::Text("ab".into()), &Letters).unwrap()), "ab\u{1}");
}

#[test]
fn each_document_decides_what_becomes_of_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: String| {
        std::fs::write(dir.path().join(name), content).unwrap();
        (dir.path().join(name), None)
    };
    let task = format!("{{\"instruction\":\"do\",\"output\":\"{}\"}}\n", "y".repeat(300));
    let files = [
        write("prose.txt", "x".repeat(1000)),
        write("tasks.jsonl", task.repeat(2)),
        write("more.txt", "z".repeat(500)),
    ];
    let path = dir.path().join("mixed.store");
    let mut writer = StoreWriter::create(&path, "").unwrap();
    build_store(&files, &Letters, &mut writer).unwrap();
    let store = writer.finish().unwrap();
    let documents: Vec<_> = (0..4).map(|i| store.document(i).unwrap()).collect();
    assert_eq!(
        documents.iter().map(|d| (d.source, d.prompted)).collect::<Vec<_>>(),
        [(0, false), (1, true), (1, true), (2, false)]
    );
    let packed = Packed::new(&store, &options(256, LongDocument::ByDocument)).unwrap();
    assert_eq!(packed.num_truncated(), 2);
    // All of the texts (each has its length in inputs) and the beginning of both tasks.
    assert_eq!(packed.num_inputs(), 1000 + 2 * 256 + 500);
    let whole = (0..packed.num_sequences()).filter(|s| packed.sequence(*s)[0].start == documents[1].start);
    assert_eq!(whole.map(|s| packed.sequence(s).len()).collect::<Vec<_>>(), [1]);
    let tasks = PackOptions { source: Some(1), ..options(256, LongDocument::ByDocument) };
    assert_eq!(Packed::new(&store, &tasks).unwrap().num_sequences(), 2);
}

#[test]
fn what_a_killed_encoding_leaves_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let killed = StoreWriter::create(&dir.path().join("a.store"), "").unwrap();
    // As if the process had ended: nothing runs at the end.
    std::mem::forget(killed);
    std::fs::create_dir(dir.path().join("step-00000001.partial")).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    remove_unfinished(dir.path()).unwrap();
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["step-00000001.partial"]);
    remove_unfinished(&dir.path().join("absent")).unwrap();
}

#[test]
fn a_large_text_is_cut_at_empty_lines() {
    let paragraph = format!("{}\n\n", "x".repeat(700_000));
    let pieces = records("l.txt", &paragraph.repeat(4)).unwrap();
    assert_eq!(pieces.len(), 2);
    assert!(pieces.iter().all(|p| matches!(p, Record::Text(t) if t.len() == 2 * paragraph.len())));
}

/// Documents of the given lengths; token ids are 2, 3, 4 ... over all documents, so every token is its own name.
fn numbered(lengths: &[usize]) -> TokenStore {
    let mut next = 2;
    TokenStore::in_memory(lengths.iter().enumerate().map(|(i, &len)| {
        let ids: Vec<u32> = (next..next + len as u32).collect();
        next += len as u32;
        let learn = ids.iter().map(|id| id % 5 != 0).collect();
        (Encoded { ids, learn }, (i % 2) as u32, occult_train::random::mix(i as u64))
    }))
}

fn options(length: usize, long: LongDocument) -> PackOptions {
    PackOptions { length, long, validation: 0.0, validation_part: false, source: None }
}

proptest! {
    #[test]
    fn every_token_but_the_first_of_a_document_is_a_target_once(
        lengths in prop::collection::vec(0usize..30, 1..20), length in 1usize..20, seed: Option<u64>,
    ) {
        prop_assume!(lengths.iter().any(|l| *l > 1));
        let store = numbered(&lengths);
        let mut expected = BTreeSet::new();
        for i in 0..store.num_documents() {
            let d = store.document(i).unwrap();
            expected.extend((d.start + 1..d.start + d.len.max(1)).map(|t| t as u32 + 2).filter(|id| id % 5 != 0));
        }
        let packed = Packed::new(&store, &options(length, LongDocument::Split)).unwrap();
        let n = packed.num_sequences();
        let loader = Loader::new(store, packed, seed);
        let batch = loader.batch(3 * n as u64, n, 0, 1).unwrap();
        let mut seen = BTreeSet::new();
        for (at, (&token, &target)) in batch.tokens.iter().zip(&batch.targets).enumerate() {
            if target != IGNORE {
                prop_assert_eq!(target, token + 1);
                prop_assert!(seen.insert(target), "{} is a target twice", target);
            }
            // Positions count up inside a segment and restart with it.
            let first = at % length == 0 || batch.segments[at] != batch.segments[at - 1];
            if batch.segments[at] != u32::MAX {
                prop_assert_eq!(batch.positions[at], if first { 0 } else { batch.positions[at - 1] + 1 });
                prop_assert!(first || token == batch.tokens[at - 1] + 1);
            } else {
                prop_assert_eq!(target, IGNORE);
            }
        }
        prop_assert_eq!(seen, expected);
    }

    #[test]
    fn ranks_together_read_what_one_rank_reads(world in 1usize..6, global in 1usize..9, consumed in 0u64..100) {
        let store = numbered(&[9; 12]);
        let packed = Packed::new(&store, &options(8, LongDocument::Refuse)).unwrap();
        let loader = Loader::new(store, packed, Some(7));
        let whole = loader.batch(consumed, global, 0, 1).unwrap();
        let parts: Vec<Batch> = (0..world).map(|r| loader.batch(consumed, global, r, world).unwrap()).collect();
        let joined: Vec<u32> = parts.iter().flat_map(|b| b.tokens.clone()).collect();
        prop_assert_eq!(&joined, &whole.tokens);
        prop_assert_eq!(parts.iter().map(Batch::num_targets).sum::<u64>(), whole.num_targets());
        let again: Vec<u32> = whole.split(2).iter().flat_map(|b| b.targets.clone()).collect();
        prop_assert_eq!(again, whole.targets);
    }
}

#[test]
fn epochs_differ_and_each_holds_every_sequence() {
    let store = numbered(&[9; 50]);
    let packed = Packed::new(&store, &options(8, LongDocument::Refuse)).unwrap();
    let loader = Loader::new(store, packed, Some(1));
    let epoch = |e: u64| (e * 50..e * 50 + 50).map(|at| loader.sequence_at(at)).collect::<Vec<_>>();
    assert_ne!(epoch(0), epoch(1));
    for e in 0..3 {
        assert_eq!(epoch(e).into_iter().collect::<BTreeSet<_>>().len(), 50);
    }
}

#[test]
fn long_documents_are_cut_or_refused() {
    let store = numbered(&[5, 30, 5]);
    let refused = Packed::new(&store, &options(10, LongDocument::Refuse)).unwrap_err();
    assert_eq!(refused.to_string(), "document 2 (source 1) has 29 inputs, the sequence length is 10");
    let cut = Packed::new(&store, &options(10, LongDocument::Truncate)).unwrap();
    assert_eq!((cut.num_truncated(), cut.num_inputs(), cut.num_sequences()), (1, 18, 3));
    let split = Packed::new(&store, &options(10, LongDocument::Split)).unwrap();
    assert_eq!((split.num_truncated(), split.num_inputs(), split.num_sequences()), (0, 37, 4));
    let one = PackOptions { source: Some(1), ..options(10, LongDocument::Split) };
    assert_eq!(Packed::new(&store, &one).unwrap().num_inputs(), 29);
    let none = PackOptions { source: Some(9), ..options(10, LongDocument::Split) };
    assert!(Packed::new(&store, &none).unwrap_err().to_string().contains("no document is left"));
}

#[test]
fn validation_is_a_fixed_share_by_content() {
    let store = numbered(&[3; 2000]);
    let part = |validation_part, validation| {
        let o = PackOptions { validation, validation_part, ..options(2, LongDocument::Split) };
        Packed::new(&store, &o).map(|p| p.num_sequences()).unwrap_or(0)
    };
    assert_eq!(part(false, 0.1) + part(true, 0.1), 2000);
    assert!((150..250).contains(&part(true, 0.1)), "{}", part(true, 0.1));
    assert_eq!(part(true, 0.0), 0);
    let text = |t: &str| Record::Text(t.into()).hash();
    assert_eq!(text("a"), text("a"));
    assert_ne!(text("a"), text("b"));
}

#[test]
fn a_store_on_disk_equals_one_in_memory_and_is_checked() {
    let (dir, path) = file("a.txt", b"hello\n<|endoftext|>\nworld of tokens\n");
    let at = dir.path().join("store");
    let mut writer = StoreWriter::create(&at, "letters").unwrap();
    build_store(&[(&path, None)], &Letters, &mut writer).unwrap();
    let store = writer.finish().unwrap();
    assert_eq!((store.num_documents(), store.num_tokens(), store.description()), (2, 7 + 17, "letters"));
    assert!(matches!(StoreWriter::create(&at, ""), Err(TrainError::Request(_))));
    let packed = Packed::new(&store, &options(4, LongDocument::Split)).unwrap();
    let batch = Loader::new(store, packed, None).batch(0, 6, 0, 1).unwrap();
    let text: String = batch.tokens.iter().filter_map(|t| char::from_u32(*t)).collect();
    assert_eq!(text.trim_end_matches('\0'), "hello\nworld of tokens\n");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "a temporary directory is left");

    let tokens = std::fs::File::options().write(true).open(at.join("tokens.bin")).unwrap();
    tokens.set_len(20).unwrap();
    assert!(matches!(TokenStore::open(&at), Err(TrainError::Truncated { expected: 96, found: 20, .. })));
    let head =
        std::fs::read_to_string(at.join("store.json")).unwrap().replace("\"version\": 1", "\"version\": 9");
    std::fs::write(at.join("store.json"), head).unwrap();
    assert!(matches!(TokenStore::open(&at), Err(TrainError::Version { found: 9, .. })));
}
