//! `occult pretrain` and `occult tune` on tiny models: runs, resumes, and what is refused.

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use common::models::{done, fails};
use common::room::{Room, command, strs};
use serde_json::Value;

#[test]
fn a_pretrained_model_is_loaded_again_and_a_stopped_run_resumes_to_the_bit() {
    let room = Room::new();
    let eval = ["--eval-data".to_owned(), room.at("data.jsonl"), "--eval-every".to_owned(), "3".to_owned()];
    let out = done(&strs(&[room.args("pretrain", "whole", &["--json"]), eval.to_vec()].concat()));
    let out: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((out["step"].as_u64(), out["finished"].as_bool()), (Some(6), Some(true)));
    let log = room.log("whole");
    assert_eq!(log.len(), 6);
    assert!(log[2]["figures"]["val_loss/data"].as_f64().is_some() && log[1]["figures"]["val_loss"].is_null());
    assert!(
        done(&["eval", &room.at("whole"), "--text", &room.at("data.jsonl"), "--json"]).contains("perplexity")
    );
    done(&strs(&room.args("pretrain", "parts", &["--stop-after", "3"])));
    assert_ne!(room.weights("parts"), room.weights("whole"));
    done(&strs(&room.args("pretrain", "parts", &["--resume"])));
    assert_eq!(room.weights("parts"), room.weights("whole"));
    assert_eq!(room.log("parts").len(), 6);
}

#[test]
fn killed_it_resumes_to_the_bit() {
    let room = Room::new();
    let long = ["--steps", "300", "--checkpoint-every", "5"];
    let args = |out: &str, more: &[&str]| {
        let mut args = room.args("pretrain", out, more);
        let at = args.iter().position(|a| a == "--steps").expect("steps");
        args.drain(at..at + 2);
        let at = args.iter().position(|a| a == "--checkpoint-every").expect("interval");
        args.drain(at..at + 2);
        args.extend(long.map(str::to_owned));
        args
    };
    done(&strs(&args("whole", &[])));
    for after in [1, 20, 60] {
        let out = format!("killed{after}");
        let mut child = command(&strs(&args(&out, &[])))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("runs");
        // Until the log has so many lines: that is somewhere in a step or a checkpoint.
        let log = room.at(&format!("{out}/training/log.jsonl"));
        while child.try_wait().expect("state").is_none()
            && fs::read_to_string(&log).map_or(0, |t| t.lines().count()) < after
        {
            std::thread::yield_now();
        }
        let _ = child.kill();
        child.wait().expect("ended");
        let saved = Path::new(&room.at(&out)).join("training/latest").is_file();
        done(&strs(&args(&out, if saved { &["--resume"] } else { &[] })));
        assert_eq!(room.weights(&out), room.weights("whole"), "killed after {after} lines");
    }
}

#[test]
fn tuning_over_ranks_with_a_limit_records_it() {
    let room = Room::new();
    let limit = ["--ranks", "4", "--max-ranks", "2", "--anneal", "0.5"];
    done(&strs(&room.args("tune", "tuned", &limit)));
    let notes: Value =
        serde_json::from_slice(&fs::read(room.at("tuned/occult.json")).expect("read")).expect("JSON");
    assert_eq!((notes["max_ranks"].as_u64(), notes["rule"].as_str()), (Some(2), Some("best-mass")));
    let log = room.log("tuned");
    assert_eq!(log[0]["limit"], 4);
    assert_eq!(log[5]["limit"], 2);
    assert!(log[5]["figures"]["C_T"].as_f64().expect("C_T") <= 2.0);
    assert!(occult_formats::LimitFile::read(Path::new(&room.at("tuned"))).expect("read").is_some());
    // The same placement on one rank: the same choices, sums in another order.
    let placement = room.at("tuned/placement.json");
    done(&strs(&room.args(
        "tune",
        "alone",
        &["--placement", &placement, "--max-ranks", "2", "--anneal", "0.5"],
    )));
    let (a, b) = (room.log("tuned"), room.log("alone"));
    for (a, b) in a.iter().zip(&b) {
        let (a, b) = (a["loss"].as_f64().expect("loss"), b["loss"].as_f64().expect("loss"));
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }
    for what in ["experts", "lora"] {
        done(&strs(&room.args("tune", what, &["--train", what, "--lora-rank", "2"])));
        assert_ne!(room.weights(what), room.weights("model"));
        assert!(!Path::new(&room.at(&format!("{what}/occult.json"))).exists());
    }
}

