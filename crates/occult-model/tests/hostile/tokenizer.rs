//! Tokenizers.

use super::*;
use occult_model::TextTokenizer;

fn refused(dir: &Path, words: &[&str]) {
    let message = TextTokenizer::open(dir, load("olmoe").spec()).map(drop).expect_err("refused").to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

#[test]
fn is_missing() {
    let d = copy("olmoe");
    fs::remove_file(d.path().join("tokenizer.json")).expect("remove");
    refused(d.path(), &["tokenizer.json", "missing"]);
}

#[test]
fn is_broken() {
    let d = copy("olmoe");
    fs::write(d.path().join("tokenizer.json"), "{").expect("write");
    refused(d.path(), &["tokenizer.json"]);
}

#[test]
fn has_ids_the_model_lacks() {
    let d = copy("olmoe");
    edit(&d.path().join("tokenizer.json"), |t| t["model"]["vocab"]["extra"] = json!(96));
    refused(d.path(), &["tokenizer.json", "extra", "id 96", "vocabulary has 96"]);
}

#[test]
fn lacks_the_id_that_ends_a_text() {
    let d = copy("olmoe");
    fs::write(d.path().join("generation_config.json"), "{\"eos_token_id\": [2, 950]}").expect("write");
    refused(d.path(), &["tokenizer.json", "id 950"]);
}
