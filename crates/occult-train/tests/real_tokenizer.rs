//! Chats through the tokenizer and the template of a model directory.
#![cfg(feature = "tokenizer")]

use std::path::Path;

use occult_model::TextTokenizer;
use occult_train::data::encode::ModelTokenizer;
use occult_train::data::{Record, Tokenize, Turn, encode};

fn learned(record: &Record) -> (String, usize) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../occult-model/tests/fixtures/olmoe");
    let spec = occult_model::hf::read_spec(&dir).unwrap();
    let text = TextTokenizer::open(&dir, &spec).unwrap();
    let end = text.encode("</s>", false).unwrap();
    assert_eq!(end.len(), 1);
    let tokenizer = ModelTokenizer { text: &text, begin: None, end: end[0] };
    let encoded = encode(record, &tokenizer).unwrap();
    let ids: Vec<u32> =
        encoded.ids.iter().zip(&encoded.learn).filter(|(_, l)| **l).map(|(id, _)| *id).collect();
    let ends = ids.iter().filter(|id| **id == tokenizer.end()).count();
    (text.decode(&ids).unwrap(), ends)
}

#[test]
fn only_what_the_assistant_says_is_learned() {
    let turn = |role: &str, content: &str| Turn { role: role.into(), content: content.into() };
    let chat = vec![
        turn("system", "be brief"),
        turn("user", "one"),
        turn("assistant", "two"),
        turn("user", "three"),
        turn("assistant", "four"),
    ];
    let (text, ends) = learned(&Record::Chat(chat));
    assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["two", "four"], "{text:?}");
    assert_eq!(ends, 2);
    let task = Record::Instruction { instruction: "say".into(), input: String::new(), output: "two".into() };
    assert_eq!(learned(&task), ("two".into(), 1));
}