#[test]
fn weights_of_ranks_steer_a_run_and_stay_with_the_model() {
    let room = Room::new();
    let limited = |out: &str, more: &[&str]| room.args("tune", out, &[&["--max-ranks", "1"], more].concat());
    done(&strs(&limited("plain", &["--ranks", "2"])));
    let path = room.at("plain/placement.json");
    let mut file: Value = serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
    for layer in file["layers"].as_array_mut().expect("layers") {
        layer["rank_weights"] = serde_json::json!([1.0, 0.0001]);
    }
    let path = room.write("weighted.json", file.to_string());
    done(&strs(&limited("weighted", &["--placement", &path])));
    let (_, kept) =
        occult_formats::LimitFile::read(Path::new(&room.at("weighted"))).expect("read").expect("limit");
    assert!(kept.placement.layers().iter().all(|l| l.rank_weights() == Some(&[1.0, 0.0001])));
    let [plain, weighted] = ["plain", "weighted"].map(|run| room.log(run)[0]["loss"].as_f64().expect("loss"));
    assert_ne!(plain, weighted, "other experts are chosen");
    let more = ["--placement", &path, "--ranks", "2", "--replace-placement", "0.1"];
    let message = fails(&strs(&limited("replaced", &more)), 1);
    assert!(message.contains("weights of its ranks"), "{message}");
}

#[test]
fn parts_of_a_batch_change_a_run_by_rounding_and_may_change_with_resume() {
    let room = Room::new();
    let losses =
        |out: &str| -> Vec<f64> { room.log(out).iter().map(|e| e["loss"].as_f64().expect("loss")).collect() };
    for (verb, ranks) in [("tune", "4"), ("pretrain", "2")] {
        let run = |out: &str, more: &[&str]| {
            let out = format!("{verb}-{out}");
            done(&strs(&room.args(verb, &out, &[&["--ranks", ranks, "--dtype", "f32"], more].concat())));
            (room.weights(&out), losses(&out))
        };
        let whole = run("off", &["--overlap", "off"]);
        let parts = run("parts", &["--overlap", "2"]);
        assert_eq!(run("again", &["--overlap", "2"]), parts);
        assert_eq!(run("default", &[]), whole, "off without a cluster");
        run("resumed", &["--overlap", "2", "--stop-after", "3"]);
        assert_eq!(run("resumed", &["--overlap", "2", "--resume"]), parts);
        run("changed", &["--overlap", "2", "--stop-after", "3"]);
        let changed = run("changed", &["--cluster", "8xa6000-pcie", "--resume"]);
        for (other, what) in [(&parts, "in two parts"), (&changed, "changed when it went on")] {
            assert_eq!(other.1.len(), whole.1.len());
            for (a, b) in whole.1.iter().zip(&other.1) {
                assert!((a - b).abs() < 1e-4, "{verb} {what}: {a} and {b}");
            }
        }
    }
}

/// The message of a run that is refused with these data.
fn refused_data(room: &Room, file: &str) -> String {
    let args: Vec<String> =
        room.args("pretrain", "bad", &[]).into_iter().map(|a| a.replace("data.jsonl", file)).collect();
    fails(&strs(&args), 1)
}

#[test]
fn an_empty_data_file_is_refused() {
    let room = Room::new();
    room.write("empty.jsonl", "");
    assert!(refused_data(&room, "empty.jsonl").contains("empty.jsonl"));
}

#[test]
fn a_binary_data_file_is_refused() {
    let room = Room::new();
    room.write("binary.txt", [b'a', 0xff, 0xfe, 0, 1, 2]);
    assert!(refused_data(&room, "binary.txt").contains("binary.txt, line 1: not a text file"));
}

#[test]
fn a_broken_json_line_is_named() {
    let room = Room::new();
    room.write("broken.jsonl", "{\"text\": \"a b\"}\n{\"text\": \"a\n");
    assert!(refused_data(&room, "broken.jsonl").contains("broken.jsonl, line 2: broken JSON"));
}

#[test]
fn a_missing_data_file_is_named() {
    assert!(refused_data(&Room::new(), "absent.jsonl").contains("absent.jsonl"));
}

#[test]
fn a_placement_for_another_model_is_refused() {
    let room = Room::new();
    room.write(
        "other.json",
        r#"{"format":"occult.placement.v1","num_experts":4,"num_ranks":2,"num_nodes":1,"layer_ids":[0],"method":"x",
            "layers":[{"layer":0,"ranks":[[0,2],[1,3]]}]}"#,
    );
    let message = fails(&strs(&room.args("tune", "bad", &["--placement", &room.at("other.json")])), 1);
    assert!(message.contains("is for another model"), "{message}");
}

