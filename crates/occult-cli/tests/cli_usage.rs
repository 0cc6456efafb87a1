//! What every command has: help whose examples run, exit codes, figures on standard output and everything else on
//! standard error.

mod common;

use common::{Lab, Rows, bundled, ints, list, says};

const COMMANDS: [&str; 9] =
    ["demo", "import", "stats", "traffic", "place", "export", "inspect", "prune", "report"];

/// The commands that a help text gives as examples, without the program's name.
fn examples(help: &str) -> Vec<String> {
    let from = help.find("\nExample").unwrap_or_else(|| panic!("no example in {help}"));
    let lines = help[from + 1..].lines().skip(1);
    lines
        .map(|line| {
            let command = line.trim().strip_prefix("occult ");
            command.unwrap_or_else(|| panic!("not a command (wrapped?): {line:?}")).to_owned()
        })
        .collect()
}

#[test]
fn help_lists_every_command_and_the_exit_codes() {
    let lab = Lab::new();
    let help = lab.ok("--help");
    assert_eq!(help.stderr, "");
    says(&help.stdout, &["Exit codes:", "\n  0  ", "\n  1  ", "\n  2  ", "\n  3  "]);
    for command in COMMANDS {
        says(&help.stdout, &[&format!("\n  {command} ")]);
        let own = lab.ok(&format!("{command} --help"));
        assert_eq!(own.stderr, "");
        says(&own.stdout, &[&format!("Usage: occult {command}")]);
        let examples = examples(&own.stdout);
        assert!(examples.iter().all(|e| e.split(' ').next() == Some(command)), "{examples:?}");
        // These two write files and print no figures.
        let prints_figures = !["export", "report"].contains(&command);
        assert_eq!(own.stdout.contains("--json"), prints_figures, "{command}");
    }
    assert_eq!(lab.ok("--version").stdout, format!("occult {}\n", env!("CARGO_PKG_VERSION")));
    assert!(lab.names().is_empty(), "help writes nothing");
}

/// Every example can be copied from the help and run where files of these names are.
#[test]
fn examples_run_as_they_are_printed() {
    let rows = Rows::new(1, 256, 1, 64, 4);
    let lab = Lab::with(&rows);
    lab.write("routing.safetensors", rows.safetensors());
    lab.ok("place profile.safetensors --method greedy -o placement.json");
    lab.ok("place profile.safetensors --ranks 8 --method contiguous -o mine.json");
    lab.ok("place profile.safetensors --ranks 8 --method eplb -o other.json");
    for file in std::fs::read_dir(bundled()).unwrap() {
        let file = file.unwrap();
        let name = format!("trace/{}", file.file_name().to_str().unwrap());
        lab.write(&name, std::fs::read(file.path()).unwrap());
    }
    let mut run = 0;
    for command in COMMANDS.iter().filter(|c| **c != "demo") {
        for example in examples(&lab.ok(&format!("{command} --help")).stdout) {
            // A shell expands the first, the second needs a model.
            if !example.contains('*') && !example.contains("OLMoE") {
                // Where two examples import, the profile of one must not be taken away from the others.
                let example = example.replace("-o profile.safetensors", "-o imported.safetensors");
                let outcome = lab.ok(&example);
                assert!(!outcome.stdout.is_empty() || example.contains(" -o "), "{outcome:?}");
                run += 1;
            }
        }
    }
    assert!(run >= 12, "{run}");
    for name in ["map.json", "report.html", "imported.safetensors", "placement.json"] {
        assert!(!lab.read(name).is_empty());
    }
}

