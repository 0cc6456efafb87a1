//! `occult generate`

use std::io::Write;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Context, Result};
use occult_model::hf::GenerationDefaults;
use occult_model::{GenerateOptions, Message, Sampling, Stop};
use serde_json::json;

use crate::model;
use crate::model_args::GenerateArgs;
use crate::output::print_json;

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    let dir = &args.load.model;
    let spec = occult_model::hf::read_spec(dir)?;
    let defaults = GenerationDefaults::read(dir)?;
    let tokenizer = model::tokenizer(dir, &spec)?;
    let prompt = if args.chat {
        let message = |role: &str, text: &str| Message { role: role.into(), content: text.into() };
        let mut messages: Vec<Message> = args.system.iter().map(|s| message("system", s)).collect();
        messages.push(message("user", &args.prompt));
        tokenizer.encode(&tokenizer.chat(&messages)?, false)?
    } else {
        tokenizer.encode(&args.prompt, true)?
    };
    let recommended = |value: Option<f32>| value.filter(|_| defaults.do_sample);
    let temperature = if defaults.do_sample { defaults.temperature.unwrap_or(1.0) } else { 0.0 };
    let sampling = Sampling {
        temperature: args.temperature.unwrap_or(temperature),
        top_p: args.top_p.or(recommended(defaults.top_p)).unwrap_or(1.0),
        seed: args.seed,
    };
    let options =
        GenerateOptions { max_new_tokens: Some(args.max_tokens), sampling, stop_ids: defaults.eos_ids };
    let decoder = model::load(&args.load)?;

    let mut stdout = std::io::stdout().lock();
    let mut stream = tokenizer.stream();
    let (mut text, mut failed) = (String::new(), None);
    let start = Instant::now();
    let mut first = None;
    let result = occult_model::generate(&decoder, &prompt, &options, &mut |id| {
        first.get_or_insert_with(|| start.elapsed());
        let piece = stream(id)?;
        text.push_str(&piece);
        if !args.json
            && let Err(e) = stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush())
        {
            failed = Some(e);
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(()))
    });
    let total = start.elapsed().as_secs_f64();
    if let Some(error) = failed {
        return Err(error).context("cannot write to standard output");
    }
    let generated = result?;
    let first = first.map_or(total, |d| d.as_secs_f64());
    let later = generated.ids.len().saturating_sub(1);
    let rate = (later > 0).then(|| later as f64 / (total - first).max(1e-9));
    let stop = match generated.stop {
        Stop::StopId(_) => "end of text",
        Stop::MaxTokens => "max tokens",
        Stop::Context => "context full",
        Stop::Caller => "stopped",
    };
    if args.json {
        drop(stdout);
        return print_json(&json!({
            "text": text, "ids": generated.ids, "prompt_tokens": prompt.len(), "stop": stop,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
            "seconds_to_first_token": first, "tokens_per_second": rate,
        }));
    }
    writeln!(stdout).context("cannot write to standard output")?;
    eprintln!(
        "{} tokens after {} of the prompt, first after {}{}; {stop}",
        generated.ids.len(),
        prompt.len(),
        crate::output::seconds(first),
        rate.map_or(String::new(), |r| format!(", then {r:.1} tokens/s")),
    );
    Ok(())
}