#[test]
fn a_limit_that_leaves_too_few_experts_is_refused() {
    let room = Room::new();
    let message = fails(&strs(&room.args("tune", "bad", &["--ranks", "4", "--max-ranks", "5"])), 1);
    assert!(message.contains("--max-ranks is 5"), "{message}");
    let config = room.at("model/config.json");
    let text = fs::read_to_string(&config).expect("read");
    let mut config_of: Value = serde_json::from_str(&text).expect("JSON");
    config_of["num_experts_per_tok"] = 5.into();
    fs::write(&config, config_of.to_string()).expect("written");
    let message = fails(&strs(&room.args("tune", "bad", &["--ranks", "4", "--max-ranks", "1"])), 1);
    assert!(message.contains("a token needs 5"), "{message}");
}

#[test]
fn a_checkpoint_of_another_version_is_refused() {
    let room = Room::new();
    done(&strs(&room.args("pretrain", "old", &["--stop-after", "2"])));
    let manifest = room.at("old/training/step-00000002/checkpoint.json");
    let text = fs::read_to_string(&manifest).expect("read").replace("\"version\": 2", "\"version\": 99");
    fs::write(&manifest, text).expect("written");
    let message = fails(&strs(&room.args("pretrain", "old", &["--resume"])), 1);
    assert!(message.contains("checkpoint format version 99"), "{message}");
}

#[test]
fn options_without_a_meaning_are_wrong_usage() {
    let room = Room::new();
    for more in [["--lr", "-1"], ["--lr", "nan"], ["--anneal", "2"], ["--length", "0"], ["--epochs", "0"]] {
        fails(&strs(&room.args("pretrain", "bad", &more)), 2);
    }
    for verb in ["pretrain", "tune"] {
        for parts in ["0", "1025", "1.5", "many"] {
            let message = fails(&strs(&room.args(verb, "bad", &["--ranks", "2", "--overlap", parts])), 2);
            assert!(message.contains("--overlap"), "{message}");
        }
        let message = fails(&strs(&room.args(verb, "bad", &["--overlap", "2"])), 2);
        assert!(message.contains("--overlap needs ranks: give --ranks N or --comm mpi"), "{message}");
        let message = fails(&strs(&room.args(verb, "bad", &["--ranks", "2", "--cluster", "none.toml"])), 1);
        assert!(message.contains("none.toml"), "{message}");
    }
    let mass = room.args("tune", "bad", &["--ranks", "2", "--max-ranks", "1", "--keep-mass", "1.5"]);
    assert!(fails(&strs(&mass), 2).contains("a share above 0, at most 1"));
    let long =
        room.args("pretrain", "bad", &[]).into_iter().map(|a| if a == "8" { "4096".into() } else { a });
    assert!(fails(&strs(&long.collect::<Vec<String>>()), 1).contains("the model's context is"));
}

#[test]
fn a_report_shows_the_run_that_trained_the_model() {
    let room = Room::new();
    let data = room.at("data.jsonl");
    let more =
        ["--ranks", "4", "--max-ranks", "2", "--anneal", "0.5", "--eval-data", &data, "--eval-every", "3"];
    done(&strs(&room.args("pretrain", "run", &more)));
    let log = room.log("run");
    for entry in &log {
        let of = |name: &str| entry["figures"][name].as_f64().expect("a figure");
        assert!(of("C_T_unlimited") >= of("C_T") - 1e-9, "{entry}");
        assert!(
            (of("C_T_drift")
                - of("C_T_unlimited") / log[0]["figures"]["C_T_unlimited"].as_f64().expect("C_T"))
            .abs()
                < 1e-5
        );
    }
    let (run, profile, page, shown) =
        (room.at("run"), room.at("profile.safetensors"), room.at("page.html"), room.at("data.json"));
    let text = room.write("text.txt", "a b c d e f g h a c b a d a b ".repeat(30));
    done(&["profile", &run, "--text", &text, "-o", &profile]);
    for training in [run.clone(), room.at("run/training")] {
        done(&[
            "report",
            &profile,
            "--ranks",
            "4",
            "--restarts",
            "1",
            "--training",
            &training,
            "--data",
            &shown,
            "-o",
            &page,
        ]);
        let found: Value = serde_json::from_slice(&fs::read(&shown).expect("read")).expect("JSON");
        let (run, points) = (&found["training"], found["training"]["points"].as_array().expect("points"));
        assert_eq!(
            (run["steps"].as_u64(), points.len(), &run["domains"]),
            (Some(6), 6, &serde_json::json!(["data"]))
        );
        assert_eq!(points[5]["limit"], 2);
        assert_eq!(points[5]["loss"], log[5]["loss"]);
        assert_eq!(points[2]["held_out"][0], log[2]["figures"]["val_loss/data"]);
        for (name, logged) in
            [("copies_per_token", "C_T"), ("copies_unlimited", "C_T_unlimited"), ("drift", "C_T_drift")]
        {
            assert_eq!(points[4][name], log[4]["figures"][logged], "{name}");
        }
        assert!(fs::read_to_string(&page).expect("page").contains("\"training\":{"));
    }
    let message =
        fails(&["report", &profile, "--ranks", "4", "--training", &room.at("config"), "-o", &page], 1);
    assert!(message.contains("has no training log"), "{message}");
}

