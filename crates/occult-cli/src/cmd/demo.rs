//! `occult demo`: the commands that somebody would give one after the other, on the bundled model.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use occult_formats::{PlacementFile, PlacementMeta, Profile};
use occult_plan::{Placement, Topology};
use serde_json::{Value, json};

use super::{eval, generate, profile, report};
use crate::args::{Cli, Command, DemoArgs, SearchArgs, ShapeArgs};
use crate::compare::{self, Comparison, Request};
use crate::output::{Table, bytes, print, print_json, seconds};
use crate::report::ReportData;
use crate::{bundled, placing, setup};

const NOTICE: &str =
    "Routing of occult-16m, which comes with the program, on texts that it was not trained on.";
/// Hidden size and expert intermediate size of the model (its config.json).
const SHAPE: (usize, usize) = (256, 64);
/// Beginnings to continue.
const PROMPTS: [&str; 2] = ["The people of the United States", "def __init__(self, "];

pub(super) fn run(args: &DemoArgs) -> Result<()> {
    let start = Instant::now();
    let topology = setup::topology(&args.topology)?;
    let demo = Demo { dir: &args.out_dir, topology, quiet: args.json };
    bundled::unpack(demo.dir)?;

    demo.say("\nA model reads texts, and what its routers decide is recorded:\n")?;
    let texts = demo.texts("profile");
    demo.command(&format!(
        "profile {{dir}}/model --model-name {} {texts} -o {{dir}}/profile.safetensors",
        bundled::MODEL
    ))?;

    demo.say("\nExperts that work together are placed together, at an even load; the report compares ways to do it:\n")?;
    let ranks = topology.num_ranks();
    demo.say(
        &demo.shown(&format!("place {{dir}}/profile.safetensors --ranks {ranks} -o {{dir}}/placement.json")),
    )?;
    demo.say(
        &demo.shown(&format!("report {{dir}}/profile.safetensors --ranks {ranks} -o {{dir}}/report.html")),
    )?;
    let data = demo.place()?;

    demo.say(&format!(
        "\nThe model reads other texts, its experts on {ranks} ranks (threads here), which send each other rows of tokens:\n"
    ))?;
    let modes = demo.modes()?;
    demo.say(&table(&modes))?;

    if args.json {
        let mut value = serde_json::to_value(&data)?;
        value["measured"] = modes.iter().map(Measured::json).collect();
        return print_json(&value);
    }
    demo.say("\nThe pruned model writes:\n")?;
    for prompt in PROMPTS {
        demo.command(&format!(
            "generate {{dir}}/model --prompt \"{prompt}\" --ranks {ranks} --placement {{dir}}/placement.json \
             --max-ranks {} --max-tokens 40 --temperature 0.7 --seed 1",
            ranks.min(2)
        ))?;
        print("\n")?;
    }
    let report = demo.dir.join("report.html");
    print(&format!(
        "\nOpen {} in a browser. Model, texts, profile and placement are beside it: every command above can be given again.\n",
        report.display()
    ))?;
    eprintln!("done in {}", seconds(start.elapsed().as_secs_f64()));
    Ok(())
}

struct Demo<'a> {
    dir: &'a Path,
    topology: Topology,
    /// Nothing but JSON is printed.
    quiet: bool,
}

/// What one way to exchange rows cost and gave.
struct Measured {
    name: &'static str,
    found: eval::Evaluation,
}

