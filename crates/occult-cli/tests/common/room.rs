//! A folder in which tiny models are trained.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use super::models::fixtures;

fn fixture(case: &str) -> PathBuf {
    fixtures().join(case)
}

pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_occult"));
    command.args(args);
    command
}

/// A folder with a model configuration, a tokenizer of few words, and data.
pub(crate) struct Room(tempfile::TempDir);

impl Room {
    pub(crate) fn new() -> Self {
        let room = Self(tempfile::tempdir().expect("a directory"));
        fs::create_dir(room.at("config")).expect("created");
        fs::create_dir(room.at("model")).expect("created");
        let mut config: Value =
            serde_json::from_slice(&fs::read(fixture("olmoe").join("config.json")).expect("read"))
                .expect("JSON");
        config["eos_token_id"] = 0.into();
        let words = ["<end>", "a", "b", "c", "d", "e", "f", "g", "h"];
        let vocab: serde_json::Map<String, Value> =
            words.iter().zip(0..).map(|(w, i)| ((*w).to_owned(), i.into())).collect();
        let tokenizer = serde_json::json!({
            "version": "1.0",
            "pre_tokenizer": { "type": "Whitespace" },
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<end>" },
        });
        for name in ["config", "model"] {
            fs::write(room.0.path().join(name).join("config.json"), config.to_string()).expect("written");
            fs::write(room.0.path().join(name).join("tokenizer.json"), tokenizer.to_string())
                .expect("written");
        }
        fs::copy(fixture("olmoe").join("model.safetensors"), room.at("model/model.safetensors"))
            .expect("copied");
        let text: String = (0..60)
            .map(|i| {
                format!(
                    "{{\"text\": \"{}\"}}\n",
                    ["a b c d", "e f g h a", "c b a"][i % 3]
                        .repeat(1 + i % 4)
                        .replace("da", "d a")
                        .replace("ae", "a e")
                        .replace("ac", "a c")
                )
            })
            .collect();
        room.write("data.jsonl", &text);
        room
    }

    pub(crate) fn at(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) -> String {
        fs::write(self.at(name), text).expect("written");
        self.at(name)
    }

    /// `verb FROM --data data.jsonl -o OUT` with small sizes and `more`.
    pub(crate) fn args(&self, verb: &str, out: &str, more: &[&str]) -> Vec<String> {
        let from = self.at(if verb == "tune" { "model" } else { "config" });
        let fixed = format!(
            "{verb} {from} --data {} -o {} --length 8 --batch-tokens 32 --micro-batch 2 --steps 6",
            self.at("data.jsonl"),
            self.at(out)
        );
        let fixed = fixed.split(' ').map(str::to_owned);
        fixed
            .chain(["--checkpoint-every", "2", "--threads", "1"].map(str::to_owned))
            .chain(more.iter().map(|s| (*s).to_owned()))
            .collect()
    }

    pub(crate) fn weights(&self, out: &str) -> Vec<u8> {
        fs::read(self.at(&format!("{out}/model.safetensors"))).expect("weights")
    }

    pub(crate) fn log(&self, out: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.at(&format!("{out}/training/log.jsonl"))).expect("log");
        text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
    }
}

pub(crate) fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}