#[test]
fn a_bias_on_the_choices_is_recorded_used_and_resumed() {
    let room = Room::new();
    let (data, bias) = (room.at("data.jsonl"), ["--balance-bias", "0.02"]);
    done(&strs(&room.args("pretrain", "whole", &bias)));
    done(&strs(&room.args("pretrain", "parts", &[&bias[..], &["--stop-after", "3"]].concat())));
    done(&strs(&room.args("pretrain", "parts", &[&bias[..], &["--resume"]].concat())));
    assert_eq!(room.weights("parts"), room.weights("whole"));
    let notes = |dir: &str| fs::read(room.at(&format!("{dir}/occult.json"))).expect("notes");
    assert_eq!(notes("parts"), notes("whole"));
    let found =
        occult_formats::LimitFile::read_bias(Path::new(&room.at("whole"))).expect("read").expect("a bias");
    assert!(found.iter().flatten().any(|b| *b != 0.0));
    let eval = |dir: &str, more: &[&str]| -> f64 {
        let out = done(&[&["eval", &room.at(dir), "--text", &data, "--json"], more].concat());
        let value: Value = serde_json::from_str(&out).expect("JSON");
        value["total"]["perplexity"].as_f64().unwrap_or_else(|| panic!("{value}"))
    };
    done(&["convert", &room.at("whole"), "-o", &room.at("copy")]);
    let with = eval("whole", &[]);
    assert_eq!(eval("copy", &[]), with);
    assert!((eval("whole", &["--ranks", "2"]) / with - 1.0).abs() < 1e-5);
    // Over ranks and with a limit the bias stands beside the placement.
    let tuned = [&bias[..], &["--ranks", "4", "--max-ranks", "2"]].concat();
    done(&strs(&room.args("tune", "tuned", &tuned)));
    assert!(occult_formats::LimitFile::read(Path::new(&room.at("tuned"))).expect("read").is_some());
    assert!(occult_formats::LimitFile::read_bias(Path::new(&room.at("tuned"))).expect("read").is_some());
    // Tuned on, the bias is where the model was; without its notes it is another model.
    done(&[
        "logits",
        &room.at("whole"),
        "--ids",
        &room.write("ids.json", "[[1, 2, 3, 4, 5, 6]]"),
        "--out",
        &room.at("a.safetensors"),
    ]);
    fs::remove_file(room.at("copy/occult.json")).expect("removed");
    done(&["logits", &room.at("copy"), "--ids", &room.at("ids.json"), "--out", &room.at("b.safetensors")]);
    let read = |name: &str| fs::read(room.at(name)).expect("logits");
    assert_ne!(read("a.safetensors"), read("b.safetensors"), "the bias changes no choice");
    done(&[
        "profile",
        &room.at("whole"),
        "--text",
        &room.write("t.txt", "a b c d e f g h ".repeat(20)),
        "-o",
        &room.at("p.safetensors"),
    ]);
    done(&["place", &room.at("p.safetensors"), "--ranks", "2", "--equal", "-o", &room.at("p.json")]);
    let message = fails(&["permute", &room.at("whole"), &room.at("p.json"), "-o", &room.at("permuted")], 1);
    assert!(message.contains("bias on its routers' choices"), "{message}");
}

#[test]
fn another_placement_is_looked_for_at_checkpoints_and_recorded() {
    let room = Room::new();
    let args = |out: &str, more: &[&str]| -> Vec<String> {
        let args =
            room.args("tune", out, &[&["--ranks", "2", "--replace-placement", "0", "--json"], more].concat());
        args.into_iter().map(|a| if a == "32" { "512".into() } else { a }).collect()
    };
    let out: Value = serde_json::from_str(&done(&strs(&args("whole", &[])))).expect("JSON");
    let log = room.log("whole");
    let looked: Vec<bool> = log.iter().map(|e| e["figures"]["C_T_searched"].is_f64()).collect();
    assert_eq!(looked, [false, true, false, true, false, false]);
    let replaced = log.iter().any(|e| e["figures"]["replaced"] == 1.0);
    assert_eq!(out["placement_replaced"], replaced);
    assert_eq!(Path::new(&room.at("whole/placement.json")).is_file(), replaced);
    done(&strs(&args("parts", &["--stop-after", "3"])));
    done(&strs(&args("parts", &["--resume"])));
    assert_eq!(room.weights("parts"), room.weights("whole"));
}