#[test]
fn wrong_usage_is_exit_code_2_before_anything_is_read() {
    let lab = Lab::with(&Rows::new(1, 64, 1, 8, 2));
    lab.ok("place profile.safetensors --ranks 4 --method contiguous -o placement.json");
    for arguments in [
        "",
        "frobnicate",
        "import profile.safetensors",
        "import -o out.safetensors",
        "import profile.safetensors -o out.safetensors --format parquet",
        "import profile.safetensors -o out.safetensors --experts many",
        "stats",
        "stats profile.safetensors --ranks 0",
        "stats profile.safetensors --ranks -4",
        "stats profile.safetensors --ranks 4 --nodes 3",
        "stats profile.safetensors --nodes 0",
        "stats profile.safetensors --home here",
        "stats profile.safetensors --subgraph-points 1",
        "stats profile.safetensors --colour",
        "traffic profile.safetensors",
        "traffic profile.safetensors placement.json --dtype f8",
        "traffic profile.safetensors placement.json --hidden 0",
        "traffic profile.safetensors placement.json --step-tokens 0",
        "traffic profile.safetensors placement.json --cluster 8xabacus",
        "place profile.safetensors --method alphabetical",
        "place profile.safetensors --holdout 1",
        "place profile.safetensors --holdout=-0.5",
        "place profile.safetensors --holdout nan",
        "place profile.safetensors --time-limit 0",
        "place profile.safetensors --time-limit inf",
        "place profile.safetensors --load-cap 0.9",
        "place profile.safetensors --load-cap nan",
        "place profile.safetensors --restarts 0",
        "place profile.safetensors --max-tokens 0",
        "place profile.safetensors --equal --max-experts-per-rank 4",
        "export placement.json",
        "export placement.json --format onnx",
        "inspect",
        "prune profile.safetensors placement.json",
        "prune profile.safetensors placement.json --max-ranks 0",
        "prune profile.safetensors placement.json --max-ranks 2 --rule coin-toss",
        "prune profile.safetensors placement.json --max-ranks 2 --keep-mass 1.5",
        "prune profile.safetensors placement.json --max-ranks 2 --keep-mass 0",
        "prune profile.safetensors placement.json --max-ranks 2 --max-error 0",
        "prune profile.safetensors placement.json --max-ranks 2 --max-error 0.1 --keep-mass 0.9",
        "prune profile.safetensors placement.json --max-ranks 2 --ranks-only --rule similarity",
        "report profile.safetensors --ranks 0",
        "report profile.safetensors --holdout 2",
        "report profile.safetensors --dtype f8",
    ] {
        let message = lab.refused(2, arguments);
        assert!(!message.is_empty(), "{arguments} says nothing");
    }
}

#[test]
fn success_is_silent_on_standard_error_and_progress_bars_are_for_terminals() {
    let lab = Lab::with(&Rows::new(1, 64, 2, 8, 2));
    let place = lab.ok("place profile.safetensors --ranks 4 --method greedy -o placement.json");
    for quiet in [
        place,
        lab.ok("import rows.safetensors -o again.safetensors"),
        lab.ok("stats profile.safetensors"),
        lab.ok("traffic profile.safetensors placement.json --cluster 8xh100-nvlink"),
        lab.ok("prune profile.safetensors placement.json --max-ranks 2"),
        lab.ok("inspect profile.safetensors"),
    ] {
        assert_eq!(quiet.stderr, "", "{quiet:?}");
        assert!(!quiet.stdout.is_empty() && !quiet.stdout.contains('\u{1b}'), "{quiet:?}");
    }
    // A map on standard output can be piped: what is said about it goes elsewhere.
    let export = lab.ok("export placement.json --format vllm");
    serde_json::from_str::<serde_json::Value>(&export.stdout).unwrap();
    assert!(!export.stderr.is_empty());
    // Warnings too.
    let warned = lab.ok("place profile.safetensors --restarts 1");
    assert!(warned.stderr.starts_with("warning: ") && !warned.stdout.contains("warning"), "{warned:?}");
}

#[test]
fn missing_files_are_exit_code_1_and_name_the_file_once() {
    let lab = Lab::with(&Rows::new(1, 64, 1, 8, 2));
    lab.ok("place profile.safetensors --ranks 4 --method contiguous -o placement.json");
    for arguments in [
        "import absent -o out.safetensors",
        "stats absent",
        "traffic absent placement.json",
        "traffic profile.safetensors absent",
        "traffic profile.safetensors placement.json --cluster absent.toml",
        "place absent",
        "export absent --format vllm",
        "export placement.json --format vllm --profile absent",
        "inspect absent",
        "prune absent placement.json --max-ranks 2",
        "report absent",
        "report profile.safetensors absent",
        "place profile.safetensors --method contiguous -o absent/placement.json",
        "export placement.json --format vllm -o absent/map.json",
        "import rows.safetensors -o absent/profile.safetensors",
        "report profile.safetensors --restarts 1 -o absent/report.html",
    ] {
        let message = lab.refused(1, arguments);
        says(&message, &["absent"]);
        assert_eq!(message.matches("No such file").count(), 1, "said twice: {message}");
    }
    says(&lab.refused(1, "stats ."), &["directory"]);
    says(&lab.refused(1, "stats placement.json"), &["placement.json"]);
    says(&lab.refused(1, "traffic profile.safetensors profile.safetensors"), &["profile.safetensors"]);
}

