//! Training never loses work: other ranks, other options, full disks, diverging rates, occupied directories.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::models::{done, fails};
use common::room::{Room, strs};
use serde_json::Value;

fn losses(room: &Room, out: &str) -> Vec<f64> {
    room.log(out).iter().map(|e| e["loss"].as_f64().expect("loss")).collect()
}

#[test]
fn a_run_goes_on_on_other_ranks_by_its_own_placement() {
    let room = Room::new();
    let tune = |out: &str, ranks: &str, more: &[&str]| {
        let limit = ["--ranks", ranks, "--max-ranks", "2", "--anneal", "0.5"];
        done(&strs(&room.args("tune", out, &[&limit, more].concat())))
    };
    tune("whole", "4", &[]);
    tune("moved", "4", &["--stop-after", "2"]);
    tune("moved", "2", &["--stop-after", "2", "--resume"]);
    tune("moved", "3", &["--resume"]);
    for (step, (a, b)) in losses(&room, "whole").iter().zip(losses(&room, "moved")).enumerate() {
        assert!((a - b).abs() < 1e-3, "step {}: {a} and {b}", step + 1);
    }
    let limits = |out: &str| room.log(out).iter().map(|e| e["limit"].clone()).collect::<Vec<_>>();
    assert_eq!(limits("moved"), limits("whole"));
    let placement = |out: &str| fs::read(room.at(&format!("{out}/placement.json"))).expect("read");
    assert_eq!(placement("moved"), placement("whole"), "still that of four ranks");
}

#[test]
fn a_run_is_neither_overwritten_nor_resumed_with_other_options() {
    let room = Room::new();
    done(&strs(&room.args("pretrain", "run", &["--stop-after", "2"])));
    assert!(fails(&strs(&room.args("pretrain", "run", &[])), 1).contains("holds a run"));
    let refused =
        |more: &[&str]| fails(&strs(&room.args("pretrain", "run", &[&["--resume"], more].concat())), 1);
    for (more, expected) in [
        (&["--seed", "5"][..], "another configuration: it has seed 0, this run has seed 5"),
        (&["--lr", "0.5"], "it has learning rate 0.001, this run has learning rate 0.5"),
        (
            &["--aux-loss-over", "layers"],
            "it has --aux-loss-over AllLayers, this run has --aux-loss-over Layers",
        ),
        (&["--z-loss", "0.1"], "it has --z-loss 0, this run has --z-loss 0.1"),
    ] {
        let message = refused(more);
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    // The same file in another place is the same data; a changed file is not.
    fs::create_dir(room.at("elsewhere")).expect("created");
    fs::copy(room.at("data.jsonl"), room.at("elsewhere/data.jsonl")).expect("copied");
    let moved = |args: Vec<String>| args.into_iter().map(|a| a.replace("data.jsonl", "elsewhere/data.jsonl"));
    let args: Vec<String> = moved(room.args("pretrain", "run", &["--resume", "--stop-after", "1"])).collect();
    done(&strs(&args));
    room.write("elsewhere/data.jsonl", "{\"text\": \"a b c d e f g h\"}\n".repeat(99));
    assert!(fails(&strs(&args), 1).contains("another configuration: it has data "));
    assert!(fails(&strs(&room.args("pretrain", "none", &["--resume"])), 1).contains("no run to resume"));
}

#[test]
fn placements_and_frozen_weights_are_known_by_their_content() {
    let room = Room::new();
    let placement = |name: &str, ranks: &str| {
        let text = format!(
            r#"{{"format":"occult.placement.v1","num_experts":16,"num_ranks":2,"num_nodes":1,"layer_ids":[0,1],"method":"x",
                "model":"other","layers":[{{"layer":0,"ranks":{ranks}}},{{"layer":1,"ranks":{ranks}}}]}}"#
        );
        room.write(name, text)
    };
    let placed = placement("p.json", "[[0,2,4,6,8,10,12,14],[1,3,5,7,9,11,13,15]]");
    let limit = ["--train", "experts", "--placement", &placed, "--max-ranks", "1"];
    let tune = |more: &[&str]| room.args("tune", "run", &[&limit, more].concat());
    let started = common::models::occult(&strs(&tune(&["--stop-after", "2"])));
    let message = String::from_utf8_lossy(&started.stderr).into_owned();
    assert!(started.status.success(), "{message}");
    assert!(message.contains("was made for the model \"other\", this one is called \"model\""), "{message}");
    // Another file with the same tables; no file at all: the run's own.
    fs::rename(&placed, room.at("q.json")).expect("renamed");
    let without: Vec<&str> = limit.iter().copied().filter(|a| *a != "--placement" && *a != placed).collect();
    done(&strs(&room.args("tune", "run", &[&without[..], &["--resume", "--stop-after", "1"]].concat())));
    placement("p.json", "[[0,2,4,7,8,10,12,14],[1,3,5,6,9,11,13,15]]");
    let message = fails(&strs(&tune(&["--resume"])), 1);
    assert!(message.contains("another configuration: it has --placement "), "{message}");
    // Weights that are not trained are part of what a run is.
    placement("p.json", "[[0,2,4,6,8,10,12,14],[1,3,5,7,9,11,13,15]]");
    let weights = room.at("model/model.safetensors");
    let mut bytes = fs::read(&weights).expect("read");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(&weights, bytes).expect("written");
    let message = fails(&strs(&tune(&["--resume"])), 1);
    assert!(message.contains("it has weights of MODEL "), "{message}");
}

