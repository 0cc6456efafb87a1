//! Encodes files into a token store and says how many sequences they give.
//!
//! ```text
//! tokenize TOKENIZER.json END_ID STORE FILE...
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use occult_train::data::{LongDocument, PackOptions, Packed, StoreWriter, Tokenize, build_store};
use occult_train::{Result, TrainError};

struct Json(tokenizers::Tokenizer, u32);

impl Tokenize for Json {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.0.encode(text, false).map_err(|e| TrainError::model("encoding", e))?;
        Ok(encoding.get_ids().to_vec())
    }
    fn end(&self) -> u32 {
        self.1
    }
}

fn run(args: &[String]) -> Result<()> {
    let [tokenizer, end, store, files @ ..] = args else {
        return Err(TrainError::request("usage: tokenize TOKENIZER.json END_ID STORE FILE..."));
    };
    let end = end.parse().map_err(|_| TrainError::request(format!("{end} is no token id")))?;
    let tokenizer = tokenizers::Tokenizer::from_file(tokenizer);
    let tokenizer = Json(tokenizer.map_err(|e| TrainError::model("opening the tokenizer", e))?, end);
    let mut writer = StoreWriter::create(&PathBuf::from(store), &args.join(" "))?;
    let inputs: Vec<(PathBuf, _)> = files.iter().map(|f| (PathBuf::from(f), None)).collect();
    build_store(&inputs, &tokenizer, &mut writer)?;
    let store = writer.finish()?;
    println!("{} documents, {} tokens", store.num_documents(), store.num_tokens());
    for (source, file) in (0u32..).zip(files) {
        let options = PackOptions {
            length: 512,
            long: LongDocument::Split,
            validation: 0.0,
            validation_part: false,
            source: Some(source),
        };
        let packed = Packed::new(&store, &options)?;
        println!("{file}: {} inputs, {} sequences of 512", packed.num_inputs(), packed.num_sequences());
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