#[test]
fn import_reads_safetensors_npz_and_folders_and_says_what_it_made() {
    let rows = Rows::new(3, 300, 3, 12, 3);
    let lab = Lab::new();
    lab.write("a.safetensors", rows.safetensors());
    lab.write("a.npz", rows.npz());
    let mut stats = Vec::new();
    for name in ["a.safetensors", "a.npz"] {
        let made = lab.figures(&format!("import {name} -o p.safetensors"));
        assert_eq!(made["output"], "p.safetensors");
        assert_eq!(format!("a.{}", made["format"].as_str().unwrap()), name);
        assert_eq!((&made["meta"]["num_experts"], &made["meta"]["top_k"]), (&12.into(), &3.into()));
        assert_eq!(ints(&made["rows"]), [300; 3]);
        stats.push(lab.figures("stats p.safetensors")["layers"].clone());
    }
    assert_eq!(stats[0], stats[1]);
    // Twice the same file is twice the tokens.
    lab.write("b.safetensors", rows.safetensors());
    let text = lab.ok("import a.safetensors b.safetensors -o p.safetensors").stdout;
    says(&text, &["p.safetensors", "3 MoE layers", "12 experts", "top-3", "600 rows"]);

    let made = lab.figures(&format!("import {} -o q.safetensors", bundled().display()));
    let bytes = std::fs::metadata(bundled().join("routes_u8.bin")).unwrap().len() as usize;
    assert_eq!(ints(&made["rows"]), [bytes / (24 * 4); 24]);
    let warnings = list(&made, "warnings");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    says(warnings[0].as_str().unwrap(), &["router logits"]);
    assert_eq!(lab.names(), ["a.npz", "a.safetensors", "b.safetensors", "p.safetensors", "q.safetensors"]);
}

#[test]
fn import_needs_the_number_of_experts_from_somewhere() {
    let lab = Lab::new();
    let mut rows = Rows::new(3, 50, 2, 12, 3).ids_only();
    rows.metadata.clear();
    lab.write("a.safetensors", rows.safetensors());
    says(&lab.refused(1, "import a.safetensors -o p.safetensors"), &["a.safetensors", "--experts"]);
    let made = lab.figures(
        "import a.safetensors --experts 16 -o p.safetensors --model tiny --layer-ids 1,4 --hidden-layers 6",
    );
    assert_eq!(made["meta"]["num_experts"], 16);
    assert_eq!(made["meta"]["model"], "tiny");
    assert_eq!(ints(&made["meta"]["layer_ids"]), [1, 4]);
    let stats = lab.figures("stats p.safetensors");
    assert_eq!((&stats["layers"][0]["layer"], &stats["layers"][1]["layer"]), (&1.into(), &4.into()));
    // A file that says otherwise is not overruled in silence.
    lab.write("b.safetensors", Rows::new(3, 50, 2, 12, 3).safetensors());
    says(&lab.refused(1, "import b.safetensors --experts 16 -o q.safetensors"), &["12", "16"]);
}

#[test]
fn inspect_knows_what_the_program_reads_and_writes() {
    let rows = Rows::new(3, 64, 2, 8, 2);
    let lab = Lab::with(&rows);
    lab.write("rows.npz", rows.npz());
    lab.write("nothing.txt", "hello\n");
    lab.ok("place profile.safetensors --method contiguous -o placement.json");
    lab.ok("export placement.json --format sglang -o sglang.json");
    lab.ok("export placement.json --format tensorrt-llm -o balancer.yaml");
    for (file, kind, format) in [
        ("profile.safetensors", "profile", None),
        ("placement.json", "placement", None),
        ("rows.safetensors", "importable", Some("safetensors")),
        ("rows.npz", "importable", Some("npz")),
        ("sglang.json", "expert-map", Some("sglang")),
        ("balancer.yaml", "expert-map", Some("tensorrt-llm")),
        ("nothing.txt", "unknown", None),
    ] {
        let facts = lab.figures(&format!("inspect {file}"));
        assert_eq!(facts["kind"], kind, "{facts}");
        assert_eq!(facts["format"].as_str(), format, "{facts}");
        let text = lab.ok(&format!("inspect {file}")).stdout;
        assert!(text.starts_with(&format!("{file}: ")), "{text}");
        assert!(!text[1..].contains(&format!("{file}: ")), "said twice: {text}");
    }
    says(
        &lab.ok("inspect profile.safetensors").stdout,
        &["routing profile", "experts    8", "rows       64"],
    );
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let lab = Lab::with_bundled();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_occult"))
        .args(["stats", "profile.safetensors", "--json", "--subgraph-points", "2000"])
        .current_dir(lab.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert!(output.status.success(), "{}", output.status);
}
