//! Loads a model directory and continues a prompt: `generate DIR "text" [NEW_TOKENS] [PREFILL_TOKENS]`.
//!
//! Times go to standard error: loading, and, with a fourth argument, a prefill of that many made-up tokens with and
//! without recording of the routing.

use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use occult_model::hf::GenerationDefaults;
use occult_model::{
    GenerateOptions, LoadOptions, ModelFiles, Result, RoutingRecord, TextTokenizer, generate, prefill,
};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, prompt, rest @ ..] = &args[..] else {
        eprintln!("usage: generate DIR TEXT [NEW_TOKENS] [PREFILL_TOKENS]");
        return Ok(());
    };
    let number = |i: usize| rest.get(i).and_then(|n| n.parse::<usize>().ok());
    let dir = Path::new(dir);
    let start = Instant::now();
    let model = ModelFiles::open(dir, LoadOptions::default())?.load()?;
    eprintln!("loaded in {:.2} s", start.elapsed().as_secs_f64());
    let tokenizer = TextTokenizer::open(dir, model.spec())?;
    let ids = tokenizer.encode(prompt, true)?;
    let mut stream = tokenizer.stream();
    let options = GenerateOptions {
        max_new_tokens: Some(number(0).unwrap_or(32)),
        stop_ids: GenerationDefaults::read(dir)?.eos_ids,
        ..GenerateOptions::default()
    };
    let start = Instant::now();
    let text = generate(&model, &ids, &options, &mut |id| {
        print!("{}", stream(id)?);
        let _ = std::io::stdout().flush();
        Ok(ControlFlow::Continue(()))
    })?;
    println!();
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("{} tokens in {seconds:.2} s, {:.2} tokens/s", text.ids.len(), text.ids.len() as f64 / seconds);
    if let Some(n) = number(1) {
        let vocab = model.spec().vocab_size as u64;
        let ids: Vec<u32> = (0..n as u64).map(|i| ((i * 2_654_435_761 + 12_345) % vocab) as u32).collect();
        let mut rows = 0;
        for record in [false, true, false, true] {
            let mut observe = |r: &RoutingRecord<'_>| {
                rows += r.tokens().num_tokens();
                Ok(())
            };
            let start = Instant::now();
            prefill(&model, &ids, &mut model.new_cache(), record.then_some(&mut observe))?;
            let seconds = start.elapsed().as_secs_f64();
            eprintln!(
                "prefill of {n}, recording {record}: {seconds:.2} s, {:.1} tokens/s",
                n as f64 / seconds
            );
        }
        eprintln!("{rows} routing rows were recorded");
    }
    Ok(())
}