impl Demo<'_> {
    fn say(&self, text: &str) -> Result<()> {
        if self.quiet { Ok(()) } else { print(text) }
    }

    /// The words of a command, with the folder in them.
    fn words(&self, command: &str) -> Result<Vec<String>> {
        let dir = self.dir.to_str().context("--out-dir: is not UTF-8")?;
        let mut words = vec!["occult".to_owned()];
        // A text in quotation marks is one word.
        for (i, part) in command.split('"').enumerate() {
            match i % 2 {
                0 => words.extend(part.split_whitespace().map(|word| word.replace("{dir}", dir))),
                _ => words.push(part.to_owned()),
            }
        }
        Ok(words)
    }

    fn parsed(&self, command: &str) -> Result<Command> {
        Ok(Cli::try_parse_from(self.words(command)?)?.command)
    }

    /// A command as it would be typed.
    fn shown(&self, command: &str) -> String {
        format!("  $ occult {}\n", command.replace("{dir}", &self.dir.display().to_string()))
    }

    /// Shows a command and carries it out.
    fn command(&self, command: &str) -> Result<()> {
        self.say(&self.shown(command))?;
        match self.parsed(command)? {
            Command::Profile(args) if self.quiet => profile::record(&args).map(|_| ()),
            Command::Profile(args) => profile::run(&args),
            Command::Generate(args) => generate::run(&args),
            _ => bail!("not a command of the demo: {command}"),
        }
    }

    fn texts(&self, part: &str) -> String {
        let names = bundled::TEXTS.map(|(name, ..)| format!("{{dir}}/texts/{part}/{name}"));
        format!("--text {}", names.join(" "))
    }

    /// Compares placements, and writes the search's and the report.
    fn place(&self) -> Result<ReportData> {
        let profile = Profile::open(&self.dir.join("profile.safetensors"))?;
        let search = SearchArgs { holdout: 0.5, ..SearchArgs::default() };
        let (hidden, ffn) = SHAPE;
        let shape = ShapeArgs { hidden, ffn, dtype: "f32".to_owned(), step_tokens: 16_384 };
        let Comparison { data, placements } = compare::run(&Request {
            profile: &profile,
            placements: &[],
            topology: self.topology,
            search: &search,
            shape: &shape,
            clusters: &["8xa6000-pcie".to_owned(), "8xh100-nvlink".to_owned()],
            title: Some("occult-16m on held-out texts"),
            notices: vec![NOTICE.to_owned()],
        })?;
        let meta = PlacementMeta {
            layer_ids: profile.meta().layer_ids.clone(),
            num_hidden_layers: profile.meta().num_hidden_layers,
            model: profile.meta().model.clone(),
            method: "search".to_owned(),
            seed: Some(search.seed),
            load_cap: Some(placing::DEFAULT_LOAD_CAP),
            profile: Some("profile.safetensors".to_owned()),
            ..PlacementMeta::default()
        };
        PlacementFile::new(meta, Placement::new(self.topology, placements)?)?
            .write(&self.dir.join("placement.json"))?;
        report::write_data(&self.dir.join("report.json"), &data)?;
        report::write_page(&self.dir.join("report.html"), &data)?;
        Ok(data)
    }

    /// Reads the other texts in every way.
    fn modes(&self) -> Result<Vec<Measured>> {
        let ranks = self.topology.num_ranks();
        let ways = [
            ("a row per expert, experts as numbered", " --mode conventional"),
            ("a row per rank, experts as numbered", ""),
            ("a row per rank, experts placed", " --placement {dir}/placement.json"),
            ("  at most 2 ranks per token", " --placement {dir}/placement.json --max-ranks 2"),
            ("  at most 1 rank per token", " --placement {dir}/placement.json --max-ranks 1"),
        ];
        let mut modes = Vec::new();
        for (name, options) in ways {
            let command = format!("eval {{dir}}/model --ranks {ranks}{options} --context 512");
            self.say(&self.shown(&format!("{command} --text {{dir}}/texts/measure/*.txt")))?;
            let Command::Eval(args) = self.parsed(&format!("{command} {}", self.texts("measure")))? else {
                bail!("not a command of the demo: {command}");
            };
            modes.extend(eval::measure(&args)?.map(|found| Measured { name, found }));
        }
        Ok(modes)
    }
}

impl Measured {
    fn json(&self) -> Value {
        json!({
            "mode": self.name.trim(),
            "rows_per_token": self.found.per_token(|s| s.rows),
            "bytes_per_token": self.found.per_token(|s| s.bytes),
            "perplexity": self.found.total.value(),
            "seconds": self.found.seconds,
        })
    }
}

fn table(modes: &[Measured]) -> String {
    let mut table = Table::new(["", "rows sent per token", "bytes per token", "perplexity", "seconds"]);
    for Measured { name, found } in modes {
        let figure = |value: Option<f64>, show: &dyn Fn(f64) -> String| value.map_or("-".to_owned(), show);
        table.row([
            (*name).to_owned(),
            figure(found.per_token(|s| s.rows), &|rows| format!("{rows:.2}")),
            figure(found.per_token(|s| s.bytes), &bytes),
            format!("{:.3}", found.total.value()),
            format!("{:.2}", found.seconds),
        ]);
    }
    format!(
        "\n{}\nPerplexity is the same to all digits but under the limits (collaboration pruning), which the model was not tuned for:\n\
         `occult tune --max-ranks 2` makes up for that.\n",
        table.render()
    )
}
