//! `occult generate`

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use occult_model::hf::GenerationDefaults;
use occult_model::{
    Decoder, GenerateOptions, Generated, Message, ModelSpec, Sampler, Sampling, Stop, TextTokenizer,
    check_prompt,
};
use serde_json::{Value, json};

use crate::model_args::GenerateArgs;
use crate::output::{print, print_json};
use crate::spreading::with_model;
use crate::{inputs, model};

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    let dir = &args.load.model;
    // What can be wrong without the weights is found before they are read.
    let spec = occult_model::hf::read_spec(dir)?;
    let defaults = GenerationDefaults::read(dir)?;
    let sampled = defaults.do_sample;
    let temperature = if sampled { defaults.temperature.unwrap_or(1.0) } else { 0.0 };
    let sampling = Sampling {
        temperature: args.temperature.unwrap_or(temperature),
        top_k: args.top_k.or(defaults.top_k.filter(|_| sampled)).unwrap_or(0),
        top_p: args.top_p.or(defaults.top_p.filter(|_| sampled)).unwrap_or(1.0),
        seed: args.seed,
    };
    Sampler::new(sampling)?;
    let options =
        GenerateOptions { max_new_tokens: Some(args.max_tokens), sampling, stop_ids: defaults.eos_ids };
    match &args.ids {
        Some(path) => of_ids(args, path, &spec, &options),
        None => of_text(args, &spec, &options),
    }
}

/// One prompt, and the text as it comes.
fn of_text(args: &GenerateArgs, spec: &ModelSpec, options: &GenerateOptions) -> Result<()> {
    let tokenizer = model::tokenizer(&args.load.model, spec)?;
    let prompt = prompt_ids(args, &tokenizer)?;
    check_prompt(spec, &prompt)?;
    let done = with_model(&args.load, &args.spread, |decoder| {
        if !decoder.is_first_rank() {
            decoder.attend()?;
            return Ok(None);
        }
        let mut stdout = std::io::stdout().lock();
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        let timed = Timed::run(decoder, &prompt, options, &mut |id| {
            let piece = stream(id)?;
            text.push_str(&piece);
            let mut show = || stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush());
            Ok(if args.json { Ok(()) } else { show() })
        })?;
        decoder.attend()?;
        Ok(Some((timed, text)))
    })?;
    let Some((timed, text)) = done.flatten() else { return Ok(()) };
    if args.json {
        let mut object = timed.json(prompt.len(), &options.sampling);
        object["text"] = json!(text);
        return print_json(&object);
    }
    writeln!(std::io::stdout()).context("cannot write to standard output")?;
    eprintln!("{}", timed.sentence(prompt.len()));
    Ok(())
}

/// Any number of prompts, and for each a JSON list of its new ids.
fn of_ids(args: &GenerateArgs, path: &Path, spec: &ModelSpec, options: &GenerateOptions) -> Result<()> {
    let prompts = inputs::prompts(path)?;
    for (i, prompt) in prompts.iter().enumerate() {
        check_prompt(spec, prompt).with_context(|| format!("{}: sequence {i}", path.display()))?;
    }
    let done = with_model(&args.load, &args.spread, |decoder| {
        let (rank, num_ranks) =
            decoder.ranks().map_or((0, 1), |ranks| (ranks.comm().rank(), ranks.comm().world_size()));
        // Prompts are dealt out in turn; text comes token by token where nobody else writes.
        let streams = num_ranks == 1 && !args.json;
        let mut own = Vec::new();
        for prompt in prompts.iter().skip(rank).step_by(num_ranks) {
            let mut separator = "[";
            let timed = Timed::run(decoder, prompt, options, &mut |id| {
                let mut stdout = std::io::stdout().lock();
                let mut show = || write!(stdout, "{separator}{id}").and_then(|()| stdout.flush());
                let written = if streams { show() } else { Ok(()) };
                separator = ", ";
                Ok(written)
            })?;
            if streams {
                print("]\n")?;
                eprintln!("{}", timed.sentence(prompt.len()));
            }
            own.push(timed.json(prompt.len(), &options.sampling));
        }
        decoder.attend()?;
        let Some(ranks) = decoder.ranks() else { return Ok((streams, own)) };
        let all = ranks.gather("generated ids", &serde_json::to_vec(&own)?)?;
        let of_rank = all.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?));
        let of_rank: Vec<Vec<Value>> = of_rank.collect::<Result<_>>()?;
        let in_order =
            (0..prompts.len()).filter_map(|i| of_rank.get(i % num_ranks)?.get(i / num_ranks).cloned());
        Ok((streams, in_order.collect()))
    })?;
    match done {
        None | Some((true, _)) => Ok(()),
        Some((false, objects)) if args.json => print_json(&Value::Array(objects)),
        Some((false, objects)) => objects.iter().try_for_each(|object| {
            let ids = object["ids"].as_array().into_iter().flatten().map(Value::to_string);
            print(&format!("[{}]\n", ids.collect::<Vec<_>>().join(", ")))
        }),
    }
}