#[test]
fn directories_that_hold_something_else_are_refused() {
    let room = Room::new();
    let out = |name: &str| fails(&strs(&room.args("tune", name, &[])), 1);
    let before = room.weights("model");
    assert!(out("model").contains("is the directory that is read"));
    fs::create_dir(room.at("folder")).expect("created");
    assert!(out("folder/../model").contains("is the directory that is read"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(room.at("model"), room.at("link")).expect("linked");
        assert!(out("link").contains("is the directory that is read"));
    }
    assert!(out("data.jsonl").contains("is a file, expected a directory"));
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        fs::create_dir(room.at(&format!("with-{name}"))).expect("created");
        room.write(&format!("with-{name}/{name}"), "{}");
        let message = out(&format!("with-{name}"));
        assert!(message.contains(&format!("holds {name}, a model that no run here has made")), "{message}");
    }
    assert_eq!(room.weights("model"), before);
    assert!(!Path::new(&room.at("model/training")).exists());
}

#[test]
fn a_rate_that_is_too_high_stops_with_the_checkpoint_from_before() {
    let room = Room::new();
    let more = ["--steps", "200", "--checkpoint-every", "4", "--keep", "1", "--lr", "3", "--warm-up", "100"];
    let mut args = room.args("pretrain", "bad", &[]);
    for option in ["--steps", "--checkpoint-every"] {
        let at = args.iter().position(|a| a == option).expect("there");
        args.drain(at..at + 2);
    }
    args.extend(more.map(str::to_owned));
    let message = fails(&strs(&args), 1);
    assert!(message.contains("training diverged at step "), "{message}");
    let (_, path) = message.trim_end().split_once("last good checkpoint: ").expect("a checkpoint is named");
    let step: usize = path.rsplit_once("step-").expect("a step").1.parse().expect("a number");
    assert!(Path::new(path).join("checkpoint.json").is_file(), "{path}");
    let losses = losses(&room, "bad");
    let mean_of = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    // As the guard measures it: the best stretch of up to 16 steps.
    let stretches = (4..=losses.len()).map(|end| mean_of(&losses[end.saturating_sub(16)..end]));
    let best = stretches.fold(f64::INFINITY, f64::min);
    let mean = mean_of(&losses[step - 4..step]);
    assert!(mean < best + 0.3, "step {step}: mean {mean}, best {best}: {losses:?}");
    assert!(losses[losses.len() - 1] > best + 0.5, "it did rise: {losses:?}");
    assert!(
        losses.len() > step + 4,
        "a later checkpoint was there, and --keep is 1: {step} of {}",
        losses.len()
    );
}

#[cfg(unix)]
#[test]
fn a_full_disk_names_the_last_good_checkpoint_and_loses_nothing() {
    let room = Room::new();
    done(&strs(&room.args("pretrain", "whole", &[])));
    done(&strs(&room.args("pretrain", "full", &["--stop-after", "2"])));
    let shard = room.at("full/training/step-00000002/rank-0000.safetensors");
    assert!(fs::metadata(&shard).expect("a shard").len() > 64 << 10, "larger than the limit");
    // As on a full disk a write is refused half way, here beyond 16 or 32 kB of a file.
    let limited = ["-c", "trap '' XFSZ; ulimit -f 32; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_occult")];
    let args = room.args("pretrain", "full", &["--resume"]);
    let out = Command::new("sh").args(limited).args(&args).output().expect("runs");
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{message}");
    assert!(message.contains("the checkpoint of step 4 is not complete: cannot write "), "{message}");
    assert!(message.contains("last good checkpoint: ") && message.contains("step-00000002"), "{message}");
    assert!(message.trim_end().ends_with("go on from it with --resume"), "{message}");
    done(&strs(&args));
    assert_eq!(room.weights("full"), room.weights("whole"));
}

#[test]
fn what_killed_encodings_and_writers_have_left_is_removed() {
    let room = Room::new();
    fs::create_dir_all(room.at("run/training/0123.store.77.partial")).expect("created");
    room.write("run/model.safetensors.partial", "half");
    done(&strs(&room.args("pretrain", "run", &[])));
    let names = |folder: &str| -> Vec<String> {
        let entries = fs::read_dir(room.at(folder)).expect("a folder");
        entries.map(|e| e.expect("entry").file_name().into_string().expect("UTF-8")).collect()
    };
    let left = [names("run"), names("run/training")].concat();
    assert!(!left.iter().any(|n| n.contains("partial")), "{left:?}");
}

#[test]
fn what_lies_beside_the_weights_is_taken_over() {
    let room = Room::new();
    for folder in ["model", "config"] {
        for name in ["added_tokens.json", "tokenizer.model", "modeling_x.py", "placement.json"] {
            room.write(&format!("{folder}/{name}"), "{}");
        }
        room.write(&format!("{folder}/occult.json"), "{\"format\": \"occult.limit.v1\"}");
    }
    done(&strs(&room.args("tune", "tuned", &[])));
    done(&strs(&room.args("pretrain", "new", &[])));
    let has = |path: &str| Path::new(&room.at(path)).exists();
    assert!(has("tuned/added_tokens.json") && has("tuned/tokenizer.model") && has("tuned/modeling_x.py"));
    assert!(has("new/added_tokens.json") && has("new/tokenizer.model") && !has("new/modeling_x.py"));
    assert!(!has("tuned/occult.json") && !has("tuned/placement.json"), "the limit is a run's own");
    let config: Value =
        serde_json::from_slice(&fs::read(room.at("tuned/config.json")).expect("read")).expect("JSON");
    assert_eq!(config["torch_dtype"], "float32");
}