fn prompt_ids(args: &GenerateArgs, tokenizer: &TextTokenizer) -> Result<Vec<u32>> {
    let prompt = args.prompt.as_deref().unwrap_or_default();
    if !args.chat {
        return Ok(tokenizer.encode(prompt, true)?);
    }
    let message = |role: &str, text: &str| Message { role: role.into(), content: text.into() };
    let mut messages: Vec<Message> = args.system.iter().map(|s| message("system", s)).collect();
    messages.push(message("user", prompt));
    Ok(tokenizer.encode(&tokenizer.chat(&messages)?, false)?)
}

/// A continuation and how long it took.
struct Timed {
    generated: Generated,
    /// Seconds to the first token.
    first: f64,
    /// Tokens per second after the first.
    rate: Option<f64>,
}

impl Timed {
    /// `show` is given every new token; what it cannot write ends the text.
    fn run(
        decoder: &Decoder,
        prompt: &[u32],
        options: &GenerateOptions,
        show: &mut dyn FnMut(u32) -> occult_model::Result<std::io::Result<()>>,
    ) -> Result<Self> {
        let (start, mut first, mut failed) = (Instant::now(), None, None);
        let result = occult_model::generate(decoder, prompt, options, &mut |id| {
            first.get_or_insert_with(|| start.elapsed());
            Ok(match show(id)? {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            })
        });
        let total = start.elapsed().as_secs_f64();
        if let Some(error) = failed {
            return Err(error).context("cannot write to standard output");
        }
        let generated = result?;
        let first = first.map_or(total, |d| d.as_secs_f64());
        let later = generated.ids.len().saturating_sub(1);
        let rate = (later > 0).then(|| later as f64 / (total - first).max(1e-9));
        Ok(Self { generated, first, rate })
    }

    fn stop(&self) -> &'static str {
        match self.generated.stop {
            Stop::StopId(_) => "end of text",
            Stop::MaxTokens => "max tokens",
            Stop::Context => "context full",
            Stop::Caller => "stopped",
        }
    }

    fn json(&self, prompt_tokens: usize, sampling: &Sampling) -> Value {
        json!({
            "ids": self.generated.ids, "prompt_tokens": prompt_tokens, "stop": self.stop(),
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "seed": sampling.seed,
            "seconds_to_first_token": self.first, "tokens_per_second": self.rate,
        })
    }

    fn sentence(&self, prompt_tokens: usize) -> String {
        format!(
            "{} tokens after {} of the prompt, first after {}{}; {}",
            self.generated.ids.len(),
            prompt_tokens,
            crate::output::seconds(self.first),
            self.rate.map_or(String::new(), |r| format!(", then {r:.1} tokens/s")),
            self.stop(),
        )
    }
}
